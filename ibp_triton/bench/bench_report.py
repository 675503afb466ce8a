"""Ratio tables, bars and a regression check from the JSON of pytest-benchmark or of a suite."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ibp_triton.errors import BenchError
from ibp_triton.harness import store


@dataclass(frozen=True)
class BenchRow:
    """One benchmark: median seconds, the quartiles around it, and what it said of itself."""

    group: str
    name: str
    median: float
    low: float
    high: float
    info: dict[str, Any]

    @property
    def noise(self) -> float:
        """Half the interquartile range over the median."""
        return (self.high - self.low) / 2 / self.median


@dataclass(frozen=True)
class Change:
    """A benchmark in two files: new over old, and how far apart noise alone may put them."""

    group: str
    name: str
    ratio: float
    allowed: float

    @property
    def regression(self) -> bool:
        """Slower by more than the noise that the files themselves show."""
        return self.ratio > self.allowed


@dataclass(frozen=True)
class BenchFile:
    """A file of pytest-benchmark: its rows, when it was written, of which code and on which machine."""

    path: Path
    rows: list[BenchRow]
    when: str
    commit: str
    machine: str
    torch: str
    note: str


def read(path: Path) -> list[BenchRow]:
    """The rows of a pytest-benchmark file.

    Raises:
        BenchError: if there is no such file, or it is none of pytest-benchmark's.
    """
    return read_file(path).rows


def read_file(path: Path) -> BenchFile:
    """A pytest-benchmark file, or one of a suite, which says more.

    Raises:
        BenchError: if there is no such file, or it is none of pytest-benchmark's.
    """
    try:
        found = json.loads(path.read_text())
        rows = [_row(each) for each in found["benchmarks"]]
        machine, commit = found.get("machine_info", {}), found.get("commit_info", {})
        own = machine.get("ibp_triton", {})
        name = own.get("gpu") or machine.get("cpu", {}).get("brand_raw", "")
        note, of = found.get("suite", {}).get("note", ""), str(commit.get("id", ""))[:7]
        return BenchFile(path, rows, str(found.get("datetime", "")), of, name, own.get("torch", ""), note)
    except FileNotFoundError:
        raise BenchError(f"{path}: no such file; write one with ibp-triton bench SUITE.yaml --json {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BenchError(f"{path}: not a file of pytest-benchmark's --benchmark-json ({error!r})") from error


def _row(entry: dict[str, Any]) -> BenchRow:
    stats, (group, name) = entry["stats"], (readable(entry[key] or "") for key in ("group", "name"))
    return BenchRow(group, name, stats["median"], stats["q1"], stats["q3"], entry["extra_info"])


def readable(name: str) -> str:
    """A name without what pytest-benchmark puts around a parameter that JSON has no form for."""
    while (found := _UNSERIALIZABLE.sub(r"\1", name)) != name:
        name = found
    return name


_UNSERIALIZABLE = re.compile(r"UNSERIALIZABLE\[((?:[^\[\]]|\[[^\[\]]*\])*)\]")


def label(text: str) -> Text:
    """A name is data: rich reads no markup in it, and a line too long is folded, not cut."""
    return Text(text, overflow="fold")


def groups(rows: Iterable[BenchRow]) -> dict[str, list[BenchRow]]:
    """Rows by group, in order."""
    found: dict[str, list[BenchRow]] = defaultdict(list)
    for row in rows:
        found[row.group].append(row)
    return dict(found)


def baseline(rows: list[BenchRow]) -> BenchRow | None:
    """The row of a group that says it is the baseline (eager BP, torch's own backward)."""
    return next((row for row in rows if row.info.get("baseline")), None)


def our_bp(rows: list[BenchRow]) -> BenchRow | None:
    """Our own BP, if the group has it."""
    return next((row for row in rows if row.info.get("method") == "bp" and not row.info.get("baseline")), None)


def tables(rows: list[BenchRow]) -> list[Table]:
    """A table a group: milliseconds, noise, ratios to the baseline and to our BP, the predicted ratio."""
    result = []
    for group, members in groups(rows).items():
        heads = ("benchmark", "ms", "± %", "/ baseline", "/ our BP", "interleaved", "predicted")
        table = Table(*heads, title=label(group))
        base, bp = baseline(members), our_bp(members)
        for row in members:
            over = [f"{row.median / other.median:.2f}" if other else "–" for other in (base, bp)]
            told = [_told(row, key) for key in ("interleaved_ratio_to_bp", "predicted_ratio")]
            table.add_row(label(row.name), f"{1e3 * row.median:.3f}", f"{100 * row.noise:.0f}", *over, *told)
        result.append(table)
    return result


def _told(row: BenchRow, key: str) -> str:
    return f"{row.info[key]:.2f}" if key in row.info else "–"


def compare(new: list[BenchRow], old: list[BenchRow]) -> list[Change]:
    """Every benchmark that both files hold; allowed is three times their joint noise and a quarter of a per cent."""
    before = {(row.group, row.name): row for row in old}
    found = []
    for row in new:
        other = before.get((row.group, row.name))
        if other is not None:
            allowed = 1 + 3 * (row.noise**2 + other.noise**2) ** 0.5 + 0.0025
            found.append(Change(row.group, row.name, row.median / other.median, allowed))
    return found


def comparison_table(changes: list[Change]) -> Table:
    """New over old, the bound, and a word where it is broken."""
    table = Table("group", "benchmark", "new / old", "allowed", "")
    for change in sorted(changes, key=lambda c: -c.ratio / c.allowed):
        word = "slower" if change.regression else ""
        table.add_row(label(change.group), label(change.name), f"{change.ratio:.3f}", f"{change.allowed:.3f}", word)
    return table


def plot(rows: list[BenchRow], path: Path) -> Path:
    """Bars of median milliseconds with their quartiles, a panel a group, as SVG."""
    from io import BytesIO

    from matplotlib.figure import Figure

    panels = groups(rows)
    figure = Figure(figsize=(9, sum(0.28 * len(m) + 0.7 for m in panels.values())), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=[len(m) + 1 for m in panels.values()])[:, 0]
    for axis, (group, members) in zip(axes, panels.items(), strict=True):
        spread = [[1e3 * (r.median - r.low) for r in members], [1e3 * (r.high - r.median) for r in members]]
        colours = ["tab:grey" if row.info.get("baseline") else "tab:blue" for row in members]
        axis.barh(
            [r.name.replace("$", r"\$") for r in members], [1e3 * r.median for r in members], xerr=spread, color=colours
        )
        axis.set_title(group.replace("$", r"\$"), loc="left", fontsize=9)
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
    axes[-1].set_xlabel("ms, median and quartiles")
    memory = BytesIO()
    figure.savefig(memory, format="svg")
    store.write_bytes(path, memory.getvalue())
    return path
