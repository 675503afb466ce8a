"""Several experiments beside each other: two row by row, or the rows of many in one order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ibp_triton.harness import stats
from ibp_triton.harness.evaluate import CLEAN
from ibp_triton.harness.report.gather import Findings, title
from ibp_triton.harness.report.tables import Table
from ibp_triton.harness.summary import ResultRow, columns, error_text, headings, p_text
from ibp_triton.outcomes import Mcnemar, mcnemar

NOTE = (
    "+ examples that only the second experiment gets right, − that only the first does, on the seeds that both have; "
    "p is McNemar's exact test, Holm-corrected for the tests of this table."
)


def against(first: Findings, second: Findings) -> tuple[Table, str]:
    """The chosen rows that two experiments share, by variant and label: errors and a paired test; in a sentence."""
    others = {(row.variant, row.label): row for row in second.chosen}
    pairs = [(row, others[key]) for row in first.chosen if (key := (row.variant, row.label)) in others]
    tests = {number: test for number, pair in enumerate(pairs) if (test := _paired(first, second, *pair))}
    fair = dict(zip(tests, stats.holm([test.p for test in tests.values()]), strict=True))
    cells = []
    for number, (one, other) in enumerate(pairs):
        test = tests.get(number)
        told = f"+{test.gained} −{test.lost}, {p_text(fair[number])}" if test else ""
        values = [_settings(row) for row in (one, other)]
        settings = values[0] if values[0] == values[1] else f"{values[0] or '–'} → {values[1] or '–'}"
        errors = [error_text(row.mean, row.sd) for row in (one, other)]
        difference = f"{other.mean - one.mean:+.2f}" if one.errors and other.errors else ""
        cells.append([title(one), settings, *errors, difference, told])
    names = [findings.experiment.name for findings in (first, second)]
    names = names if names[0] != names[1] else ["first", "second"]
    heads = ["method", "settings", *(f"{name}, error %" for name in names), "difference", "McNemar"]
    alone = [title(row) for f, shared in ((first, pairs), (second, pairs)) for row in f.chosen if not _in(row, shared)]
    more = f" Only in one of the two: {', '.join(alone)}." if alone else ""
    told = "The two experiments have no row of the same variant and label, so there is nothing to compare."
    if pairs:
        lower = sum(bool(a.errors and b.errors) and b.mean < a.mean for a, b in pairs)
        certain = sum(p < 0.05 for p in fair.values())
        told = f"Of {len(pairs)} shared rows {lower} have a lower error in the second; {certain} differ beyond chance."
    return Table("Two experiments", heads, cells, NOTE + more), told


def leaderboard(experiments: Sequence[Findings]) -> list[Table]:
    """The chosen rows of all experiments, the lowest error first; a table for each data set, test set and size."""
    groups: dict[str, list[tuple[Findings, ResultRow]]] = {}
    for findings in experiments:
        for row in findings.chosen:
            data = row.finished[0].data
            size = f", {data.subset} training examples" if data.subset else ""
            groups.setdefault(f"{data.source}{size}", []).append((findings, row))
    heads = ["experiment", "method", "settings", "network", "seeds", "error %", "robust error %", "× bp", "robust to"]
    found = []
    for heading, rows in groups.items():
        ranked = sorted(rows, key=lambda pair: (not pair[1].errors, pair[1].mean if pair[1].errors else 0.0))
        cells = [[findings.experiment.name, *_rank(findings, row)] for findings, row in ranked]
        found.append(Table(heading, heads, cells, "Errors of the last epoch on the test set.").compact())
    return found


def _rank(findings: Findings, row: ResultRow) -> list[str]:
    robust = findings.robust(row)
    network = row.finished[0].network
    return [
        title(row),
        _settings(row),
        network.name or network.target or "",
        row.seeds,
        error_text(row.mean, row.sd),
        f"{robust[1].mean[0]:.2f}" if robust else "",
        "" if row.measured is None else f"{row.measured:.2f}",
        robust[0] if robust else "",
    ]


def _settings(row: ResultRow) -> str:
    names = columns([row])
    return ", ".join(f"{n} = {v}" for n, v in zip(headings(names), row.values(names), strict=True) if v)


def _in(row: ResultRow, pairs: Sequence[tuple[ResultRow, ResultRow]]) -> bool:
    return any(row is one for pair in pairs for one in pair)


def _paired(first: Findings, second: Findings, one: ResultRow, other: ResultRow) -> Mcnemar | None:
    before, after = first.outcomes(one, CLEAN), second.outcomes(other, CLEAN)
    common = [seeds for seeds in before if seeds in after and before[seeds].shape == after[seeds].shape]
    if not common or one.finished[0].data.source != other.finished[0].data.source:
        return None
    return mcnemar(*(torch.stack([part[seeds] for seeds in common]) for part in (before, after)))
