"""Runs on CUDA, on a stand-in for its graphs: one capture a run, which trains as the eager step does, or none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ibp_triton import captured_step
from ibp_triton.compiling import distance
from ibp_triton.harness import grid, loading, optimizers, store, train
from tests.captures import stand_in

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


def trained(run: grid.Run, folder: Path) -> dict[str, torch.Tensor]:
    train.train(run, folder, lambda _: None)
    found = store.read_tensors(folder / store.CHECKPOINT)
    assert found is not None
    return found[0]


def run_of(tree: Tree, write: Write, *overrides: str) -> grid.Run:
    """64 examples in batches of 10, the last of 4, for three epochs of another rate each."""
    path = write({**tree, "methods": {"loss_ibp": {"beta": 0.03}}})
    return grid.runs(loading.load(path, ["training.batch_size=10", "training.epochs=3", *overrides]))[0]


CASES = {"the paper's SGD": [], "SGD": ["training.optimizer={SGD: {lr: 0.1}}"]}


@pytest.mark.parametrize("case", CASES)
def test_a_captured_run_is_the_eager_one(
    tree: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    run = run_of(tree, write, *CASES[case])
    expected = trained(run, tmp_path / "eager")
    graphs = stand_in(monkeypatch)
    monkeypatch.setattr(optimizers, "on_cuda", lambda device: True)
    found = trained(run, tmp_path / "captured")
    assert len(graphs) == (1 if case == "the paper's SGD" else 3)  # a rate that is a number is part of a graph
    assert all(distance(found[name], value) < 1e-5 for name, value in expected.items())


def test_what_cannot_be_captured_is_trained_eagerly_and_says_why(
    tree: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def __init__(self, graph: Any) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    run = run_of(tree, write)
    expected = trained(run, tmp_path / "eager")
    stand_in(monkeypatch)
    monkeypatch.setattr(captured_step, "_capturing", Refusing)
    monkeypatch.setattr(optimizers, "on_cuda", lambda device: True)
    with pytest.warns(UserWarning, match="without a CUDA graph: RuntimeError: operation not permitted"):
        found = trained(run, tmp_path / "captured")
    assert all(distance(found[name], value) < 1e-5 for name, value in expected.items())


def test_an_optimizer_that_counts_on_the_host_is_not_captured(
    tree: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tree, write, "training.optimizer={Adagrad: {lr: 0.01}}")
    expected = trained(run, tmp_path / "eager")
    graphs = stand_in(monkeypatch)
    monkeypatch.setattr(optimizers, "on_cuda", lambda device: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = trained(run, tmp_path / "captured")
    assert not graphs
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    choice = optimizers.read({"AdamW": {"lr": 0.01}})
    made = [optimizers.make(choice, parameters, cuda) for cuda in (False, True)]
    assert [optimizers.is_capturable(one) for one in made] == [False, True]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
