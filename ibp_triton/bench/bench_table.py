"""A suite's ratios as Markdown, bold over their targets, and every figure as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from ibp_triton.bench.candidates import word
from ibp_triton.bench.pass_ledger import KINDS
from ibp_triton.bench.suite import AXES, Suite
from ibp_triton.outcomes import csv_cell

Cells = list[dict[str, Any]]  # the JSON of each cell
COLUMNS = (
    "network", "family", *AXES, "candidate", "method", "step", "clock", "median", "q1", "q3", "wall_median",
    "waiting_seconds", "peak_memory", "parity", "predicted_ratio", "making_seconds",
)  # fmt: skip
_FACTS = ("network", *AXES)


def markdown(suite: Suite, cells: Cells) -> str:
    """Targets and cells; in brackets what multiply-adds predict."""
    kept = [cell for cell in cells if cell["benchmarks"]]
    heads = _heads([cell["benchmarks"][0]["extra_info"] for cell in kept])
    lines = [f"| {' | '.join(['ratio', 'target', *map(_plain, heads)])} |", "|---" * (len(heads) + 2) + "|"]
    for name in _names(suite, kept):
        figures = [_figure(suite, cell, name) for cell in kept]
        lines.append(f"| {' | '.join([_plain(name), _target(suite, name), *figures])} |")
    ledgers = [line for cell in kept for line in _ledger(cell)]
    return "\n".join([*lines, *ledgers, *_refusals(cells)]) + "\n"


def _plain(text: str) -> str:
    """A label is data: nothing in it is Markdown."""
    return "".join(f"\\{letter}" if letter in "|*`[]<>\\" else letter for letter in text)


def _heads(infos: list[dict[str, Any]]) -> list[str]:
    """The network, and of the other facts those in which cells differ."""
    told = [key for key in _FACTS if key == "network" or len({str(info[key]) for info in infos}) > 1]
    return [" ".join(word(key, info[key]) for key in told) for info in infos]


def _names(suite: Suite, cells: Cells) -> list[str]:
    """The ratios with a target, or all if there is no target."""
    found = dict.fromkeys(name for cell in cells for name in _ratios(cell))
    return [name for name in suite.targets if name in found] or list(found)


def _ratios(cell: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {name: over for entry in cell["benchmarks"] for name, over in entry["extra_info"]["ratios"].items()}


def _target(suite: Suite, name: str) -> str:
    bound = suite.targets.get(name)
    if bound is None:
        return "–"
    bounds = bound.values() if isinstance(bound, dict) else [bound]
    return "≤ " + " / ".join(f"{b:g}" for b in dict.fromkeys(bounds))


def _figure(suite: Suite, cell: dict[str, Any], name: str) -> str:
    over = _ratios(cell).get(name)
    if over is None:
        return "–"
    value, bound = figure(over), suite.bound(words(cell), name)
    shown = f"**{value:.2f}**" if bound is not None and round(value, 2) > bound else f"{value:.2f}"
    return f"{shown} ({over['predicted']:.2f})" if "predicted" in over else shown


def figure(over: dict[str, float]) -> float:
    """The median over rounds of the ratio within a round, where it was taken round by round."""
    return over.get("median_of_ratios", over["ratio_of_medians"])


def words(cell: dict[str, Any]) -> set[str]:
    """What targets may ask of a measured cell."""
    info = cell["benchmarks"][0]["extra_info"]
    return {word(key, info[key]) for key in (*_FACTS, "family")}


def _refusals(cells: Cells) -> list[str]:
    told = [f"* not timed: {r['candidate']} in {r['cell']}: {r['reason']}" for cell in cells for r in cell["refused"]]
    return ["", *map(_plain_line, told)] if told else []


def _plain_line(text: str) -> str:
    return "* " + _plain(" ".join(text.removeprefix("* ").split()))


def _ledger(cell: dict[str, Any]) -> list[str]:
    """Milliseconds by kind of operator, where they were taken, and what each kind adds to the ratio over BP's step.

    A kind adds (its time − predicted ratio · BP's time in it) / BP's step; the shares add up to what the ratio is over
    its prediction. "Python" is what is left of the step's own time, which is taken without the clock of operators.
    BP is our own, or the eager one where ours is not in the suite.
    """
    rows = {one["name"]: one for one in cell["benchmarks"] if "spent_seconds" in one["extra_info"]}
    bp = rows.get("bp") or rows.get("eager_bp")
    if bp is None:
        return []
    spent = {label: row["extra_info"]["spent_seconds"] for label, row in rows.items()}
    kinds = [kind for kind in (*KINDS, "Python") if any(own[kind] >= 5e-5 for own in spent.values())]
    lines = [f"| {_plain(cell['cell'])} | ms | {' | '.join(kinds)} | × BP | predicted | {' | '.join(kinds)} |"]
    lines.append("|---" * (2 * len(kinds) + 4) + "|")
    base, whole = bp["extra_info"]["spent_seconds"], bp["stats"]["median"]
    for label, row in rows.items():
        median, ratio = row["stats"]["median"], row["extra_info"].get("predicted_ratio")
        cells = [f"{1e3 * time:.1f}" for time in (median, *(spent[label][kind] for kind in kinds))]
        cells += [f"{median / whole:.2f}", "" if ratio is None else f"{ratio:.2f}"]
        cells += ["" if ratio is None else f"{(spent[label][k] - ratio * base[k]) / whole:+.2f}" for k in kinds]
        lines.append(f"| {_plain(label)} | {' | '.join(cells)} |")
    return ["", *lines]


def table_csv(cells: Cells) -> str:
    """A line for each candidate of each cell, its ratios at the end."""
    entries = [entry for cell in cells for entry in cell["benchmarks"]]
    heads = ["/ " + name for name in dict.fromkeys(_over(entries))]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*COLUMNS, *heads])
    for entry in entries:
        info, stats = entry["extra_info"], entry["stats"]
        ratios = {f"/ {name.partition(' / ')[2]}": figure(over) for name, over in _timed(info).items()}
        values = [info.get(c, stats.get(c, "")) for c in COLUMNS] + [ratios.get(h, "") for h in heads]
        writer.writerow([csv_cell(value) if isinstance(value, str) else value for value in values])
    return file.getvalue()


def _timed(info: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {name: over for name, over in info["ratios"].items() if not name.startswith("memory ")}


def _over(entries: Iterable[dict[str, Any]]) -> Iterable[str]:
    return (name.partition(" / ")[2] for entry in entries for name in _timed(entry["extra_info"]))
