"""Finished runs gathered into rows: error mean ± sd over seeds, seconds an epoch, cost relative to BP."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ibp_triton as ibp
from ibp_triton.harness import store
from ibp_triton.harness.grid import Run, shown
from ibp_triton.harness.rows import kinds

SYMBOLS = {"beta": "β", "epsilon": "ε", "lam": "λ"}


@dataclass(frozen=True)
class ResultRow:
    """One (variant, row, method): errors in per cent in the order of the runs' seeds, seconds an epoch.

    Runs that diverged stand apart, with their results: they count neither in the mean nor in its deviation.
    """

    variant: str
    label: str
    method: ibp.Method
    runs: tuple[Run, ...]
    errors: tuple[float, ...]
    validation_errors: tuple[float, ...]
    seconds: float
    measured: float | None
    predicted: float
    expected: int
    diverged: tuple[tuple[Run, store.Record], ...] = ()
    axes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Of the method."""
        return self.method.key

    def values(self, names: Iterable[str]) -> list[str]:
        """Those fields of the method as a reader writes them; empty where it has none of that name."""
        return [shown(getattr(self.method, name)) if name in kinds(type(self.method)) else "" for name in names]

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that have a result, diverged or not."""
        return (*self.runs, *(run for run, _ in self.diverged))

    @property
    def seeds(self) -> str:
        """How many seeds count, of how many."""
        text = f"{len(self.errors)}/{self.expected}"
        return f"{text}, {len(self.diverged)} diverged" if self.diverged else text

    @property
    def mean(self) -> float:
        """Mean test error; NaN if every run diverged."""
        return statistics.fmean(self.errors) if self.errors else math.nan

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else None


def error_text(mean: float, sd: float | None) -> str:
    """As in the paper: 1.21 ± 0.08."""
    if math.isnan(mean):
        return "diverged"
    return f"{mean:.2f}" if sd is None else f"{mean:.2f} ± {sd:.2f}"


def p_text(p: float) -> str:
    """p = 0.012, or p < 1e-300 where no float is as small."""
    return "p < 1e-300" if p < 1e-300 else f"p = {p:.2g}"


def results(runs: Sequence[Run], root: Path) -> dict[str, store.Record]:
    """The sound results under `root` by the name of their run."""
    return {run.name: found for run in runs if (found := store.result(root / run.name))}


def rows(runs: Sequence[Run], root: Path, stored: Mapping[str, store.Record] | None = None) -> list[ResultRow]:
    """One row for each combination that has a finished run, in the order of `runs`."""
    stored = results(runs, root) if stored is None else stored
    groups: dict[tuple[str, str, ibp.Method], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.variant, run.row, run.method), []).append(run)
    found = [row for group in groups.values() if (row := _row(group, stored))]
    bases: dict[str, float] = {}
    for row in found:
        if row.key == "bp":
            bases.setdefault(row.variant, row.seconds)
    return [replace(row, measured=row.seconds / bases[row.variant]) if row.variant in bases else row for row in found]


def _row(group: Sequence[Run], stored: Mapping[str, store.Record]) -> ResultRow | None:
    pairs = [(run, stored[run.name]) for run in group if run.name in stored]
    if not pairs:
        return None
    good = [(run, result) for run, result in pairs if not result.get("diverged")]
    run = group[0]
    return ResultRow(
        variant=run.variant,
        label=run.row,
        method=run.method,
        runs=tuple(run for run, _ in good),
        errors=tuple(result["test_error"] for _, result in good),
        validation_errors=tuple(result["validation_error"] for _, result in good if "validation_error" in result),
        seconds=statistics.fmean(result["seconds_per_epoch"] for _, result in good or pairs),
        measured=None,
        predicted=pairs[0][1]["predicted_ratio"],
        expected=len(group),
        diverged=tuple((run, result) for run, result in pairs if result.get("diverged")),
        axes=run.axes,
    )


def columns(rows: Iterable[ResultRow]) -> list[str]:
    """The fields that tell rows apart: the strength of each method, then what else has several values in a row."""
    found = list(rows)
    strengths = [row.method.parameter for row in found if row.method.parameter]
    return list(dict.fromkeys([*strengths, *(name for row in found for name in row.axes)]))


def headings(names: Iterable[str]) -> list[str]:
    """Fields as the head of a table names them."""
    return [SYMBOLS.get(name, name) for name in names]


def divergence_text(result: store.Record) -> str:
    """What became of a run that diverged."""
    step, epoch = result.get("diverged_step"), result.get("last_good_epoch")
    where = "" if step is None else f" at step {step}"
    if epoch is None:
        return f"diverged{where}"
    kept = f"the weights after epoch {epoch} are in {store.LAST_GOOD}" if epoch else "in its first epoch"
    return f"diverged{where}, {kept}"
