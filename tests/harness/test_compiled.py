"""`training.compile` in runs: the same errors, names and bits on resuming."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ibp_triton.compiling import distance
from ibp_triton.errors import ConfigError
from ibp_triton.harness import grid, loading, store, train

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


def first_run(path: Path, *overrides: str) -> grid.Run:
    return grid.runs(loading.load(path, overrides))[0]


def silent(_: store.Record) -> None:
    """Listen to nothing."""


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_compiled_run_ends_where_the_eager_run_does(tree: Tree, write: Write, tmp_path: Path) -> None:
    path = write({**tree, "methods": {"loss_ibp": {"beta": 0.03}}})  # 64 examples in batches of 24: the last has 16
    for name, value in (("eager", "false"), ("fast", "true")):
        run = first_run(path, "training.batch_size=24", f"training.compile={value}")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            train.train(run, tmp_path / name, silent)
    found, expected = (store.read_tensors(tmp_path / name / store.CHECKPOINT) for name in ("fast", "eager"))
    assert found is not None
    assert expected is not None
    assert any(not torch.equal(found[0][name], value) for name, value in expected[0].items()), "nothing was compiled"
    assert all(distance(found[0][name], value) < 1e-4 for name, value in expected[0].items())


def test_only_a_compiled_run_has_another_name(tree: Tree, write: Write) -> None:
    path = write(tree)
    plain, off, on = (first_run(path, *o) for o in ([], ["training.compile=false"], ["training.compile=true"]))
    assert plain.name == off.name != on.name
    assert "compile" not in plain.config()["training"]
    assert grid.Run.from_config(on.config()).training.compile


def test_compiling_is_for_the_cpu(tree: Tree, write: Write) -> None:
    with pytest.raises(ConfigError, match=r"compile: true is for device: cpu, not cuda"):
        loading.load(write(tree), ["training.compile=true", "training.device=cuda"])
