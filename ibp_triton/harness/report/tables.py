"""Tables as plain cells, for Markdown, HTML and CSV alike."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ibp_triton.harness import provenance, stats, store
from ibp_triton.harness.evaluate import CLEAN, CURVES
from ibp_triton.harness.grid import shown
from ibp_triton.harness.report.gather import Findings, in_order, title
from ibp_triton.harness.summary import ResultRow, error_text, headings, p_text
from ibp_triton.outcomes import csv_cell, latex_cell

PAIRS_NOTE = (
    "Test examples gained less those lost by the method of the line against that of the column, the seeds of both "
    "pooled; p is McNemar's exact test, Holm-corrected for the tests of this table."
)


@dataclass(frozen=True)
class Table:
    """A heading, a row of column names, rows of cells, and a note below."""

    heading: str
    columns: list[str]
    cells: list[list[str]]
    note: str = ""

    def compact(self) -> Table:
        """The same without the columns that are empty in every row."""
        kept = [number for number, column in enumerate(zip(*self.cells, strict=True)) if any(column)]
        cells = [[line[number] for number in kept] for line in self.cells]
        return Table(self.heading, [self.columns[number] for number in kept], cells, self.note)

    def csv(self) -> str:
        """Head and rows with commas; a cell that a spreadsheet would take for a formula is quoted, a number is not."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerows([[_csv_value(cell) for cell in line] for line in (self.columns, *self.cells)])
        return buffer.getvalue()

    def latex(self) -> str:
        """A tabular of the package booktabs."""
        head, *lines = (" & ".join(latex_cell(cell) for cell in line) + r" \\" for line in (self.columns, *self.cells))
        spec = "l" + "r" * (len(self.columns) - 1)
        body = [r"\toprule", head, r"\midrule", *lines, r"\bottomrule"]
        return "\n".join([rf"\begin{{tabular}}{{{spec}}}", *body, r"\end{tabular}", ""])

    def markdown(self) -> str:
        """A section of a Markdown file."""
        columns, *cells = ([plain(cell) for cell in line] for line in (self.columns, *self.cells))
        lines = [columns, ["---"] * len(columns), *cells]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"## {plain(self.heading)}\n\n{body}\n" + (f"\n{plain(self.note)}\n" if self.note else "")


def _csv_value(text: str) -> str:
    return text if re.fullmatch(r"[+-]?[\d.]+", text) else csv_cell(text)


def plain(text: str) -> str:
    """Text as Markdown that shows it as it is: no table cell, link, emphasis, formula or HTML of its own."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([\\|`*\[\]$~])", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text)


def tables(findings: Findings) -> list[Table]:
    """Every table there is something to say in."""
    candidates = [comparison(findings), diverged(findings), *pairs(findings), every_parameter(findings)]
    candidates += [trials_of_search(findings), ratios(findings), classes(findings)]
    candidates += [*robustness(findings), masking(findings)]
    return [table.compact() for table in candidates if table and table.cells]


def comparison(findings: Findings) -> Table:
    """Table 1: our error beside the paper's, the difference, and whether the paper's order holds."""
    known = any(findings.published(row) for row in findings.chosen)
    tested = any(findings.against_base(row) for row in findings.chosen)
    columns = ["method", *headings(findings.fields), "seeds", "error %"]
    columns += ["paper %", "difference", "vs bp (paper)", "as in paper"] if known else []
    columns += ["McNemar vs bp"] if tested else []
    cells = []
    for row in findings.chosen:
        line = [title(row), *row.values(findings.fields), row.seeds, error_text(row.mean, row.sd)]
        line += _published(findings, row) if known else []
        line += [_mcnemar(findings, row)] if tested else []
        cells.append(line)
    return Table("Error on the test set", columns, cells, _note(findings))


def diverged(findings: Findings) -> Table:
    """Runs whose loss or weights ended as no numbers."""
    cells = [
        [title(row), *row.values(findings.fields), str(run.seeds), run.name, *map(_shown, _where(result))]
        for row in findings.rows
        for run, result in row.diverged
    ]
    note = f"They count in no mean, no ± and no choice of values; {store.LAST_GOOD} holds the last good weights."
    columns = ["method", *headings(findings.fields), "seed", "run", "diverged at step", "last good epoch"]
    return Table("Runs that diverged", columns, cells, note)


def _where(result: store.Record) -> tuple[Any, Any]:
    return result.get("diverged_step"), result.get("last_good_epoch")


def _shown(value: object) -> str:
    return "unknown" if value is None else str(value)


def pairs(findings: Findings) -> list[Table]:
    """Every method against every other, by the test examples they disagree on; a table for each variant."""
    found = []
    for variant in dict.fromkeys(row.variant for row in findings.chosen):
        rows = [row for row in findings.chosen if row.variant == variant and findings.outcomes(row, CLEAN)]
        if len(rows) > 2:
            columns = [f"vs {row.label}" for row in rows[:-1]]
            tests = {(a, b): findings.paired(rows[b], rows[a]) for a in range(len(rows)) for b in range(a)}
            known = {place: test for place, test in tests.items() if test}
            fair = dict(zip(known, stats.holm([test.p for test in known.values()]), strict=True))
            texts = {place: f"{test.gained - test.lost:+d}, {p_text(fair[place])}" for place, test in known.items()}
            lines = [
                [row.label, *(texts.get((number, place), "") for place in range(len(columns)))]
                for number, row in enumerate(rows)
            ]
            heading = "Methods in pairs" + (f", {variant}" if variant else "")
            found.append(Table(heading, ["method", *columns], lines[1:], PAIRS_NOTE))
    return found


def every_parameter(findings: Findings) -> Table | None:
    """All values tried, where there were several."""
    if len(findings.rows) == len(findings.chosen):
        return None
    columns = ["method", *headings(findings.fields), "seeds", "validation error %", "test error %", "chosen"]
    cells = [
        [
            title(row),
            *row.values(findings.fields),
            row.seeds,
            f"{fmean(row.validation_errors):.2f}" if row.validation_errors else "",
            error_text(row.mean, row.sd),
            "yes" if row in findings.chosen else "",
        ]
        for row in findings.rows
    ]
    return Table("Every parameter", columns, cells)


def trials_of_search(findings: Findings) -> Table:
    """What a search has tried, the least validation error of a whole trial first; a stopped one has its last."""
    keys = list(dict.fromkeys(key for one in findings.trials for key in one["values"]))
    cells = [
        [
            one["row"],
            str(one["trial"]),
            *(shown(one["values"][key]) if key in one["values"] else "" for key in keys),
            "" if one["validation_error"] is None else f"{one['validation_error']:.2f}",
            one["state"],
            f"{result['test_error']:.2f}" if (result := store.result(findings.place / str(one["run"]))) else "",
        ]
        for one in sorted(findings.trials, key=_rank)
    ]
    note = "Judged by the validation error; pruned trials were stopped, running ones are not at their end."
    columns = ["row", "trial", *keys, "validation error %", "state", "test error %"]
    return Table("Trials of the search", columns, cells, note)


def _rank(trial: store.Record) -> tuple[str, bool, float]:
    error = trial["validation_error"]
    return trial["row"], trial["state"] != "complete", math.inf if error is None else error


def ratios(findings: Findings) -> Table:
    """Time of an epoch relative to BP: measured, predicted from multiply-adds, and the paper's."""
    cells = []
    for row in findings.chosen:
        paper = _paper_ratio(findings, row)
        measured = "" if row.measured is None else f"{row.measured:.2f}"
        cells.append([title(row), f"{row.seconds:.2f}", measured, f"{row.predicted:.2f}", paper])
    columns = ["method", "s/epoch", "× bp measured", "× bp predicted", "× bp in the paper"]
    kinds = {"cpu": "CPU seconds of the run's one thread", "wall": "wall-clock seconds"}
    clock = ", or ".join(kinds[kind] for kind in sorted(findings.clocks()))
    note = f"The median epoch of a run, mean over seeds, training alone; {clock}. bp skips the first layer's vjp."
    return Table("Time of an epoch", columns, cells, note)


def classes(findings: Findings) -> Table:
    """Error on the test examples of each class."""
    found = [(row, errors) for row in findings.chosen if (errors := findings.classes(row))]
    count = max((len(errors) for _, errors in found), default=0)
    cells = [[title(row), *("" if math.isnan(e) else f"{e:.2f}" for e in errors)] for row, errors in found]
    return Table("Error by class", ["method", *map(str, range(count))], cells, "Errors in %, the seeds pooled.")


def masking(findings: Findings) -> Table:
    """Gradient masking: PGD should harm at least as much as FGSM, and FGSM more than random signs."""
    keys = ("random_error", "fgsm_error", "pgd_error", "zero_entries", "zero_gradients")
    cells = []
    for row in findings.chosen:
        found = findings.maskings(row)
        if found:
            means = {key: fmean(one[key] for one in found) for key in keys}
            ordered = means["random_error"] <= means["fgsm_error"] <= means["pgd_error"]
            percent = [f"{means[key]:.2f}" for key in keys[:3]] + [f"{100 * means[key]:.2f}" for key in keys[3:]]
            cells.append([title(row), f"{found[0]['epsilon']:g}", *percent, "no" if ordered else "suspected"])
    columns = ["method", "ε", "random %", "FGSM %", "PGD %", "zero entries %", "zero gradients %", "masking"]
    return Table("Gradient-masking check", columns, cells, "Errors under perturbations of one size ε.")


def markdown(findings: Findings) -> str:
    """All tables as one Markdown file."""
    heading = plain(findings.experiment.title or findings.experiment.name)
    return f"# {heading}\n\n{plain(state(findings))}\n\n" + "\n".join(table.markdown() for table in tables(findings))


def state(findings: Findings) -> str:
    """One sentence: how much is finished, and by what the best values were chosen."""
    finished = sum(len(row.finished) for row in findings.rows)
    which = "the test set" if findings.experiment.select == "test" else "the validation split"
    several = len(findings.rows) > len(findings.chosen)
    names = headings(findings.axes)
    what = f"{', '.join(names)} {'was' if len(names) == 1 else 'were'}"
    choice = f" The best {what} chosen on {which}." if several else ""
    text = f"{finished} of {len(findings.runs)} runs are finished.{choice} Errors are of the last epoch."
    return " ".join([text, *_schedules(findings), *_warnings(findings)])


def _schedules(findings: Findings) -> Iterator[str]:
    """What changes from epoch to epoch, once for all variants alike."""
    told: dict[str, list[str]] = {}
    for label, variant in findings.plan.variants():
        for name in variant.schedule.root:
            told.setdefault(f"{headings([name])[0]}: {variant.schedule.text(name)}", []).append(label)
    for text, labels in told.items():
        some = len(labels) < len(findings.plan.variants())
        yield f"Scheduled{f' in {_some(labels)}' if some else ''}: {text}."


def _warnings(findings: Findings) -> Iterator[str]:
    gone = sum(len(row.diverged) for row in findings.rows)
    if gone:
        yield f"{_runs(gone)} diverged and count in no mean."
    if findings.unevaluated:
        yield f"{_runs(len(findings.unevaluated))} still to be evaluated."
    if findings.changed:
        kinds = dict.fromkeys(kind for found in findings.changed.values() for kind in found)
        what = " and ".join(provenance.KEYS[kind] for kind in kinds)
        yield f"{what} changed since the training of {_runs(len(findings.changed))}: {_some(findings.changed)}."
    if findings.damaged:
        yield f"Damaged, so that their runs count as not finished: {_some(findings.damaged)}."


def _runs(count: int) -> str:
    return f"{count} run{'s' if count > 1 else ''}"


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def robustness(findings: Findings) -> Iterator[Table]:
    """Each robustness curve at six of its levels at most, evenly spaced."""
    for name, kind in CURVES.items():
        curves = findings.curves[name]
        if curves:
            levels = curves[0][1].levels
            step = math.ceil((len(levels) - 1) / 5) or 1
            columns = [
                "method",
                *headings(findings.fields),
                *(f"{kind.symbol} = {level:g}" for level in levels[::step]),
            ]
            cells = [
                [title(row), *row.values(findings.fields), *(f"{e:.2f}" for e in curve.mean[::step])]
                for row, curve in curves
            ]
            note = "Errors in %, mean over seeds; curves.csv has every size and the bands."
            yield Table(f"Error against {kind.symbol} {kind.of}", columns, cells, note)


def _published(findings: Findings, row: ResultRow) -> list[str]:
    paper, base = findings.published(row), findings.base(row)
    if paper is None or not row.errors:
        return ["", "", "", ""]
    cells = [error_text(paper.mean, paper.sd), f"{row.mean - paper.mean:+.2f}"]
    base_paper = findings.published(base) if base else None
    if base is None or base is row or base_paper is None or not base.errors:
        return [*cells, "", ""]
    ours, theirs = _sign(row.mean - base.mean), _sign(paper.mean - base_paper.mean)
    holds = "–" if theirs == 0 else ("yes" if ours == theirs else "no")
    return [*cells, f"{_word(ours)} ({_word(theirs)})", holds]


def _sign(difference: float) -> int:
    return (difference > 1e-9) - (difference < -1e-9)


def _word(sign: int) -> str:
    return {-1: "better", 0: "equal", 1: "worse"}[sign]


def _mcnemar(findings: Findings, row: ResultRow) -> str:
    found = findings.corrected.get((row.variant, row.label))
    return f"+{found[0].gained} −{found[0].lost}, {p_text(found[1])}" if found else ""


def _paper_ratio(findings: Findings, row: ResultRow) -> str:
    base = findings.base(row)
    paper, bp = findings.published(row), findings.published(base) if base else None
    return f"{paper.seconds / bp.seconds:.2f}" if paper and bp else ""


def _note(findings: Findings) -> str:
    notes = []
    if findings.corrected:
        count = len(findings.corrected)
        family = f"Holm-corrected for the {count} test{'s' if count > 1 else ''} of this table"
        pooled = "+ examples gained and − lost against bp, the seeds of both pooled"
        notes.append(f"{pooled}; p is McNemar's exact test, {family}.")
    for variant in dict.fromkeys(row.variant for row in findings.chosen):
        same, total = in_order(findings, variant)
        if total:
            where = f" ({variant})" if variant else ""
            notes.append(f"{same} of {total} pairs of methods that differ in the paper lie the same way round{where}.")
    return " ".join(notes)
