"""`search:` in a file: what is refused, with the file's line, and what a trial is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ibp_triton.errors import ConfigError
from ibp_triton.harness import bucket, grid, loading, trials
from ibp_triton.harness.executors.local import Serial
from tests.harness.test_cli import ibp_triton

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
BETA = "methods.loss_ibp.beta"


@pytest.fixture
def searching(tree: Tree) -> Tree:
    tree["data"] |= {"validation": 8}
    tree["training"] |= {"test_every": 1}
    tree["search"] = {
        "trials": 3,
        "space": {BETA: {"from": 0.01, "to": 1, "log": True}, "training.momentum": [0.0, 0.9]},
    }
    return tree


def test_a_trial_is_a_run_of_the_first_seed_with_its_values(searching: Tree, write: Write) -> None:
    plan = loading.load(write(searching))
    (run,) = grid.runs(plan.trial("loss_ibp", {BETA: 0.5, "training.momentum": 0.0}))
    assert (run.method.beta, run.training.momentum, run.seeds.order) == (0.5, 0.0, 0)  # type: ignore[attr-defined]
    assert len(grid.runs(plan)) == 4, "the grid is as it was"
    assert plan.experiment.search is not None
    assert list(plan.experiment.search.rows(["bp", "loss_ibp"])) == ["loss_ibp"]


def test_without_a_key_of_a_row_every_row_is_searched(searching: Tree, write: Write) -> None:
    del searching["search"]["space"][BETA]
    search = loading.load(write(searching)).experiment.search
    assert search is not None
    assert search.rows(["bp", "loss_ibp"]) == dict.fromkeys(("bp", "loss_ibp"), search.space)


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("search", "space", BETA), {"from": 1, "to": 0.1}, "from 1 must be less than to 0.1"),
        (("search", "space", BETA), {"from": 0, "to": 1, "log": True}, "log: true needs numbers above 0"),
        (("search", "space", BETA), {"from": 0.5, "to": 2, "whole": True}, "needs whole numbers in from and to"),
        (("search", "space", BETA), {"from": -1, "to": 1}, "beta must be"),
        (("search", "space", "data.subset"), [8, 16], "space: data.subset: write methods.ROW.field, as in"),
        (("search", "space", "methods.tbp.beta"), [0.1, 1.0], "search.space: tbp is no row; there is bp, loss_ibp"),
        (("search", "space", "methods.loss_ibp.bta"), [0.1, 1.0], "loss_ibp takes no bta; did you mean beta?"),
        (("search", "space", "training.learning_rat"), [0.1, 1.0], "unknown key; did you mean learning_rate?"),
        (("search", "trails"), 3, "search.trails: unknown key; did you mean trials?"),
        (("data", "validation"), 0, "search judges by the validation error: set data.validation"),
        (("training", "test_every"), 0, "every training.test_every epochs: set it, or search.prune: false"),
        (("variants",), {"a": {}}, "search and variants cannot be combined"),
        (("methods", "loss_ibp"), {"beta": 0.1, "norm": [1, 2]}, "loss_ibp has several values of norm"),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(
    searching: Tree, write: Write, place: tuple[str, ...], value: Any, told: str
) -> None:
    section = searching
    for name in place[:-1]:
        section = section[name]
    section[place[-1]] = value
    with pytest.raises(ConfigError) as caught:
        loading.load(write(searching))
    assert told in str(caught.value)
    assert "tiny.yaml" in str(caught.value)


def test_a_dry_run_tells_of_the_search(
    searching: Tree, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ibp_triton(monkeypatch, "run", str(write(searching)), "--dry-run") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "besides a search: 3 trials of each of loss_ibp, under the first seed" in out


def test_without_optuna_its_extra_is_named(
    searching: Tree, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert ibp_triton(monkeypatch, "run", str(write(searching))) == 1
    assert "search: Optuna is not installed; pip install 'ibp-triton[optuna]'" in " ".join(
        capsys.readouterr().err.split()
    )


def test_without_s3fs_its_extra_is_named_and_a_search_needs_a_folder(
    searching: Tree, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    bucket._files.cache_clear()
    for more in ([], ["--dry-run"]):
        assert ibp_triton(monkeypatch, "run", str(write(searching)), "--set", "output=s3://bucket/tiny", *more) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert "s3://bucket/tiny/runs: s3fs is not installed; pip install 'ibp-triton[s3]'" in told
    with pytest.raises(
        ConfigError, match=r"search: its journal is a file that all processes share: take a folder, for"
    ):
        trials.check(loading.load(write(searching)), Serial(), is_remote=True)


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_without_an_executors_package_its_extra_is_named(
    tree: Tree,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert ibp_triton(monkeypatch, "run", str(write(tree)), "--executor", name) == 1
    assert f"pip install 'ibp-triton[{name}]'" in " ".join(capsys.readouterr().err.split())
