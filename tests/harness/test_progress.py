from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ibp_triton.harness import cost, grid, loading
from ibp_triton.harness.progress import Progress, result_table
from ibp_triton.harness.summary import Row, error_text

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_error_and_time_left(tree: Tree, write: Write, terminal: bool) -> None:
    runs = grid.runs(loading.load(write(tree)))
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120 if terminal else 40)
    with Progress(console, runs, {runs[3].name}, 1) as progress:
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
    now = iter([0.0, 10.0])
    monkeypatch.setattr("ibp_triton.harness.progress.time.monotonic", lambda: next(now))
    progress = Progress(Console(file=io.StringIO()), runs, set(), 1)
    progress._share[runs[0].name] = 1.0
    whole = cost.weight(runs[0]) + cost.weight(runs[1])
    seconds = round(10 * (whole / cost.weight(runs[0]) - 1))
    assert 10 < seconds < 20
    assert progress._eta() == f"0:00:{seconds}"


def test_result_table_has_every_column() -> None:
    row = Row("", "loss_ibp", "loss_ibp", 0.03, (), (1.0, 1.2), (), 1.5, 1.4, 1.35, 3)
    console = Console(file=io.StringIO(), width=100)
    console.print(result_table([row]))
    assert all(cell in shown(console) for cell in ("loss_ibp", "0.03", "2/3", "1.10 ± 0.14", "1.50", "1.40", "1.35"))


def test_errors_read_as_in_the_paper() -> None:
    assert error_text(1.209, 0.081) == "1.21 ± 0.08"
    assert error_text(1.209, None) == "1.21"
