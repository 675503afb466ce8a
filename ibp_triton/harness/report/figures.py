"""Figures: robustness curves with bands, error against the size of the training set, training curves, time ratios."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ibp_triton.harness.evaluate import CLEAN, CURVES
from ibp_triton.harness.report.gather import Curve, Findings, title

INK = "#0a0b0c"
COLOURS = ("#808080", "#1f8fe0", "#2aa775", "#d9822b", "#b08d1a", "#a66bd4", "#d4569a", "#e0483e", "#3aa6a6", "#8f8f3a")
MOST = 40  # lines of a figure
MARKERS = "osD^vPX*<>"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
}


class Sketch:
    """One figure: its file name, its caption and its drawing."""

    def __init__(self, name: str, caption: str, xlabel: str, ylabel: str) -> None:
        self.name, self.caption = name, caption
        with _styled():
            self.figure = Figure(figsize=(5.6, 3.8))
            self.axes: Axes = self.figure.add_subplot()
        self.axes.set_xlabel(xlabel)
        self.axes.set_ylabel(ylabel)

    def grow(self, inches: float) -> None:
        """Make the figure higher."""
        width, height = self.figure.get_size_inches()
        self.figure.set_size_inches(width, height + inches)

    def svg(self) -> str:
        """SVG text, the same bytes for the same drawing."""
        return self._svg

    @cached_property
    def _svg(self) -> str:
        buffer = io.StringIO()
        with _styled({"svg.hashsalt": self.name}), _any_letter():
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return buffer.getvalue()

    def inline(self) -> str:
        """SVG for a page: the ink follows the page's text colour, the size its column."""
        text = self.svg()
        body = text[text.index("<svg") :].replace(INK, "currentColor")
        head, _, rest = body.partition(">")
        head = re.sub(r' (width|height)="[^"]*"', "", head)
        return f'{head} role="img" aria-label="{html.escape(self.caption)}">{rest}'

    def png(self) -> bytes:
        """PNG on white at 160 dots an inch."""
        buffer = io.BytesIO()
        with _styled(), _any_letter():
            self.figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def sketches(findings: Findings) -> Iterator[Sketch]:
    """Every figure there are results for."""
    for name in CURVES:
        yield from _robustness(findings, name)
    yield from _sizes(findings)
    yield from _training(findings)
    yield from _ratios(findings)


def _robustness(findings: Findings, name: str) -> Iterator[Sketch]:
    curves = [(row, curve) for row, curve in findings.curves[name] if len(curve.levels) > 1]
    if not curves:  # nothing stored, or one size, which the tables tell
        return
    kind = CURVES[name]
    caption = f"{kind.title}: error with 95 % bands over seeds and examples{_cut(len(curves))}"
    sketch = Sketch(name, caption, f"{kind.symbol} {kind.of}", "error %")
    for number, (_, curve) in enumerate(curves[:MOST]):
        _banded(sketch, number, curve, markersize=3)
    yield _legend(sketch)


def _banded(sketch: Sketch, number: int, curve: Curve, markersize: int) -> None:
    sketch.axes.plot(curve.levels, curve.mean, label=plain(curve.name), markersize=markersize, **_look(number))
    sketch.axes.fill_between(curve.levels, curve.low, curve.high, color=_look(number)["color"], alpha=0.15, lw=0)


def _sizes(findings: Findings) -> Iterator[Sketch]:
    """Figure 4: error against the number of training examples, with and without augmentation."""
    lines: dict[str, dict[int, Curve]] = {}
    for row, curve in findings.curves[CLEAN]:
        run = row.runs[0]
        label = row.label + (" with augmentation" if run.training.augment else "")
        if run.data.subset:
            lines.setdefault(label, {})[run.data.subset] = curve
    if max(map(len, lines.values()), default=0) < 2:
        return
    caption = "Error against the number of training examples, with 95 % bands over seeds and examples"
    sketch = Sketch("sizes", caption + _cut(len(lines)), "training examples", "error %")
    for number, (label, line) in enumerate(list(lines.items())[:MOST]):
        sizes = sorted(line)
        mean, low, high = ([getattr(line[size], name)[0] for size in sizes] for name in ("mean", "low", "high"))
        _banded(sketch, number, Curve(label, [float(size) for size in sizes], mean, low, high), markersize=4)
    sketch.axes.set_xscale("log")
    every = sorted(set().union(*lines.values()))
    sketch.axes.set_xticks(every, [f"{size:,}".replace(",", "\u202f") for size in every], rotation=45)
    sketch.axes.minorticks_off()
    yield _legend(sketch)


def _training(findings: Findings) -> Iterator[Sketch]:
    for key, name, label in (
        ("loss", "training_loss", "training objective"),
        ("test_error", "training_error", "test error %"),
        ("cosine", "semantics_cosine", "cosine of paper's and exact penalty gradient"),
        ("norm_ratio", "semantics_norms", "norm of paper's over exact penalty gradient"),
    ):
        lines = [(row, *findings.metrics(row, key)) for row in findings.chosen[:MOST]]
        shown = [(number, row, epochs, values) for number, (row, epochs, values) in enumerate(lines) if epochs]
        if not shown:
            continue
        caption = f"{label[0].upper()}{label[1:]} over training, mean over seeds{_cut(len(findings.chosen))}"
        sketch = Sketch(name, caption, "epoch", label)
        for number, row, epochs, values in shown:
            style = {**_look(number), "marker": "" if len(epochs) > 12 else _look(number)["marker"]}
            sketch.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            sketch.axes.plot(epochs, values, label=plain(title(row)), markersize=3, **style)
        if key in ("loss", "norm_ratio") and min(min(values) for *_, values in shown) > 0:
            sketch.axes.set_yscale("log")
        yield _legend(sketch)


def _ratios(findings: Findings) -> Iterator[Sketch]:
    rows = [row for row in findings.chosen if row.measured is not None]
    if len(rows) < 2:
        return
    sketch = Sketch("ratios", f"Time of an epoch relative to bp{_cut(len(rows))}", "× bp", "")
    rows = rows[:MOST]
    sketch.grow(max(0.0, 0.3 * (len(rows) - 8)))
    positions = range(len(rows))
    measured = [row.measured or 0.0 for row in rows]
    sketch.axes.barh([p - 0.2 for p in positions], measured, 0.38, label="measured", color=COLOURS[1])
    sketch.axes.barh(
        [p + 0.2 for p in positions], [r.predicted for r in rows], 0.38, label="predicted", color=COLOURS[3]
    )
    sketch.axes.set_yticks(list(positions), [plain(title(row)) for row in rows])
    sketch.axes.invert_yaxis()
    yield _legend(sketch)


def _cut(count: int) -> str:
    """What a caption says of a figure of which not all lines can be drawn."""
    return f"; the first {MOST} of {count}" if count > MOST else ""


def plain(label: str) -> str:
    """A label that matplotlib shows as it is: no formula, and not hidden from the legend."""
    shown = label.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _look(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _legend(sketch: Sketch) -> Sketch:
    """Inside the axes for a few lines; below them, in a figure that grows, for many."""
    labels = sketch.axes.get_legend_handles_labels()[1]
    with _styled():
        if len(labels) <= 4:
            sketch.axes.legend(fontsize=8)
        else:
            longest = max(map(len, labels))
            columns = 4 if longest < 16 else 2 if longest < 34 else 1
            sketch.grow(0.19 * math.ceil(len(labels) / columns))
            sketch.figure.legend(loc="outside lower center", ncols=columns, fontsize=8)
    return sketch


@contextmanager
def _any_letter() -> Iterator[None]:
    """Labels may hold letters that the font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _styled(more: dict[str, Any] | None = None) -> AbstractContextManager[None]:
    choice: Any = {**STYLE, **(more or {})}
    return matplotlib.rc_context(choice)
