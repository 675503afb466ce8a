"""Finished runs gathered into rows: error mean ± sd over seeds, seconds an epoch, cost relative to BP."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ibp_triton.harness import store
from ibp_triton.harness.grid import Run


@dataclass(frozen=True)
class Row:
    """One (variant, row, parameter): errors in per cent in the order of the runs' seeds, seconds an epoch."""

    variant: str
    label: str
    key: str
    parameter: float | None
    runs: tuple[Run, ...]
    errors: tuple[float, ...]
    validation_errors: tuple[float, ...]
    seconds: float
    measured: float | None
    predicted: float
    expected: int

    @property
    def mean(self) -> float:
        """Mean test error."""
        return statistics.fmean(self.errors)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else None


def error_text(mean: float, sd: float | None) -> str:
    """As in the paper: 1.21 ± 0.08."""
    return f"{mean:.2f}" if sd is None else f"{mean:.2f} ± {sd:.2f}"


def rows(runs: Sequence[Run], root: Path) -> list[Row]:
    """One row for each combination that has a finished run, in the order of `runs`."""
    groups: dict[tuple[str, str, float | None], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.variant, run.row, run.method.parameter), []).append(run)
    found = [row for group in groups.values() if (row := _row(group, root))]
    return [_with_ratio(row, found) for row in found]


def _row(group: Sequence[Run], root: Path) -> Row | None:
    pairs = [(run, result) for run in group if (result := store.read_json(root / run.name / store.RESULT))]
    if not pairs:
        return None
    run = group[0]
    return Row(
        variant=run.variant,
        label=run.row,
        key=run.method.key,
        parameter=run.method.parameter,
        runs=tuple(run for run, _ in pairs),
        errors=tuple(result["test_error"] for _, result in pairs),
        validation_errors=tuple(result["validation_error"] for _, result in pairs if "validation_error" in result),
        seconds=statistics.fmean(result["seconds_per_epoch"] for _, result in pairs),
        measured=None,
        predicted=pairs[0][1]["predicted_ratio"],
        expected=len(group),
    )


def _with_ratio(row: Row, every: Sequence[Row]) -> Row:
    base = next((other for other in every if other.key == "bp" and other.variant == row.variant), None)
    return Row(**{**vars(row), "measured": row.seconds / base.seconds if base else None})
