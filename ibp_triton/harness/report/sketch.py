"""A figure as SVG, the same bytes for the same drawing; in a page its points tell their values, its legend toggles."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#0a0b0c"
COLOURS = ("#808080", "#1f8fe0", "#2aa775", "#d9822b", "#b08d1a", "#a66bd4", "#d4569a", "#e0483e", "#3aa6a6", "#8f8f3a")
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
    """One figure: its file name, its caption and its drawing.

    Artists of series n have the ids NAME--s<n> (points, each with a tip), NAME--b<n> (band), NAME--w<n> and NAME--v<n>
    (whiskers), NAME--l<n> and NAME--t<n> (in the legend); the page's script knows these.
    """

    def __init__(self, name: str, caption: str, xlabel: str, ylabel: str) -> None:
        self.name, self.caption = name, caption
        self._tips: dict[str, list[str]] = {}
        with _styled():
            self.figure = Figure(figsize=(5.6, 3.8))
            self.axes: Axes = self.figure.add_subplot()
        self.axes.set_xlabel(xlabel)
        self.axes.set_ylabel(ylabel)

    def grow(self, inches: float) -> None:
        """Make the figure higher."""
        width, height = self.figure.get_size_inches()
        self.figure.set_size_inches(width, height + inches)

    def line(
        self,
        number: int,
        label: str,
        points: tuple[Sequence[float], Sequence[float]],
        band: tuple[Sequence[float], Sequence[float]] | None = None,
        **style: Any,
    ) -> None:
        """Draw series `number` through points (x, y), with a visible band (low, high) about it."""
        chosen = {**look(number), "markersize": 4, **style}
        (drawn,) = self.axes.plot(*points, label=plain(label), **chosen)
        drawn.set_gid(f"{self.name}--s{number}")
        tips = [f"{label}: {x:g} → {y:.4g}" for x, y in zip(*points, strict=True)]
        if band:
            area = self.axes.fill_between(points[0], *band, color=chosen["color"], alpha=0.22, lw=0.6)
            area.set_gid(f"{self.name}--b{number}")
            tips = [f"{tip} ({low:.4g} … {high:.4g})" for tip, low, high in zip(tips, *band, strict=True)]
        self._tips[f"{self.name}--s{number}"] = tips[:: style.get("markevery", 1)]

    def whisker(self, number: int, kind: str, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        """The interval of a point of series `number`, from (xs[0], ys[0]) to (xs[1], ys[1])."""
        (drawn,) = self.axes.plot(xs, ys, color=look(number)["color"], lw=1.6, alpha=0.8)
        drawn.set_gid(f"{self.name}--{kind}{number}")

    def tip(self, gid: str, text: str) -> None:
        """What a lone artist tells."""
        self._tips[gid] = [text]

    def legend(self) -> Sketch:
        """Inside the axes for a few lines; below them, in a figure that grows, for many."""
        handles, labels = self.axes.get_legend_handles_labels()
        with _styled():
            if len(labels) <= 4:
                legend = self.axes.legend(fontsize=8)
            else:
                longest = max(map(len, labels))
                columns = 4 if longest < 16 else 2 if longest < 34 else 1
                self.grow(0.19 * math.ceil(len(labels) / columns))
                legend = self.figure.legend(loc="outside lower center", ncols=columns, fontsize=8)
        for handle, shown, text in zip(handles, legend.legend_handles, legend.get_texts(), strict=True):
            number = str(getattr(handle, "get_gid", lambda: "")() or "").partition("--s")[2]
            if number and shown is not None:
                shown.set_gid(f"{self.name}--l{number}")
                text.set_gid(f"{self.name}--t{number}")
        return self

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
        for gid, tips in self._tips.items():
            rest = _with_tips(rest, gid, tips)
        return f'{head} role="img" aria-label="{html.escape(self.caption)}">{rest}'

    def png(self) -> bytes:
        """PNG on white at 160 dots an inch."""
        buffer = io.BytesIO()
        with _styled(), _any_letter():
            self.figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def _with_tips(text: str, gid: str, tips: list[str]) -> str:
    """SVG in which each point of a group, or the group if it has none, has its title."""
    head, mark, rest = text.partition(f'<g id="{gid}">')
    if not mark:
        return text
    end = rest.find('<g id="')
    own, others = (rest[:end], rest[end:]) if end >= 0 else (rest, "")
    titles = iter([f"<title>{html.escape(tip)}</title>" for tip in tips])
    if "<use " in own:
        own = re.sub(r"<use ([^>]*)/>", lambda found: f"<use {found[1]}>{next(titles, '')}</use>", own)
    else:
        own = next(titles, "") + own
    return head + mark + own + others


def look(number: int) -> dict[str, Any]:
    """Colour and marker of a series."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def plain(label: str) -> str:
    """A label that matplotlib shows as it is: no formula, and not hidden from the legend."""
    shown = label.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


@contextmanager
def _any_letter() -> Iterator[None]:
    """Labels may hold letters that the font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _styled(more: dict[str, Any] | None = None) -> AbstractContextManager[None]:
    choice: Any = {**STYLE, **(more or {})}
    return matplotlib.rc_context(choice)
