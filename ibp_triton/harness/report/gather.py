"""What is on disk of an experiment, finished or not: rows, the chosen parameters, curves with bands."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from ibp_triton.harness import evaluate, grid, kept, provenance, stats, store, summary, trials
from ibp_triton.harness.config import Experiment, Seeds
from ibp_triton.harness.grid import Run
from ibp_triton.harness.loading import ExperimentFile
from ibp_triton.harness.report.paper import TABLES, Published
from ibp_triton.harness.summary import ResultRow
from ibp_triton.outcomes import Mcnemar, mcnemar


@dataclass(frozen=True)
class Curve:
    """Error in per cent against `levels`, with the bounds of a 95 % band."""

    name: str
    levels: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Findings:
    """An experiment and what its runs have stored so far under `root`, or what is kept of them beside it."""

    plan: ExperimentFile
    root: Path

    @property
    def experiment(self) -> Experiment:
        """The validated YAML."""
        return self.plan.experiment

    @cached_property
    def _opened(self) -> tuple[Path, list[str]]:
        stack = ExitStack()
        found = stack.enter_context(kept.opened(self.root))
        weakref.finalize(self, stack.close)
        return found

    @property
    def place(self) -> Path:
        """The folder to read runs from: `root`, or one for as long as these findings are in use."""
        return self._opened[0]

    @cached_property
    def runs(self) -> list[Run]:
        """Every run of the plan, by the folder that holds it."""
        return provenance.settle(grid.runs(self.plan), self.place)

    @cached_property
    def results(self) -> dict[str, store.Record]:
        """The sound results by the name of their run, read once."""
        return summary.results(self.runs, self.place)

    @cached_property
    def damaged(self) -> list[str]:
        """Files that should tell a result and cannot: their runs count as not finished."""
        paths = (self.folder(run) / store.RESULT for run in self.runs if run.name not in self.results)
        return [*self._opened[1], *sorted({str(path) for path in paths if path.exists()})]

    @cached_property
    def unevaluated(self) -> list[Run]:
        """Finished runs without a sound evaluation of the kind that the experiment asks for."""
        return [run for run in self.runs if run.name in self.results and not self._summaries[run.name]]

    @cached_property
    def changed(self) -> dict[str, list[str]]:
        """Finished runs whose data or code are other ones now, and which of the two."""
        stored = [run for run in self.runs if run.name in self.results]
        return {run.name: found for run in stored if (found := provenance.changes(run, self.folder(run)))}

    @cached_property
    def rows(self) -> list[ResultRow]:
        """One row for each variant, label and method that has a finished run."""
        return summary.rows(self.runs, self.place, self.results)

    @cached_property
    def chosen(self) -> list[ResultRow]:
        """The row of the best values of each variant and label, by the split that `select` names."""
        groups: dict[tuple[str, str], list[ResultRow]] = {}
        for row in self.rows:
            groups.setdefault((row.variant, row.label), []).append(row)
        return [min(group, key=self._score) for group in groups.values()]

    @cached_property
    def trials(self) -> list[store.Record]:
        """What the experiment's search has tried, as `harness/trials.py` stores it."""
        return trials.stored(self.root, self.experiment.name)

    @cached_property
    def fields(self) -> list[str]:
        """The fields of the methods that tell the rows apart."""
        return summary.columns(self.rows)

    @property
    def axes(self) -> list[str]:
        """The fields that have several values in a row."""
        return list(dict.fromkeys(name for row in self.rows for name in row.axes))

    def _score(self, row: ResultRow) -> float:
        """The error to choose by; rows that diverged under every seed come last."""
        by_validation = self.experiment.select == "validation" and row.validation_errors
        errors = row.validation_errors if by_validation else row.errors
        return fmean(errors) if errors else math.inf

    @cached_property
    def _bases(self) -> dict[str, ResultRow]:
        return {row.variant: row for row in reversed(self.chosen) if row.key == "bp"}

    def base(self, row: ResultRow) -> ResultRow | None:
        """The BP row of the same variant."""
        return self._bases.get(row.variant)

    def published(self, row: ResultRow) -> Published | None:
        """The paper's figures for a row in the paper's semantics."""
        exact = getattr(row.method, "semantics", None) == "exact"
        table = self.experiment.compare
        return None if exact or not table else TABLES[table].get(row.key)

    def folder(self, run: Run) -> Path:
        """The folder of a run."""
        return self.place / run.name

    def metrics(self, row: ResultRow, key: str) -> tuple[list[int], list[list[float]]]:
        """Epochs for which every seed of the row has a metric, and its values [seeds][epochs]."""
        series = [
            {one["epoch"]: one[key] for one in self._metrics(run) if one.get(key) is not None} for run in row.runs
        ]
        epochs = sorted(set.intersection(*(set(one) for one in series))) if series else []
        return epochs, [[one[epoch] for epoch in epochs] for one in series]

    def _metrics(self, run: Run) -> list[store.Record]:
        if run.name not in self._records:
            self._records[run.name] = store.read_metrics(self.folder(run))
        return self._records[run.name]

    @cached_property
    def _records(self) -> dict[str, list[store.Record]]:
        return {}

    @cached_property
    def _summaries(self) -> dict[str, store.Record | None]:
        choice = self.experiment.evaluate
        return {name: evaluate.summary_of(self.place / name, choice) for name in self.results}

    @cached_property
    def _stored(self) -> dict[str, dict[str, Tensor]]:
        """Outcomes of every finished run by its name, read once for all curves and pairs."""
        runs = {run.name: run for row in self.rows for run in row.runs}
        return {n: evaluate.outcomes_of(self.folder(run), self.experiment.evaluate) or {} for n, run in runs.items()}

    def outcomes(self, row: ResultRow, name: str) -> dict[Seeds, Tensor]:
        """Stored outcomes [levels, examples] of a curve by the seeds of the run."""
        found = ((run.seeds, self._stored[run.name]) for run in row.runs)
        return {seeds: stored[name] for seeds, stored in found if name in stored}

    @cached_property
    def curves(self) -> dict[str, list[tuple[ResultRow, Curve]]]:
        """The stored curves of the chosen rows by name: those of CURVES, and CLEAN."""
        names = (evaluate.CLEAN, *evaluate.CURVES)
        return {n: [(row, curve) for row in self.chosen if (curve := self._curve(row, n))] for n in names}

    def _curve(self, row: ResultRow, name: str) -> Curve | None:
        parts = list(self.outcomes(row, name).values())
        if not parts:
            return None
        right = torch.stack(parts)
        low, high = stats.band(right)
        mean = (100 * (~right).float().mean((0, 2))).tolist()
        levels = evaluate.levels_of(self.experiment.evaluate, name)
        return Curve(title(row), levels, mean, low.tolist(), high.tolist())

    def against_base(self, row: ResultRow) -> Mcnemar | None:
        """`paired` with BP; None for BP itself and where it is missing."""
        base = self.base(row)
        return None if base is None or base is row else self.paired(base, row)

    def paired(self, base: ResultRow, row: ResultRow) -> Mcnemar | None:
        """McNemar's test of the clean outcomes of `row` against `base`, on the seeds both have stored; None if none.

        Pooling treats the same example under two seeds as two trials, which is generous: p is then a lower bound.
        """
        first, second = self.outcomes(base, evaluate.CLEAN), self.outcomes(row, evaluate.CLEAN)
        common = [seeds for seeds in first if seeds in second]
        if not common:
            return None
        return mcnemar(*(torch.stack([part[seeds] for seeds in common]) for part in (first, second)))

    @cached_property
    def corrected(self) -> dict[tuple[str, str], tuple[Mcnemar, float]]:
        """By variant and label `against_base` and its p-value, corrected (Holm) over all the chosen rows."""
        tests = {(row.variant, row.label): test for row in self.chosen if (test := self.against_base(row))}
        fair = stats.holm([test.p for test in tests.values()])
        return {key: (test, p) for (key, test), p in zip(tests.items(), fair, strict=True)}

    def robust(self, row: ResultRow) -> tuple[str, Curve] | None:
        """What a row is robust to, in words, and its error at the middle level of the first curve it has."""
        for name in ("pgd", "adversarial", "gaussian"):
            curve = next((curve for one, curve in self.curves[name] if one is row), None)
            if curve and curve.levels[-1]:
                at = len(curve.levels) // 2
                words = f"{evaluate.CURVES[name].title.lower()}, {evaluate.CURVES[name].symbol} = {curve.levels[at]:g}"
                parts = (curve.levels, curve.mean, curve.low, curve.high)
                return words, Curve(curve.name, *([part[at]] for part in parts))
        return None

    def classes(self, row: ResultRow) -> list[float]:
        """Error in per cent on the test examples of each class, the seeds pooled; empty where it is not stored."""
        found = [one["by_class"] for run in row.runs if (one := self._summaries[run.name]) and "by_class" in one]
        wrong, count = ([sum(n) for n in zip(*(one[key] for one in found), strict=True)] for key in ("wrong", "count"))
        return [100 * w / n if n else math.nan for w, n in zip(wrong, count, strict=True)]

    def maskings(self, row: ResultRow) -> list[store.Record]:
        """Stored gradient-masking checks of the row's runs."""
        stored = (self._summaries[run.name] for run in row.runs)
        return [one["masking"] for one in stored if one and "masking" in one]

    def clocks(self) -> set[str]:
        """What the seconds of the finished runs are: "cpu" (of the one thread) or "wall"."""
        return {result.get("clock", "wall") for result in self.results.values()}

    def environments(self) -> list[store.Record]:
        """The distinct environments that the finished runs were trained in."""
        found = (store.find_json(self.folder(run) / store.ENVIRONMENT) for row in self.rows for run in row.finished)
        return list({str(one): one for one in found if one}.values())


def title(row: ResultRow) -> str:
    """Variant and label of a row."""
    return f"{row.variant}: {row.label}" if row.variant else row.label


def pairs_in_order(rows: Sequence[tuple[ResultRow, Published]]) -> tuple[int, int]:
    """How many pairs that differ in the paper lie the same way round here, and how many there are."""
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :] if a[1].mean != b[1].mean]
    same = sum((a[0].mean < b[0].mean) == (a[1].mean < b[1].mean) for a, b in pairs)
    return same, len(pairs)


def in_order(findings: Findings, variant: str) -> tuple[int, int]:
    """`pairs_in_order` of the chosen rows of a variant that the paper has too."""
    rows = [row for row in findings.chosen if row.variant == variant and row.errors]
    return pairs_in_order([(row, paper) for row in rows if (paper := findings.published(row))])
