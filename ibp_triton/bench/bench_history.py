"""How the figures of a benchmark went from file to file: a page with a curve and a table for each of its groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ibp_triton.bench.bench_report import BenchFile, BenchRow, Change, baseline, compare, groups, our_bp
from ibp_triton.harness.report.sketch import Sketch
from ibp_triton.harness.report.tables import Table
from ibp_triton.harness.report.write import write_page


@dataclass(frozen=True)
class Series:
    """A group of benchmarks: a value for each name and file, None where the file lacks it, and what the values are."""

    group: str
    unit: str
    values: dict[str, list[float | None]]
    changed: dict[str, Change]  # by name: its newest figure over the one before it of the same machine


def series(files: Sequence[BenchFile]) -> Iterator[Series]:
    """Every group of the files, which are in order of time, the newest last.

    Values are over the group's baseline (eager BP), or our BP, where every file that has the group has that one too:
    ratios of candidates in turn compare between machines, as far as anything does. Else they are milliseconds.
    """
    found = [groups(file.rows) for file in files]
    for group in dict.fromkeys(group for each in found for group in each):
        own = [each.get(group, []) for each in found]
        bases = [baseline(rows) or our_bp(rows) for rows in own]
        over = {base and base.name for base, rows in zip(bases, own, strict=True) if rows}
        unit = over.pop() if len(over) == 1 else None
        values: dict[str, list[float | None]] = {}
        changed: dict[str, Change] = {}
        for name in dict.fromkeys(row.name for rows in own for row in rows):
            each = [next((row for row in rows if row.name == name), None) for rows in own]
            values[name] = [_value(row, base if unit else None) for row, base in zip(each, bases, strict=True)]
            changed |= {one.name: one for one in _change(each, files)}
        yield Series(group, f"/ {unit}" if unit else "ms", values, changed)


def _value(row: BenchRow | None, base: BenchRow | None) -> float | None:
    if row is None or base is None:
        return None if row is None else 1e3 * row.median
    inside = row.info.get("ratios", {}).get(f"{row.name} / {base.name}", {})
    return inside.get("median_of_ratios", row.median / base.median)  # type: ignore[no-any-return]


def _change(rows: Sequence[BenchRow | None], files: Sequence[BenchFile]) -> list[Change]:
    """The newest of a benchmark's rows over the one before it of the same machine, if there is one."""
    known = [(row, file.machine) for row, file in zip(rows, files, strict=True) if row is not None]
    *before, (newest, machine) = known
    older = [row for row, of in before if of == machine]
    return compare([newest], older[-1:])


def write_history(files: Iterable[BenchFile], path: Path) -> list[Path]:
    """The page, and the same as Markdown beside it; curves of what at least two files have."""
    ordered = sorted(files, key=lambda file: file.when)
    found = list(series(ordered))
    machines = len({file.machine for file in ordered})
    told = [f"{len(ordered)} files from {ordered[0].when[:10]} to {ordered[-1].when[:10]}."]
    changes = [change for one in found for change in one.changed.values()]
    if changes:
        slower = sum(change.regression for change in changes)
        told.append(
            f"Of {len(changes)} benchmark{' that was' if len(changes) == 1 else 's that were'} measured before on the "
            f"same machine, {slower or 'none'} took longer the last time, beyond the noise of both files."
        )
    if machines > 1:
        told.append(f"They are of {machines} machines: milliseconds do not compare, ratios only roughly.")
    heads = [f"{file.when[:10]} {file.commit}".strip() for file in ordered]
    tables = [_files(ordered), *(_table(one, heads) for one in found)]
    figures = [figure for number, one in enumerate(found) for figure in _figures(number, one, heads)]
    return write_page(path, "History of benchmarks", told, tables, figures=figures)


def _files(files: Sequence[BenchFile]) -> Table:
    cells = [[f.path.name, f.when[:16].replace("T", " "), f.commit, f.machine, f.torch, f.note] for f in files]
    return Table("Files", ["file", "written", "commit", "machine", "torch", "note"], cells).compact()


def _table(found: Series, heads: list[str]) -> Table:
    cells = []
    for name, values in found.values.items():
        change = found.changed.get(name)
        last = "" if change is None else f"{change.ratio:.2f}{' slower' if change.regression else ''}"
        cells.append([name, *("" if value is None else f"{value:.2f}" for value in values), last])
    note = "Median of rounds. " + ("" if found.unit == "ms" else f"Values are {found.unit}. ")
    note += "Newest / before: milliseconds over those of the file before it from the same machine."
    return Table(f"{found.group}, {found.unit}", ["benchmark", *heads, "newest / before"], cells, note).compact()


def _figures(number: int, found: Series, heads: list[str]) -> Iterator[Sketch]:
    places = [i for i in range(len(heads)) if any(values[i] is not None for values in found.values.values())]
    drawn = {
        name: [(x, values[i]) for x, i in enumerate(places) if values[i] is not None]
        for name, values in found.values.items()
    }
    drawn = {name: points for name, points in drawn.items() if len(points) > 1}
    if drawn:
        sketch = Sketch(f"history{number}", found.group, "file", found.unit)
        for place, (name, points) in enumerate(drawn.items()):
            xs, ys = zip(*points, strict=True)
            sketch.line(place, name, (xs, ys))
        sketch.axes.set_xticks(range(len(places)), [heads[i].replace(" ", "\n") for i in places], fontsize=7)
        sketch.axes.set_ylim(bottom=0)
        yield sketch.legend()
