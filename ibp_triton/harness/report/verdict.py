"""What an experiment found, in three sentences."""

from __future__ import annotations

from ibp_triton.harness.report.gather import Findings, in_order, title
from ibp_triton.harness.summary import ResultRow, error_text, p_text


def sentences(findings: Findings) -> list[str]:
    """The lowest error, how it stands to the paper, and how much of the experiment that rests on."""
    rows = [row for row in findings.chosen if row.errors]
    if not rows:
        return ["Nothing can be said yet: no run is finished with an error."]
    done = sum(len(row.finished) for row in findings.rows)
    seeds = sorted({len(row.errors) for row in rows})
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    rest = f"This rests on {done} of {len(findings.runs)} runs, {span} seed{'s' if seeds[-1] > 1 else ''} a row."
    return [_lowest(findings, min(rows, key=lambda row: row.mean)), *_paper(findings), rest]


def _lowest(findings: Findings, best: ResultRow) -> str:
    text = f"{title(best)} has the lowest error, {error_text(best.mean, best.sd)} %"
    tried = sum((row.variant, row.label) == (best.variant, best.label) for row in findings.rows)
    if tried > 1 and findings.experiment.select == "test":
        text += f" (the best of {tried} settings, chosen on the test set)"
    base = findings.base(best)
    if base is None or base is best or not base.errors:
        return f"{text}."
    found = findings.corrected.get((best.variant, best.label))
    p = f", {p_text(found[1])} (McNemar, Holm-corrected)" if found else ""
    certain = "" if not found else ": beyond chance" if found[1] < 0.05 else ": not beyond chance"
    return f"{text}, where bp has {error_text(base.mean, base.sd)} %{p}{certain}."


def _paper(findings: Findings) -> list[str]:
    found = [in_order(findings, variant) for variant in dict.fromkeys(row.variant for row in findings.chosen)]
    same, total = (sum(numbers) for numbers in zip(*found, strict=True))
    if not total:
        return []
    known = [(row, paper) for row in findings.chosen if row.errors and (paper := findings.published(row))]
    near = sum(abs(row.mean - paper.mean) <= 2 * paper.sd for row, paper in known)
    pairs = f"{same} of the {total} pairs of methods that differ in the paper lie the same way round here"
    return [f"{pairs}; {near} of {len(known)} errors are within two of the paper's standard deviations of its own."]
