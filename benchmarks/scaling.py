"""Fits and draws how the cost of a step grows: `python -m benchmarks.scaling FILE… --figure docs/scaling.svg`.

FILE: what `ibp-triton bench scaling_batch`, `scaling_width`, `scaling_depth` and `scaling_tangents` wrote. Prints the
slopes as Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ibp_triton.bench.candidates import METHODS

LABELS = {
    "batch": "batch size N, examples",
    "width": "width, channels of every convolution",
    "depth": "depth, convolutions after the first",
    "tangents": "tangent vectors T of an example",
}
LEADING = {"batch": 1, "width": 2, "depth": 1}  # the exponent that multiply-adds tend to
Curve = dict[int, float]  # CPU milliseconds of a step by size
Curves = dict[str, Curve]  # by candidate


def curves(file: dict[str, Any]) -> tuple[str, Curves]:
    """The axis along which a suite's cells differ, and every candidate's curve, by growing size."""
    found: Curves = defaultdict(dict)
    sizes = [_sizes(entry["extra_info"]) for entry in file["benchmarks"]]
    varied = [axis for axis in LABELS if len({size.get(axis) for size in sizes}) > 1]
    if len(varied) != 1:
        raise SystemExit(f"{file['suite']['name']}: cells must differ in one of {', '.join(LABELS)}, not in {varied}")
    axis = varied[0]
    for entry, size in sorted(zip(file["benchmarks"], sizes, strict=True), key=lambda pair: pair[1][axis]):
        found[entry["name"]][size[axis]] = 1e3 * entry["stats"]["median"]
    return axis, dict(found)


def _sizes(info: dict[str, Any]) -> dict[str, int]:
    return {"batch": info["batch"], "tangents": info["tangents"], **info["options"]}


def slope(curve: Iterable[tuple[int, float]]) -> float:
    """The exponent of the fitted power law: 1 means twice the size costs twice the time."""
    points = [(math.log(size), math.log(cost)) for size, cost in curve]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def relative(found: Curves, name: str) -> Curve:
    """A curve in units of BP's step at the same size."""
    return {size: cost / found["bp"][size] for size, cost in found[name].items()}


def table(axes: dict[str, Curves]) -> str:
    """Fitted exponents, in brackets that of the two largest sizes, and the lines of cost against T, as Markdown."""
    powers = {axis: found for axis, found in axes.items() if axis in LEADING}
    lines = []
    if powers:
        heads = [f"{axis} {min(found['bp'])} … {max(found['bp'])}" for axis, found in powers.items()]
        lines += [f"| slope of | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for name in next(iter(powers.values())):
            lines.append(f"| {name} | {' | '.join(_exponents(found[name]) for found in powers.values())} |")
    if "tangents" in axes:
        found = axes["tangents"]
        first, *_, last = found["bp"]
        lines += ["", f"| cost in steps of BP | a + b T | T = {first} | T = {last} |", "|---|---|---|---|"]
        for name in found:
            if name != "bp":
                costs = relative(found, name)
                b, a = statistics.linear_regression(list(costs), list(costs.values()))
                lines.append(f"| {name} | {a:.2f} + {b:.3f} T | {costs[first]:.2f} | {costs[last]:.2f} |")
    return "\n".join(lines)


def _exponents(curve: Curve) -> str:
    points = list(curve.items())
    return f"{slope(points):.2f} ({slope(points[-2:]):.2f})"


def draw(axes: dict[str, Curves], path: Path) -> None:
    """A panel an axis, side by side, both scales logarithmic."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same file from the same figures
    figure = Figure(figsize=(4 * len(axes), 4.6), layout="constrained", facecolor="white")
    panels = dict(zip(axes, figure.subplots(1, len(axes), squeeze=False)[0], strict=True))
    for axis, panel in panels.items():
        found = axes[axis]
        for name in found if axis != "tangents" else [name for name in found if name != "bp"]:
            shown = relative(found, name) if axis == "tangents" else found[name]
            key = name.removesuffix(" by_hand")
            style = {"color": f"C{list(METHODS).index(key)}", "linestyle": "-" if key == name else "--"}
            panel.loglog(list(shown), list(shown.values()), marker="o", markersize=3, label=name, **style)
        sizes = list(found["bp"])
        if axis in LEADING:
            _guide(panel, sizes, LEADING[axis], found["bp"][sizes[-1]])
        panel.set_xlabel(LABELS[axis])
        panel.set_ylabel("cost of a step, steps of BP" if axis == "tangents" else "CPU time of a step, ms")
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    if "tangents" in panels:
        panels["tangents"].legend(fontsize=8, frameon=False)
    shown, names = next(iter(panels.values())).get_legend_handles_labels()
    figure.legend(shown, names, loc="outside upper center", ncols=len(names), fontsize=9, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def _guide(panel: Any, sizes: list[int], power: int, last: float) -> None:
    """A dotted power law below BP's curve."""
    panel.loglog(sizes, [0.7 * last * (size / sizes[-1]) ** power for size in sizes], ":k", linewidth=1)
    panel.set_ylim(bottom=0.35 * min(panel.get_lines()[0].get_ydata()))
    panel.annotate(f"slope {power}", (sizes[-2], 0.6 * last * (sizes[-2] / sizes[-1]) ** power), va="top", fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="JSON of the suites, one for each axis")
    parser.add_argument("--figure", type=Path, help="also draw them, .svg or .png")
    options = parser.parse_args()
    axes = dict(curves(json.loads(path.read_text())) for path in options.files)
    print(table(axes))
    if options.figure:
        draw(axes, options.figure)


if __name__ == "__main__":
    main()
