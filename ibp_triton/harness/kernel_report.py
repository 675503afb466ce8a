"""`ibp-triton kernels`: what the compiler makes of every kernel, and what a training step launches, moves and computes.

Static facts: registers, spills, shared memory and instructions are the compiler's, bytes and FLOPs are counts (the
interpreter's, kernel by kernel, are equal to them in the tests), the floor is a model. Nothing is timed, unless
`--host` asks for what this machine's Python takes to launch it all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ibp_triton.harness import host_costs, predictions
from ibp_triton.harness.host_costs import HostCost, measured
from ibp_triton.harness.predictions import Prediction, predicted
from ibp_triton.harness.step_counts import BANDWIDTH, KINDS, PEAK, StepCount, steps

DTYPES = tuple(KINDS)


@dataclass(frozen=True)
class KernelRow:
    """One kernel of the case list, compiled for one target."""

    kernel: str
    case: str
    dtype: str
    target: str
    registers: int
    spills: int
    shared: int
    occupancy: float
    matrix: str
    load_bits: int
    loaded: int
    stored: int
    unique_bytes: int
    flops: int
    padded_flops: int

    @property
    def excess(self) -> float:
        """Bytes moved over those that must be."""
        return (self.loaded + self.stored) / max(1, self.unique_bytes)


def distinct(target: str) -> Iterator[tuple[str, Any]]:
    """Every case of `workbench.cases` on a chip family, with its dtype; what compiles alike comes once."""
    from ibp_triton.kernels.workbench import aot, cases  # here, so that the harness does without triton

    seen = set()
    for dtype in DTYPES:
        if dtype == "tf32" and target == "gfx1100":
            continue
        settings = (target, KINDS[dtype], dtype == "tf32")
        others = cases.collected(*settings, cases.activation_cases, cases.attention_cases)
        for record in cases.launches(*settings) + others:
            signature = aot.signature(record)
            if signature not in seen:
                seen.add(signature)
                yield dtype, record


def kernel_rows(target: str, only: Sequence[str] = ()) -> list[KernelRow]:
    """The distinct kernels, compiled for a chip family.

    With `only` those that have each of these words in kernel, case, dtype or target; no other is compiled.
    """
    from ibp_triton.kernels.workbench import aot

    return [
        _row(record, dtype, target, aot.compile_launch(record, target))
        for dtype, record in distinct(target)
        if has_words(only, record.name, case(record.arguments), dtype, target)
    ]


def _row(record: Any, dtype: str, target: str, built: Any) -> KernelRow:
    cost = record.cost
    return KernelRow(
        record.name, case(record.arguments), dtype, target, built.registers, built.spills, built.shared,
        round(built.occupancy, 3), built.matrix, built.load_bits, cost.loaded, cost.stored, record.unique_bytes,
        cost.flops, cost.padded_flops,
    )  # fmt: skip


def case(arguments: dict[str, Any]) -> str:
    """The launch in a few words: sizes, direction, what is fused."""
    from ibp_triton.kernels.smooth import Activation

    words = []
    if "J" in arguments:
        kernel = (arguments["CONV"] if "CONV" in arguments else arguments["GEOMETRY"])[4:6]
        sizes = f"{arguments.get('C', 'taps')}→{arguments['J']}"
        words.append(sizes + (f" {kernel[0]}×{kernel[1]}" if kernel != (1, 1) else ""))
    if "VIEW" in arguments:
        groups, channels, pixels = arguments["VIEW"][:3]
        words.append(f"{groups} × {channels}" + (f" × {pixels}" if pixels > 1 else ""))
        words += [] if arguments["CENTRED"] else ["RMS"]
    if "IMAGE" in arguments:
        words.append(f"{arguments['IMAGE'][0]} channels")
    if "SIZES" in arguments:
        _, queries, _, width = arguments["SIZES"]
        words.append(f"{queries} tokens, heads of {width}")
    if arguments.get("ACTIVATION"):
        words.append(Activation(arguments["ACTIVATION"]).name.replace("_", " "))
    for name, word in (
        ("TRANSPOSED", "reverse"),
        ("SIGN", "sign"),
        ("RELU", "relu"),
        ("MASK", "slope" if arguments.get("FACTOR") else "mask"),
        ("MEAN", "mean"),
        ("CHOSEN", "at the code"),
        ("INNER", "reverse"),
        ("OUTER", "sweep"),
        ("SUMS", "sums"),
        ("CROSS", "tangent term"),
    ):
        if arguments.get(name):
            words.append(word)
    if arguments.get("AXPY"):
        words.append("a + βt")
    for name, word in (("GROUP", "tangents"), ("SEGMENTS", "terms"), ("splits", "splits")):
        if arguments.get(name, 1) > 1:
            words.append(f"{arguments[name]} {word}")
    if "GROUP" not in arguments and arguments.get("tangents", 1) > 1:
        words.append(f"{arguments['tangents']} tangents")
    return ", ".join(words)


def has_words(wanted: Iterable[str], *texts: str) -> bool:
    """Whether each wanted word is in one of the texts."""
    return all(any(word.lower() in text.lower() for text in texts) for word in wanted)


def ordered(lines: list[list[str]], head: Sequence[str], column: str) -> list[list[str]]:
    """Lines of cells by a column: numbers from the largest down, then texts."""
    place = head.index(column)

    def key(cells: list[str]) -> tuple[bool, float, str]:
        text = cells[place]
        try:
            return False, -float(text.replace(",", "")), ""
        except ValueError:
            return True, 0.0, text

    return sorted(lines, key=key)


def kernels(
    target: Annotated[list[str] | None, typer.Option(help="chip family; by default sm_90; may be repeated")] = None,
    only: Annotated[list[str] | None, typer.Option(help="rows with this word, as wgrad; may be repeated")] = None,
    sort: Annotated[str | None, typer.Option(help="a column's head, as spills or launches; numbers fall")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all rows to this file; - prints them")] = None,
    figure: Annotated[Path | None, typer.Option(help="draw launches and bytes of a step into this file")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write the tables to this file")] = None,
    card: Annotated[list[str] | None, typer.Option(help="predict a step on it, as H100; may be repeated")] = None,
    host: Annotated[bool, typer.Option("--host", help="time the Python of a step on this machine")] = False,
) -> None:
    """Compile every Triton kernel for chips that need not be there, and count what a training step needs."""
    if find_spec("triton") is None:
        raise typer.BadParameter("the kernel report needs triton: pip install triton")
    from ibp_triton.kernels.workbench.aot import CHIPS

    targets = target or ["sm_90"]
    for name in targets:
        if name not in CHIPS:
            raise typer.BadParameter(f"unknown target {name!r}; choose from {', '.join(CHIPS)}", param_hint="--target")
    if sort is not None and sort not in COLUMNS:
        raise typer.BadParameter(f"{sort!r} is no column; choose from {', '.join(COLUMNS)}", param_hint="--sort")
    try:
        forecast = predicted(card or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--card") from None
    rows = [row for name in targets for row in kernel_rows(name, only or [])]
    counted = [step for step in steps() if has_words(only or [], step.network, step.method, step.semantics or "")]
    costs = [cost for cost in measured() if has_words(only or [], cost.network, cost.method)] if host else []
    if not rows and not counted and not costs:
        raise typer.BadParameter(f"no kernel and no step has {' and '.join(only or [])}", param_hint="--only")
    if str(json_file) != "-":
        _print(rows, counted, forecast, costs, sort)
    if json_file is not None:
        content: dict[str, Any] = {"kernels": [asdict(r) for r in rows], "steps": [asdict(s) for s in counted]}
        content |= {"predictions": [asdict(p) for p in forecast], "host": [asdict(c) for c in costs], "note": NOTE}
        text = json.dumps(content, indent=1) + "\n"
        if str(json_file) == "-":
            typer.echo(text, nl=False)
        else:
            json_file.write_text(text, encoding="utf-8")
    if markdown is not None:
        markdown.write_text(as_markdown(rows, counted, forecast, costs), encoding="utf-8")
    if figure is not None:
        draw(counted, figure)


def _print(
    rows: list[KernelRow],
    counted: list[StepCount],
    forecast: list[Prediction],
    costs: list[HostCost],
    sort: str | None,
) -> None:
    """The tables that have rows, by a column where they have it."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=220)  # a file has room for every column
    tables = (
        ("Kernels, compiled ahead of time (static facts)", KERNEL_HEAD, [kernel_cells(row) for row in rows]),
        ("One training step before the optimizer (counted, not timed)", STEP_HEAD, [step_cells(s) for s in counted]),
        ("One captured step, µs (predictions of a model)", predictions.head(forecast), predictions.lines(forecast)),
        ("The host's part of a step, µs (timed here)", host_costs.HEAD, [host_costs.cells(cost) for cost in costs]),
    )
    for title, head, lines in tables:
        if lines:
            console.print(_table(title, head, ordered(lines, head, sort) if sort and sort in head else lines))
    console.print(NOTE, highlight=False)
    if costs:
        console.print(host_costs.NOTE, highlight=False)


NOTE = (
    "Loaded and stored bytes count every lane that is not masked off; unique bytes count each address once a launch. "
    "The floor is a roofline model of an H100 from its data sheet, the sum over launches of the larger of unique bytes "
    f"at {BANDWIDTH / 1e12:g} TB/s and FLOPs at {PEAK / 1e12:g} TFLOP/s (float32 without matrix units): no measure. "
    "Eager: the operators that PyTorch's autograd runs for the same gradient, the bytes of their inputs and outputs."
)
KERNEL_NOTE = (
    "One launch of each kind, compiled ahead of time by Triton {version}: registers a thread, spills (bytes; registers "
    "on AMD), shared bytes a program, occupancy as registers and shared memory bound it, the matrix instruction, the "
    "widest load. FLOPs are those of matrix products: one column and `pooled_conv` have none. Moved/unique is below 1 "
    "where a launch leaves a part of its tensors alone."
)
KERNEL_HEAD = (
    *("kernel", "case", "dtype", "target", "regs", "spills", "shared", "occup.", "matrix", "load bits"),
    *("loaded kB", "stored kB", "unique kB", "moved/unique", "MFLOP", "padded"),
)
STEP_HEAD = (
    *("network", "batch", "method", "semantics", "launches", "moved MB", "unique MB", "GFLOP", "floor µs"),
    *("eager ops", "eager MB", "eager GFLOP", "launches/ops", "unique/eager"),
)
COLUMNS = tuple(dict.fromkeys((*KERNEL_HEAD, *STEP_HEAD, *host_costs.HEAD)))


def kernel_cells(row: KernelRow) -> list[str]:
    """A kernel as the text of a table's cells."""
    return [
        *(row.kernel, row.case, row.dtype, row.target, f"{row.registers}", f"{row.spills}", f"{row.shared}"),
        *(f"{row.occupancy:.2f}", row.matrix or "–", f"{row.load_bits}"),
        *(f"{n / 1e3:,.1f}" for n in (row.loaded, row.stored, row.unique_bytes)),
        f"{row.excess:.2f}",
        *(f"{n / 1e6:,.1f}" for n in (row.flops, row.padded_flops)),
    ]


def step_cells(step: StepCount) -> list[str]:
    """A step as the text of a table's cells."""
    return [
        *(step.network, f"{step.batch}", step.method, step.semantics or "–", f"{step.launches}"),
        *(f"{step.bytes / 1e6:,.1f}", f"{step.unique_bytes / 1e6:,.1f}", f"{step.flops / 1e9:,.2f}"),
        *(f"{step.floor_us:,.0f}", f"{step.eager_operators}", f"{step.eager_bytes / 1e6:,.1f}"),
        *(f"{step.eager_flops / 1e9:,.2f}", f"{step.fraction_of_operators:.2f}", f"{step.fraction_of_bytes:.2f}"),
    ]


def _table(title: str, head: Sequence[str], rows: Any) -> Table:
    table = Table(title=title)
    for name in head:
        table.add_column(name, overflow="fold")
    for cells in rows:
        table.add_row(*map(escape, cells))
    return table


def as_markdown(
    rows: list[KernelRow],
    counted: list[StepCount],
    forecast: Sequence[Prediction] = (),
    costs: Sequence[HostCost] = (),
) -> str:
    """The tables with their notes, as a page of Markdown."""
    note = KERNEL_NOTE.format(version=version("triton"))
    parts = ["## One training step before the optimizer\n", _pipes(STEP_HEAD, map(step_cells, counted)), NOTE + "\n"]
    if forecast:
        table = _pipes(predictions.head(forecast), predictions.lines(forecast))
        parts = ["## One captured step, predicted µs\n", table, predictions.NOTE + "\n", *parts]
    if costs:
        table = _pipes(host_costs.HEAD, map(host_costs.cells, costs))
        parts = ["## The host's part of a step\n", table, host_costs.NOTE + "\n", *parts]
    return "\n".join(
        ["# Kernel report\n", *parts, "## Kernels\n", note + "\n", _pipes(KERNEL_HEAD, map(kernel_cells, rows))]
    )


def _pipes(head: Sequence[str], rows: Any) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def draw(counted: list[StepCount], path: Path) -> None:
    """Launches against eager operators, and unique bytes against eager bytes, of the MNIST network at batch 32."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    chosen = [s for s in counted if (s.network, s.batch) == ("mnist", 32)]
    labels = [s.method + (f"\n{s.semantics}" if s.semantics else "") for s in chosen]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    pairs = (
        ("launches or operators a step", [s.launches for s in chosen], [s.eager_operators for s in chosen]),
        ("unique MB a step", [s.unique_bytes / 1e6 for s in chosen], [s.eager_bytes / 1e6 for s in chosen]),
    )
    for axes, (title, ours, eager) in zip(figure.subplots(1, 2), pairs, strict=True):
        places = range(len(chosen))
        axes.bar([p - 0.2 for p in places], ours, 0.4, label="Triton kernels")
        axes.bar([p + 0.2 for p in places], eager, 0.4, label="eager autograd")
        axes.set_yscale("log")
        axes.set_xticks(list(places), labels, rotation=60, ha="right", fontsize=7)
        axes.set_title(f"{title} (counted, MNIST network, batch 32)", fontsize=9)
        axes.legend(fontsize=8)
    with rc_context({"svg.hashsalt": "kernels"}):  # the same counts draw the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
