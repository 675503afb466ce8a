"""Figures: errors beside the paper's, robustness, trade-offs, training, sizes, time; bands wherever there are any."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ibp_triton.harness.evaluate import CLEAN, CURVES
from ibp_triton.harness.report.gather import Curve, Findings, title
from ibp_triton.harness.report.sketch import COLOURS, Sketch, look, plain
from ibp_triton.harness.summary import ResultRow

MOST = 40  # lines of a figure


def sketches(findings: Findings) -> Iterator[Sketch]:
    """Every figure there are results for, after the one of the verdict."""
    for name in CURVES:
        yield from _robustness(findings, name)
    yield from _tradeoff(findings)
    yield from _cost(findings)
    yield from _sizes(findings)
    yield from _training(findings)
    yield from _ratios(findings)
    yield from _trials(findings)


def errors(findings: Findings) -> Iterator[Sketch]:
    """The verdict's figure: each row's error with an interval, the paper's beside it."""
    rows = [row for row in findings.chosen if row.errors]
    if not rows:
        return
    clean = {id(row): curve for row, curve in findings.curves[CLEAN]}
    known = any(findings.published(row) for row in rows)
    interval = "95 % over seeds and examples" if clean else "± sd over seeds"
    beside = "; the paper's mean ± sd hollow" if known else ""
    sketch = Sketch("errors", f"Error on the test set, {interval}{beside}{_cut(len(rows))}", "error %", "")
    rows = rows[:MOST]
    sketch.grow(min(0.0, 0.45 * len(rows) - 2.6) + max(0.0, 0.32 * len(rows) - 3.0))
    for number, row in enumerate(rows):
        low, high = _interval(row, clean.get(id(row)))
        sketch.whisker(number, "w", (low, high), (number, number))
        sketch.line(number, title(row), ([row.mean], [number]), marker="o", markersize=6, linestyle="none")
        paper = findings.published(row)
        sketch.tip(f"{sketch.name}--s{number}", f"{title(row)}: {row.mean:.2f} % ({low:.2f} … {high:.2f})")
        if paper:
            ends = (paper.mean - paper.sd, paper.mean + paper.sd)
            sketch.axes.plot(ends, (number + 0.28,) * 2, color=look(number)["color"], lw=1, linestyle=":")
            place: dict[str, Any] = {"marker": "D", "markersize": 5, "markerfacecolor": "none", "linestyle": "none"}
            (drawn,) = sketch.axes.plot([paper.mean], [number + 0.28], color=look(number)["color"], **place)
            drawn.set_gid(f"{sketch.name}--p{number}")
            sketch.tip(f"{sketch.name}--p{number}", f"{title(row)} in the paper: {paper.mean:.2f} ± {paper.sd:.2f} %")
    sketch.axes.set_yticks(list(range(len(rows))), [plain(title(row)) for row in rows])
    sketch.axes.invert_yaxis()
    yield sketch


def _interval(row: ResultRow, clean: Curve | None) -> tuple[float, float]:
    return (clean.low[0], clean.high[0]) if clean else (row.mean - (row.sd or 0.0), row.mean + (row.sd or 0.0))


def _robustness(findings: Findings, name: str) -> Iterator[Sketch]:
    curves = [(row, curve) for row, curve in findings.curves[name] if len(curve.levels) > 1]
    if not curves:  # nothing stored, or one size, which the tables tell
        return
    kind = CURVES[name]
    caption = f"{kind.title}: error with 95 % bands over seeds and examples{_cut(len(curves))}"
    sketch = Sketch(name, caption, f"{kind.symbol} {kind.of}", "error %")
    for number, (_, curve) in enumerate(curves[:MOST]):
        _banded(sketch, number, curve)
    _small_levels(sketch.axes, curves[0][1].levels)
    _spread(sketch.axes, [curve for _, curve in curves[:MOST]])
    yield sketch.legend()


def _banded(sketch: Sketch, number: int, curve: Curve) -> None:
    sketch.line(number, curve.name, (curve.levels, curve.mean), (curve.low, curve.high))


def _small_levels(axes: Axes, levels: list[float]) -> None:
    """A scale that is linear up to the smallest size and logarithmic from there, ticks at sizes that were measured."""
    positive = [level for level in levels if level > 0]
    if len(positive) < 3:
        return
    axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
    ticks, last = [level for level in levels if level == 0], 0.0
    for level in positive:
        if level >= 1.9 * last:
            ticks.append(level)
            last = level
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _spread(axes: Axes, curves: list[Curve]) -> None:
    """A logarithmic axis of errors where they differ by much, in plain numbers."""
    least, most = min(min(curve.low) for curve in curves), max(max(curve.high) for curve in curves)
    if least > 0 and most / least > 5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _tradeoff(findings: Findings) -> Iterator[Sketch]:
    found = [(row, *robust) for row in findings.chosen if row.errors and (robust := findings.robust(row))]
    if len(found) < 2:
        return
    clean = {id(row): curve for row, curve in findings.curves[CLEAN]}
    caption = f"Clean error against robust error, 95 % over seeds and examples{_cut(len(found))}"
    sketch = Sketch("tradeoff", caption, "clean error %", f"error %, {found[0][1]}")
    for number, (row, _, curve) in enumerate(found[:MOST]):
        sketch.whisker(number, "w", _interval(row, clean.get(id(row))), (curve.mean[0], curve.mean[0]))
        sketch.whisker(number, "v", (row.mean, row.mean), (curve.low[0], curve.high[0]))
        sketch.line(number, title(row), ([row.mean], curve.mean), linestyle="none", markersize=7)
    yield sketch.legend()


def _cost(findings: Findings) -> Iterator[Sketch]:
    rows = [row for row in findings.chosen if row.measured is not None and row.errors]
    if len(rows) < 2:
        return
    clean = {id(row): curve for row, curve in findings.curves[CLEAN]}
    sketch = Sketch("cost", f"Error against the time of an epoch{_cut(len(rows))}", "× bp, measured", "error %")
    for number, row in enumerate(rows[:MOST]):
        at = row.measured or 0.0
        sketch.whisker(number, "w", (at, at), _interval(row, clean.get(id(row))))
        sketch.line(number, title(row), ([at], [row.mean]), linestyle="none", markersize=7)
    yield sketch.legend()


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
        _banded(sketch, number, Curve(label, [float(size) for size in sizes], mean, low, high))
    sketch.axes.set_xscale("log")
    every = sorted(set().union(*lines.values()))
    sketch.axes.set_xticks(every, [f"{size:,}".replace(",", "\u202f") for size in every], rotation=45)
    sketch.axes.minorticks_off()
    yield sketch.legend()


def _training(findings: Findings) -> Iterator[Sketch]:
    for key, name, label in (
        ("loss", "training_loss", "training objective"),
        ("test_error", "training_error", "test error %"),
        ("cosine", "semantics_cosine", "cosine of paper's and exact penalty gradient"),
        ("norm_ratio", "semantics_norms", "norm of paper's over exact penalty gradient"),
    ):
        lines = [(row, *findings.metrics(row, key)) for row in findings.chosen[:MOST]]
        shown = [(number, row, epochs, seeds) for number, (row, epochs, seeds) in enumerate(lines) if epochs]
        if not shown:
            continue
        caption = f"{label[0].upper()}{label[1:]} over training, mean, lowest and highest of the seeds"
        sketch = Sketch(name, caption + _cut(len(findings.chosen)), "epoch", label)
        sketch.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for number, row, epochs, seeds in shown:
            at_once = list(zip(*seeds, strict=True))
            band = ([min(v) for v in at_once], [max(v) for v in at_once]) if len(seeds) > 1 else None
            points = (epochs, [fmean(v) for v in at_once])
            sketch.line(number, title(row), points, band, markevery=max(1, len(epochs) // 10))
        if key in ("loss", "norm_ratio") and min(min(map(min, seeds)) for *_, seeds in shown) > 0:
            sketch.axes.set_yscale("log")
        yield sketch.legend()


def _ratios(findings: Findings) -> Iterator[Sketch]:
    rows = [row for row in findings.chosen if row.measured is not None]
    if len(rows) < 2:
        return
    sketch = Sketch("ratios", f"Time of an epoch relative to bp{_cut(len(rows))}", "× bp", "")
    rows = rows[:MOST]
    sketch.grow(max(0.0, 0.3 * (len(rows) - 8)))
    positions = range(len(rows))
    for name, offset, colour, values in (
        ("measured", -0.2, COLOURS[1], [row.measured or 0.0 for row in rows]),
        ("predicted", 0.2, COLOURS[3], [row.predicted for row in rows]),
    ):
        bars = sketch.axes.barh([p + offset for p in positions], values, 0.38, label=name, color=colour)
        for row, position, bar, value in zip(rows, positions, bars, values, strict=True):
            bar.set_gid(f"{sketch.name}--{name}{position}")
            sketch.tip(f"{sketch.name}--{name}{position}", f"{title(row)}: {value:.2f} × bp, {name}")
    sketch.axes.set_yticks(list(positions), [plain(title(row)) for row in rows])
    sketch.axes.invert_yaxis()
    yield sketch.legend()


def _trials(findings: Findings) -> Iterator[Sketch]:
    """A figure for each number that a search has tried: the validation error of whole and of stopped trials."""
    judged = [one for one in findings.trials if one["validation_error"] is not None]
    tried = [(key, one) for one in judged for key, value in one["values"].items() if isinstance(value, float)]
    for place, key in enumerate(dict.fromkeys(key for key, _ in tried)):
        own = [(one["values"][key], one) for name, one in tried if name == key]
        sketch = Sketch(f"search{place}", f"Trials of the search by {key}", key, "validation error %")
        kinds = dict.fromkeys((one["row"], one["state"]) for _, one in own)
        for number, kind in enumerate(kinds):
            points = [(value, one["validation_error"]) for value, one in own if (one["row"], one["state"]) == kind]
            xs, ys = zip(*points, strict=True)
            sketch.line(number, ", ".join(kind), (xs, ys), linestyle="none", markersize=6)
        values = [value for value, _ in own]
        if min(values) > 0 and max(values) / min(values) > 20:
            sketch.axes.set_xscale("log")
        yield sketch.legend()


def _cut(count: int) -> str:
    """What a caption says of a figure of which not all lines can be drawn."""
    return f"; the first {MOST} of {count}" if count > MOST else ""
