from __future__ import annotations

import io
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import ibp_triton as ibp
from ibp_triton.harness import estimates, grid, loading
from ibp_triton.harness.config import Evaluate
from ibp_triton.harness.launch import Job, launch
from ibp_triton.harness.progress import Progress, result_table
from ibp_triton.harness.summary import ResultRow, error_text

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_error_and_time_left(tree: Tree, write: Write, terminal: bool) -> None:
    runs = grid.runs(loading.load(write(tree)))
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120 if terminal else 40)
    with Progress(console, runs, {run.name: 1.0 for run in runs[:3]}, 1) as progress:
        epoch = {"run": runs[0].name, "loss": 0.5, "seconds": 2.0, "test_error": 12.34}
        progress({"kind": "start", "run": runs[0].name})
        progress({"kind": "epoch", "epoch": 1, **epoch})
        table = progress._table()
        progress({"kind": "epoch", "epoch": 2, **epoch, "loss": None})
        progress({"kind": "done", "run": runs[0].name, "test_error": 11.11, "seconds_per_epoch": 2.0})
        progress({"kind": "failed", "run": runs[1].name, "message": "no [luck]"})
    text = shown(console)
    assert [list(column.cells) for column in table.columns][:4] == [["bp seed 0"], ["1/2"], ["0.5000"], ["12.34"]]
    assert "[2/4] bp seed 0: error 11.11 %, 2.00 s/epoch, ETA 0:00:00" in text
    assert "[3/4] loss_ibp 0.03 seed 0: failed: no [luck]" in text
    if not terminal:
        assert "bp seed 0: epoch 1/2, loss 0.5000, error 12.34 %, ETA 0:00:00" in text
        assert "epoch 2/2, diverged" in text


def test_time_left_follows_the_work_that_is_left(tree: Tree, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = grid.runs(loading.load(write({**tree, "seeds": [0]})))
    progress = Progress(Console(file=io.StringIO()), runs, {run.name: 1.0 for run in runs}, 1)
    _tell(monkeypatch, progress, (0, "start", runs[0], {}), (5, "epoch", runs[0], {"epoch": 1}))
    per_work = 5 / (estimates.weight(runs[0]) / 2)
    assert progress._eta() == _text(per_work * (estimates.weight(runs[0]) / 2 + estimates.weight(runs[1])))
    _tell(monkeypatch, progress, (10, "epoch", runs[0], {"epoch": 2}))
    assert progress._eta() == _text(per_work * estimates.weight(runs[1]))
    assert 10 < per_work * estimates.weight(runs[1]) < 20


def test_time_left_counts_neither_what_was_stored_before_nor_a_run_twice(
    tree: Tree, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree |= {"seeds": [0, 1], "methods": {"bp": None, "at": {"epsilon": 0.1}}}
    runs = grid.runs(loading.load(write(tree)))
    stored, resumed, other, failed = sorted(runs, key=lambda run: run.method.key == "at")
    left = {stored.name: 0.0, resumed.name: 0.5, other.name: 1.0, failed.name: 1.0}
    progress = Progress(Console(file=io.StringIO()), runs, left, 2)
    closing = {"test_error": 1.0, "seconds_per_epoch": 1.0}
    # trained by an earlier command, evaluated by this one
    _tell(monkeypatch, progress, (0, "start", stored, {}), (1, "done", stored, closing))
    assert progress._eta() == "…"
    # its first epoch of two was stored
    _tell(monkeypatch, progress, (1, "start", resumed, {}), (11, "epoch", resumed, {"epoch": 2}))
    per_work = 10 / (estimates.weight(resumed) / 2)
    assert progress._eta() == _text(per_work * estimates.weight(other))  # two runs on two workers: as long as one
    _tell(monkeypatch, progress, (13, "done", resumed, closing), (14, "busy", other, {}))
    assert progress._eta() == _text(1.2 * per_work * estimates.weight(failed))  # one run: a worker has nothing to do
    _tell(monkeypatch, progress, (15, "start", failed, {}), (16, "failed", failed, {"message": "no luck"}))
    assert progress._eta() == "0:00:00"


def test_time_left_includes_evaluations(tree: Tree, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    tree |= {"seeds": [0, 1], "methods": {"bp": None}}
    runs = grid.runs(loading.load(write(tree)))
    choice = Evaluate(adversarial=[0.1, 0.2], pgd=[0.1], pgd_steps=4)
    training, own = estimates.weight(runs[0]), estimates.evaluation(runs[0], choice)
    assert own == pytest.approx(32 * (1 + (2 + 2) + (4 * 2 + 1)) / 3)
    output = io.StringIO()
    progress = Progress(Console(file=output, width=200), runs, {run.name: 1.0 for run in runs}, 1, choice)
    _tell(monkeypatch, progress, (0, "start", runs[0], {}), (2, "epoch", runs[0], {"epoch": 1}))
    _tell(monkeypatch, progress, (5, "epoch", runs[0], {"epoch": 2}))
    assert progress._eta() == _text(5 / training * (training + 2 * own))
    _tell(monkeypatch, progress, (5, "evaluate", runs[0], {"share": 0.0}), (9, "evaluate", runs[0], {"share": 0.25}))
    assert "evaluated" not in output.getvalue()
    _tell(monkeypatch, progress, (16, "evaluate", runs[0], {"share": 0.5}))
    assert progress._eta() == _text(16 / (training + own / 2) * (training + 1.5 * own))
    assert f"bp seed 0: 50% evaluated, ETA {progress._eta()}" in output.getvalue()
    assert list(progress._table().columns[1].cells) == ["50% evaluated"]
    _tell(monkeypatch, progress, (20, "done", runs[0], {"test_error": 1.0, "seconds_per_epoch": 1.0}))
    assert progress._eta() == _text(20)


def test_an_evaluation_tells_how_far_it_is(tree: Tree, write: Write, tmp_path: Path) -> None:
    tree |= {"seeds": [0], "methods": {"bp": None}}
    tree["evaluate"] = {"adversarial": [0.1], "gaussian": [0.1], "pgd": [0.1], "masking": 0.1, "batch_size": 8}
    plan, shares = loading.load(write(tree)), list[float]()
    job = Job(grid.runs(plan), tmp_path, evaluate=plan.experiment.evaluate)
    launch(job, 1, lambda event: shares.append(event["share"]) if event["kind"] == "evaluate" else None)
    assert shares[0] == 0.0
    assert shares[-1] == pytest.approx(1.0)
    assert shares == sorted(shares)
    assert len(shares) > 10


def _tell(
    monkeypatch: pytest.MonkeyPatch, progress: Progress, *events: tuple[float, str, grid.Run, dict[str, Any]]
) -> None:
    for now, kind, run, content in events:
        monkeypatch.setattr("ibp_triton.harness.progress.time.monotonic", lambda now=now: now)
        more = {"loss": 0.5, "seconds": 1.0} if kind == "epoch" else {}
        progress({"kind": kind, "run": run.name, **more, **content})


def _text(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def test_result_table_has_every_column() -> None:
    row = ResultRow("", "loss_ibp", ibp.LossIBP(0.03), (), (1.0, 1.2), (), 1.5, 1.4, 1.35, 3)
    console = Console(file=io.StringIO(), width=100)
    console.print(result_table([row]))
    assert all(cell in shown(console) for cell in ("loss_ibp", "0.03", "2/3", "1.10 ± 0.14", "1.50", "1.40", "1.35"))


def test_errors_read_as_in_the_paper() -> None:
    assert error_text(1.209, 0.081) == "1.21 ± 0.08"
    assert error_text(1.209, None) == "1.21"
