"""A search by Optuna: trials are runs, bad ones are stopped, a command that is started again goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ibp_triton.errors import LaunchError
from ibp_triton.harness import grid, loading, store, trials
from ibp_triton.harness.config import Evaluate
from ibp_triton.harness.executors.local import Processes, Serial
from ibp_triton.harness.launch import Job
from tests.harness.test_cli import ibp_triton

optuna = pytest.importorskip("optuna")

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


@pytest.fixture
def searching(tree: Tree) -> Tree:
    tree["data"] |= {"examples": 96, "validation": 32}
    tree["training"] |= {"test_every": 1, "epochs": 3}
    space = {"methods.loss_ibp.beta": {"from": 1e-4, "to": 1.0, "log": True}, "training.learning_rate": [0.05, 1e-5]}
    return {**tree, "seeds": [0], "search": {"trials": 8, "startup": 2, "space": space}}


def made(path: Path, root: Path, executor: Any = None) -> tuple[list[store.Record], list[str]]:
    plan, said = loading.load(path), list[str]()
    trials.search(plan, Job(grid.runs(plan), root, None, Evaluate()), executor or Serial(), said.append)
    return trials.stored(root, plan.experiment.name), said


def test_trials_are_runs_of_which_bad_ones_are_stopped(searching: Tree, write: Write, tmp_path: Path) -> None:
    found, said = made(write(searching), tmp_path)
    states = [one["state"] for one in found]
    assert len(found) == 8
    assert set(states) == {"complete", "pruned"}
    for one in found:
        finished = store.result(tmp_path / one["run"])
        assert (finished is not None) == (one["state"] == "complete")
        if finished:
            assert one["validation_error"] == finished["validation_error"]
            config = json.loads((tmp_path / one["run"] / store.CONFIG).read_text(encoding="utf-8"))
            assert config["method"]["parameter"] == one["values"]["methods.loss_ibp.beta"]
            assert config["training"]["learning_rate"] == one["values"]["training.learning_rate"]
        else:
            assert 1 <= len(store.read_metrics(tmp_path / one["run"])) < 3
    assert {one["values"]["training.learning_rate"] for one in found if one["state"] == "pruned"} == {1e-5}
    best = min(one["validation_error"] for one in found if one["state"] == "complete")
    assert said[-1].startswith("search of loss_ibp: best of ")
    assert f"validation error {best:.2f} %, test error " in said[-1]
    again, more = made(write(searching), tmp_path)
    assert again == found
    assert len(more) == 1, "nothing is tried any more"


def test_two_workers_share_a_search(searching: Tree, write: Write, tmp_path: Path) -> None:
    found, _ = made(write(searching), tmp_path, Processes(2))
    assert [one["state"] in ("complete", "pruned") for one in found] == [True] * 8


def test_a_killed_search_takes_up_the_trial_it_was_at(searching: Tree, write: Write, tmp_path: Path) -> None:
    searching["training"]["epochs"] = 300
    searching["search"] |= {"trials": 1}
    path, root = write(searching), tmp_path / "out" / "runs"
    command = [sys.executable, "-m", "ibp_triton", "run", str(path), "--only", "row=loss_ibp"]
    own = {run.name for run in grid.runs(loading.load(path))}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        end = time.monotonic() + 120
        while not any(store.count_epochs(folder) > 3 for folder in root.glob("loss_ibp-*") if folder.name not in own):
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    (folder,) = (folder for folder in root.glob("loss_ibp-*") if folder.name not in own)
    before = store.count_epochs(folder)
    found, _ = made(path, root)
    assert [(one["trial"], one["run"], one["state"]) for one in found] == [(0, folder.name, "complete")]
    assert 3 < before < 300


def test_the_command_searches_after_its_grid_and_the_report_shows_the_trials(
    searching: Tree, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    searching["search"] |= {"trials": 3, "prune": False}
    assert ibp_triton(monkeypatch, "run", str(write(searching))) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "search of loss_ibp: best of 3 whole trials: " in out
    assert ibp_triton(monkeypatch, "report", str(tmp_path / "out")) == 0
    text = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    assert "## Trials of the search" in text
    assert text.count("| complete |") == 3
    for number in range(2):
        assert (tmp_path / "out" / "figures" / f"search{number}.svg").stat().st_size > 1000
    kept = tmp_path / "kept"
    assert ibp_triton(monkeypatch, "keep", str(tmp_path / "out"), str(kept)) == 0
    assert not (kept / "runs").exists()
    (kept / "tables.md").unlink()
    assert ibp_triton(monkeypatch, "report", str(kept)) == 0
    assert (kept / "tables.md").read_text(encoding="utf-8").count("| complete |") == 3
    assert ibp_triton(monkeypatch, "run", str(write(searching)), "--executor", "slurm") == 1
    assert "search: waits for what each trial finds" in " ".join(capsys.readouterr().err.split())


def test_only_chosen_rows_are_searched(
    searching: Tree, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(searching))
    assert ibp_triton(monkeypatch, "run", path, "--only", "row=bp", "--dry-run") == 0
    assert "search" not in capsys.readouterr().out
    assert ibp_triton(monkeypatch, "run", path, "--only", "row=bp") == 0
    assert "search of" not in capsys.readouterr().out
    assert ibp_triton(monkeypatch, "run", path, "--only", "row=loss_ibp", "--dry-run") == 0
    assert "besides a search: 8 trials of each of loss_ibp" in " ".join(capsys.readouterr().out.split())


def test_a_search_whose_trials_all_fail_says_why(searching: Tree, write: Write, tmp_path: Path) -> None:
    searching["data"]["subset"] = 500  # more than there are
    searching["search"] |= {"trials": 2}
    with pytest.raises(LaunchError, match=r"search of loss_ibp: every trial failed: .*500"):
        made(write(searching), tmp_path)
