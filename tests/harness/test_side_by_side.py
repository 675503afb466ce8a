"""Runs of one structure trained side by side: each folder as if it had been trained alone."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ibp_triton as ibp
from ibp_triton import replicated_step
from ibp_triton.errors import ConfigError
from ibp_triton.harness import grid, loading, store, train, turns
from ibp_triton.harness.executors.desk import Desk
from ibp_triton.harness.executors.local import Processes, Serial
from ibp_triton.harness.launch import Job, launch
from tests.harness.test_executors import content, job
from tests.harness.test_train import stopped

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
Events = list[dict[str, Any]]
ROWS = {"loss_ibp": {"beta": [0.01, 0.03]}, "at": {"epsilon": 0.05}}


def by_clock(monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    """Which way is quicker is for the clock to say, and not for tests."""
    slower = property(lambda trial: not together and trial.count == 3)
    monkeypatch.setattr(replicated_step._Trial, "is_slower", slower)


def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many replicas each joint step had."""
    seen, original = [], ibp.ReplicatedStep.__call__

    def call(self: ibp.ReplicatedStep, *given: Any, **named: Any) -> ibp.Parts:
        seen.append(len(self.network))
        return original(self, *given, **named)

    monkeypatch.setattr(ibp.ReplicatedStep, "__call__", call)
    return seen


@pytest.fixture
def rows(tree: Tree) -> Tree:
    """Two seeds of three runs."""
    training = {"epochs": 3, "batch_size": 16, "at_gradient": "sum", "test_every": 1}
    return {**tree, "methods": ROWS, "training": training, "select": "test"}


def numbers(folder: Path) -> tuple[dict[str, torch.Tensor], list[store.Record], store.Record]:
    found, result = store.read_tensors(folder / store.CHECKPOINT), store.result(folder)
    assert found is not None
    assert result is not None
    return found[0], store.read_metrics(folder), result


def alike(one: Path, other: Path, tolerance: float = 1e-3) -> None:
    """Weights, losses and learning rates are the same up to rounding, and there are the same files."""
    (weights, records, _), (others, expected, _) = numbers(one), numbers(other)
    for name, a in weights.items():
        assert torch.allclose(a, others[name], rtol=tolerance, atol=tolerance * float(others[name].abs().max())), name
    for a, b in zip(records, expected, strict=True):
        assert a["learning_rate"] == b["learning_rate"]
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())


def test_each_run_is_to_the_bit_what_it_would_be_alone_where_steps_are_made_one_by_one(
    rows: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_clock(monkeypatch, together=False)
    path, events = write({**rows, "evaluate": {"adversarial": [0.1]}}), Events()
    launch(job(path, tmp_path / "one"), Serial(), lambda _: None)
    seen = steps(monkeypatch)
    assert launch(job(path, tmp_path / "row", "training.replicas=8"), Serial(), events.append) == []
    assert set(seen) == {4, 2}, "a row of the method's values and seeds"
    for run in grid.runs(loading.load(path)):
        one, row = content(tmp_path / "one" / run.name), content(tmp_path / "row" / run.name)
        assert row == one
        kinds = [event["kind"] for event in events if event["run"] == run.name]
        assert kinds == ["start", *["epoch"] * 3, "evaluate", "evaluate", "done"]
        assert store.read_json(tmp_path / "row" / run.name / store.ENVIRONMENT)["replicas"] == 8  # type: ignore[index]


NORMED = """
from torch import nn

def build(shape, classes):
    body = [nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3)]
    return nn.Sequential(*body, nn.Linear(196, classes))
"""


@pytest.mark.parametrize(
    "changes", [{}, {"training.augment": {}, "training.momentum": 0.0}], ids=["plain", "augmented"]
)
def test_together_each_run_is_what_it_would_be_alone(
    rows: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Tree
) -> None:
    """With dropout, batch norm, an order, a subset and draws of each run's own."""
    (tmp_path / "normed_beside.py").write_text(NORMED, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    by_clock(monkeypatch, together=True)
    tree = {**rows, "network": {"import": "normed_beside:build"}, "data": {**rows["data"], "subset": 48}}
    tree["training"] |= {"learning_rate": 0.01} | {k.partition(".")[2]: v for k, v in changes.items()}
    tree["methods"] = {
        **ROWS,
        "tbp": {"beta": 0.01},
        "trades": {"lam": 1.0, "epsilon": 0.1, "step_size": 0.1, "steps": 2},
    }
    path = write(tree)
    launch(job(path, tmp_path / "one"), Serial(), lambda _: None)
    assert launch(job(path, tmp_path / "row", "training.replicas=auto"), Serial(), lambda _: None) == []
    for run in grid.runs(loading.load(path)):
        alike(tmp_path / "row" / run.name, tmp_path / "one" / run.name)


@pytest.mark.parametrize("together", [False, True])
def test_a_run_that_diverges_leaves_the_others_alone(
    rows: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    by_clock(monkeypatch, together)
    path = write({**rows, "methods": {"loss_ibp": {"beta": [0.03, 1e30]}}})
    launch(job(path, tmp_path / "one"), Serial(), lambda _: None)
    launch(job(path, tmp_path / "row", "training.replicas=4"), Serial(), lambda _: None)
    for run in grid.runs(loading.load(path)):
        one, row = tmp_path / "one" / run.name, tmp_path / "row" / run.name
        if run.strength == "0.03":
            alike(row, one)
        else:
            assert [numbers(f)[2]["diverged_step"] for f in (one, row)] == [numbers(one)[2]["diverged_step"]] * 2
            assert not math.isfinite(numbers(row)[0]["0.weight"].sum())


def test_a_run_that_is_resumed_leaves_the_others_alone(
    rows: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_clock(monkeypatch, together=False)
    path = write(rows)
    launch(job(path, tmp_path / "one"), Serial(), lambda _: None)
    runs = grid.runs(loading.load(path, ["training.replicas=4"]))
    stopped(runs[1], tmp_path / "row" / runs[1].name, after=2)
    seen = steps(monkeypatch)
    launch(Job(runs, tmp_path / "row"), Serial(), lambda _: None)
    assert seen.count(4) == 4, "four steps of one epoch, then the resumed run has ended"
    assert seen.count(3) == 8
    for run in runs:
        assert content(tmp_path / "row" / run.name) == content(tmp_path / "one" / run.name)


def test_a_row_that_is_stopped_goes_on_from_the_last_epoch_of_each(
    rows: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_clock(monkeypatch, together=False)
    path, epochs = write({**rows, "methods": {"loss_ibp": {"beta": [0.01, 0.03]}}}), list[int]()
    launch(job(path, tmp_path / "one"), Serial(), lambda _: None)

    def stop(event: dict[str, Any]) -> None:
        epochs.extend([event["epoch"]] if event["kind"] == "epoch" else [])
        if len(epochs) == 6:  # in the middle of the second epoch's ends
            raise KeyboardInterrupt

    task = job(path, tmp_path / "row", "training.replicas=4")
    with pytest.raises(KeyboardInterrupt):
        launch(task, Serial(), stop)
    assert epochs == [1, 1, 1, 1, 2, 2]
    launch(task, Serial(), lambda _: None)
    for run in task.runs:
        assert content(tmp_path / "row" / run.name) == content(tmp_path / "one" / run.name)


def test_a_run_in_other_hands_is_left_to_its_owner(rows: Tree, write: Write, tmp_path: Path) -> None:
    task, events = job(write(rows), tmp_path, "training.replicas=4"), Events()
    with store.lock(tmp_path / task.runs[1].name):
        launch(task, Serial(), events.append)
    assert [e["run"] for e in events if e["kind"] == "busy"] == [task.runs[1].name]
    assert len(list(tmp_path.glob(f"*/{store.RESULT}"))) == len(task.runs) - 1


FAILS = """
import torch
from torch import nn

from ibp_triton.harness.streams import derive

class Model(nn.Sequential):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        if self.bad and self.calls == 7:
            raise FloatingPointError("out of range")
        return super().forward(x)

def build(shape, classes):
    model = Model(nn.Flatten(), nn.Linear(256, classes))
    model.bad = torch.initial_seed() == derive(1, "weights")
    return model
"""


@pytest.mark.filterwarnings("ignore:ReplicatedStep")
def test_a_model_that_raises_in_a_step_fails_alone(
    rows: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fails_beside.py").write_text(FAILS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fails_beside", raising=False)
    tree = {**rows, "network": {"import": "fails_beside:build"}, "methods": {"bp": None}, "seeds": "0..3"}
    task, events = job(write(tree), tmp_path, "training.replicas=4"), Events()
    failures = launch(task, Serial(), events.append)
    bad = next(run for run in task.runs if run.seeds.order == 1)
    assert failures == [f"{bad.name}: FloatingPointError: out of range"]
    notes = [event["message"] for event in events if event["kind"] == "note"]
    assert notes == ["side by side: FloatingPointError: out of range; each of these runs goes on alone"]
    assert len(list(tmp_path.glob(f"*/{store.RESULT}"))) == 3


def test_a_row_whose_worker_is_killed_goes_on_run_by_run(
    rows: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "killed_beside.py").write_text(
        "import os, signal\nfrom pathlib import Path\nfrom torch import nn\n"
        "class Model(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        once = Path(__file__).parent / 'once'\n"
        "        if self.training and not once.exists():\n"
        "            once.touch()\n"
        f"            os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "        return super().forward(x)\n"
        "def build(shape, classes):\n    return Model(nn.Flatten(), nn.Linear(256, classes))\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    tree = {**rows, "network": {"import": "killed_beside:build"}, "methods": {"bp": None}}
    task, events = job(write(tree), tmp_path / "runs", "training.replicas=2"), Events()
    assert launch(task, Processes(1), events.append) == []
    assert [e["message"] for e in events if e["kind"] == "note"] == [
        "a worker process ended by signal 9; another one takes this run up"
    ]
    assert sum(event["kind"] == "done" for event in events) == 2


def handed(runs: list[grid.Run], width: int = 1) -> list[int]:
    desk, sizes = Desk(runs, lambda _: None, {}, width), []
    while run := desk.next():
        sizes.append(len(run.together))
    return sizes


def test_runs_of_one_structure_come_together(rows: Tree, write: Write) -> None:
    rows["methods"] = {
        "loss_ibp": {"beta": [0.0, 0.01, 0.03]},
        "exact": {"method": "loss_ibp", "beta": 0.01, "semantics": "exact"},
    }
    rows["seeds"] = "0..3"
    path = write(rows)

    def sizes(replicas: str, width: int = 1) -> list[int]:
        return handed(grid.runs(loading.load(path, [f"training.replicas={replicas}"])), width)

    assert sizes("1") == [1] * 16
    assert sizes("3") == [3, 3, 3, 3, 1, 1, 2], "exact semantics, β = 0 and two strengths, of four seeds each"
    assert sorted(sizes("100")) == [4, 4, 8]
    assert sizes("auto", 2) == [4, 4, 4, 2, 1, 1], "never more than a worker's share of those that wait"


def test_a_run_handed_out_again_comes_alone_and_so_do_those_beside_it(rows: Tree, write: Write) -> None:
    path = write({**rows, "methods": {"loss_ibp": {"beta": [0.01, 0.03]}}})
    runs = grid.runs(loading.load(path, ["training.replicas=3"]))
    desk = Desk(runs, lambda _: None, {})
    first = desk.next()
    assert first is not None
    desk.again(first.name)
    again = [desk.next() for _ in range(3)]
    assert [run.name for run in again if run] == [run.name for run in first.together]
    assert [len(run.together) for run in again if run] == [1, 1, 1]


def test_those_beside_a_run_are_no_part_of_it(rows: Tree, write: Write) -> None:
    path = write(rows)
    runs, others = grid.runs(loading.load(path)), grid.runs(loading.load(path, ["training.replicas=auto"]))
    assert [run.name for run in runs] == [run.name for run in others]
    assert replace(runs[0], beside=tuple(runs[1:])).name == runs[0].name
    assert "replicas" not in runs[0].config()["training"]


@pytest.mark.parametrize(
    ("setting", "told"),
    [("replicas=0", "replicas"), ("replicas=many", "replicas"), ("compile=true", "runs trained alone")],
)
def test_what_cannot_be_asked_for_is_one_sentence(rows: Tree, write: Write, setting: str, told: str) -> None:
    rows["training"] |= {"replicas": 2}
    with pytest.raises(ConfigError, match=told):
        loading.load(write(rows), [f"training.{setting}"])


def test_seconds_are_each_runs_share(rows: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(10**6))
    monkeypatch.setattr(turns.time, "process_time", lambda: float(next(seconds)))
    task = job(write({**rows, "methods": {"bp": None}}), tmp_path, "training.replicas=2")
    launch(task, Serial(), lambda _: None)
    found = [record["seconds"] for run in task.runs for record in store.read_metrics(tmp_path / run.name)]
    assert set(found) == {5 + 4 / 2}, "four steps of a tick, shared by two; five times between them a tick"


def test_a_course_is_what_train_does(rows: Tree, write: Write, tmp_path: Path) -> None:
    run = grid.runs(loading.load(write(rows)))[0]
    asked = [turn.batch.size for turn in [next(train.course(run, tmp_path, lambda _: None))]]
    assert asked == [16]
