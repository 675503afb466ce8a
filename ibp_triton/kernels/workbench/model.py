"""What a launch should take on a card, from the compiled code and the counted bytes: a model that no GPU has confirmed.

A launch is bounded by what its multiprocessors issue, the bytes it moves through the second cache, those that memory
must give once, its matrix units, and the steps that wait for one another:

    issue   instructions of a warp (loops by their trips) x warps of a multiprocessor / (4 schedulers x clock), of which
            0.73 at most are used, fewer where a scheduler has too few warps to choose from
    cache   bytes loaded and stored, each as often as it happens: asynchronous copies pass the first cache by
    memory  bytes of the tensors, each once
    matrix  padded multiplications and additions at the data sheet's peak
    steps   rounds of the longest loop, one wave of programs after the other

A time is a range. Its low end is the largest bound (all else hides behind it), 0.3 µs a step and 0.9 µs a launch in a
CUDA graph; its high end adds the cache's time to the issued instructions', with 0.5 µs and 1.5 µs. The cache's
5.5 TB/s and both pairs of µs are the review's of these kernels, the peaks and clocks the data sheets'. The review says
835 and 350 µs for the first convolution's reverse at batch 1024 in float32 and tf32: both to a thousandth the data
sheet's clock with 0.73 of the slots used. How many warps a scheduler wants (3 or 4, as many as an instruction has
cycles) and what overlaps are a reading of its words: at the kernels that it saw they give back all 18 ends of its table
within 22 % (tests/compiled/test_model.py).

The constants change by measurements alone.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ibp_triton.kernels.launcher import Launch, cdiv
from ibp_triton.kernels.workbench.aot import Compiled, chip_named, compiled_kernel, described, signature
from ibp_triton.kernels.workbench.sass import Code, disassembled

SCHEDULERS = 4  # of a multiprocessor, each an instruction a cycle (AMD: a wave of 64 in four)
USED = 0.73  # of the slots
H100_CACHE = 5.5e12


@dataclass(frozen=True)
class Card:
    """A card by its data sheet: bytes/s and FLOP/s, dense."""

    name: str
    target: str  # what is compiled
    family: str  # whose tiles it takes
    multiprocessors: int
    clock: float
    cache: float
    memory: float
    peaks: dict[str, float]
    cycles: int = 1  # of a scheduler for an instruction of a warp


def _cached(multiprocessors: int, clock: float) -> float:
    """The second cache's bytes/s where no measurement is at hand: the H100's for each multiprocessor and cycle."""
    return H100_CACHE * multiprocessors * clock / (132 * 1.98e9)


CARDS = {
    card.name: card
    for card in (
        Card("H100", "sm_90", "sm_90", 132, 1.98e9, H100_CACHE, 3.35e12,
             {"float32": 67e12, "tf32": 495e12, "bfloat16": 989e12}),
        Card("H200", "sm_90", "sm_90", 132, 1.98e9, H100_CACHE, 4.8e12,
             {"float32": 67e12, "tf32": 495e12, "bfloat16": 989e12}),
        Card("B200", "sm_100", "sm_100", 148, 1.965e9, _cached(148, 1.965e9), 8e12,
             {"float32": 75e12, "tf32": 1100e12, "bfloat16": 2250e12}),
        Card("MI300X", "gfx942", "gfx942", 304, 2.1e9, 17.2e12, 5.3e12,
             {"float32": 163e12, "tf32": 653e12, "bfloat16": 1307e12}, cycles=4),
        Card("RTX 4090", "sm_89", "sm_80", 128, 2.52e9, _cached(128, 2.52e9), 1.008e12,
             {"float32": 82.6e12, "tf32": 82.6e12, "bfloat16": 165e12}),
    )
}  # fmt: skip


@dataclass(frozen=True)
class End:
    """One end of the range."""

    launch: float  # seconds in a CUDA graph
    step: float  # seconds of a step that waits for the one before
    warps: int  # that keep a scheduler busy
    overlap: bool  # whether the caches work while instructions are issued


LOW, HIGH = End(0.9e-6, 0.3e-6, 3, overlap=True), End(1.5e-6, 0.5e-6, 4, overlap=False)


@dataclass(frozen=True)
class Counts:
    """What is known of one launch without a card: counts and the compiler's facts."""

    name: str
    programs: int
    warps: int  # of a program
    held: int  # programs that a multiprocessor holds at a time
    issued: int  # instructions of a warp
    steps: int  # of a program, each waiting for the one before
    moved: int  # bytes
    unique: int  # bytes
    flops: int  # with padding


@dataclass(frozen=True)
class Bounds:
    """The bounds of one launch on a card, in seconds, and what they hang on."""

    issue: float  # with every slot used
    cache: float
    memory: float
    matrix: float
    steps: int  # one after the other
    warps: float  # of a scheduler, in cycles that one fills

    def seconds(self, end: End) -> float:
        """One end of the range."""
        issue = self.issue * max(1 / USED, end.warps / self.warps)
        moved = max(self.cache, self.memory)
        busy = max(issue, moved) if end.overlap else issue + moved
        return end.launch + max(busy, self.matrix, end.step * self.steps)

    @property
    def name(self) -> str:
        """The largest bound at the low end."""
        issue = self.issue * max(1 / USED, LOW.warps / self.warps)
        found = {"issue": issue, "cache": self.cache, "memory": self.memory, "matrix": self.matrix}
        found |= {"steps": LOW.step * self.steps, "launch": LOW.launch}
        return max(found, key=lambda bound: found[bound])


def bounds(counts: Counts, card: Card, kind: str) -> Bounds:
    """The bounds on a card; `kind` is float32, tf32 or bfloat16, whose peak counts."""
    each = cdiv(counts.programs, card.multiprocessors)
    held = min(each, counts.held)
    slots = each * counts.warps * counts.issued * card.cycles / SCHEDULERS
    return Bounds(
        issue=slots / card.clock,
        cache=counts.moved / card.cache,
        memory=counts.unique / card.memory,
        matrix=counts.flops / card.peaks[kind],
        steps=counts.steps if counts.name in FREE else counts.steps * cdiv(each, held),
        warps=held * counts.warps * card.cycles / SCHEDULERS,
    )


FREE = ("gate", "max_pool", "pool_gather", "pool_scatter")  # their loops are over tangents, which do not wait


def counts(launch: Launch, target: str) -> Counts:
    """A recorded launch, compiled for a chip of `aot`."""
    built, code = _made(launch, target)
    chip, warps = chip_named(target), launch.config.warps
    return Counts(
        name=launch.name,
        programs=math.prod(launch.grid),
        warps=warps,
        held=max(1, round(built.occupancy * chip.threads / chip.target.warp_size) // warps),
        issued=code.issued(trips(launch)),
        steps=_steps(launch),
        moved=launch.cost.loaded + launch.cost.stored,
        unique=launch.unique_bytes,
        flops=launch.cost.padded_flops,
    )


def _steps(launch: Launch) -> int:
    if launch.name == "combine_several":
        return max(_rounds(launch.arguments))
    return 1 if launch.name in FREE else max(1, sum(trips(launch)))


def _rounds(arguments: dict[str, Any]) -> list[int]:
    return [cdiv(arguments[f"splits{i}"], arguments["ROUND"]) for i in range(4)]


def trips(launch: Launch) -> list[int]:
    """How often the loops of a kernel are gone through, as its arguments say."""
    a = launch.arguments
    if launch.name == "contract":
        return [a["steps"]]
    if launch.name == "wgrad":
        positions, depth = a["GEOMETRY"][2] * a["GEOMETRY"][3], a["BLOCK_K"] * a["splits"]
        return [cdiv(a[f"n{i}"] * positions, depth) for i in range(a["SEGMENTS"])]
    if launch.name == "combine":
        return [a["tangents"] * cdiv(a["splits"], a["ROUND"])]
    if launch.name == "combine_several":  # a program makes one of the sums: the mean
        ends = [0, a["begin1"], a["begin2"], a["begin3"], launch.grid[0]]
        return [cdiv(sum((ends[i + 1] - ends[i]) * n for i, n in enumerate(_rounds(a))), ends[-1])]
    if launch.name == "weighted_sum":
        return [cdiv(a[size], a["BLOCK"]) for size in ("u_size", "v_size")]
    if launch.name in ("seed", "tangent_seed"):
        return [cdiv(a["features"], a["BLOCK"])]
    if launch.name in ("normalise", "project", "bend"):
        parts = launch.grid[0] // a["VIEW"][0]
        return [cdiv(a["samples"], a["ROWS"] * parts) * a.get("tangents", 1)]
    if launch.name in ("column_sums", "column_sweep"):
        steps = cdiv(a["samples"] * a["IMAGE"][1], a["BLOCK_P"] * launch.grid[1])
        return [steps * (1 if launch.name == "column_sums" else a["tangents"])]
    return [a["tangents"]] if "tangents" in a else []


_kept: dict[Any, tuple[Compiled, Code]] = {}  # by what the compiler sees


def _made(launch: Launch, target: str) -> tuple[Compiled, Code]:
    key = signature(launch), target
    if key not in _kept:
        kernel = compiled_kernel(launch, target)
        _kept[key] = described(kernel, launch, target), disassembled(kernel, chip_named(target).target.backend)
    return _kept[key]


def torch_operator(moved: int) -> Counts:
    """An operator of torch's between the launches, which streams so many bytes: a launch of ours in the same place."""
    return Counts("torch", cdiv(moved, 4096), 4, 8, 64, 1, moved, moved, 0)


def microseconds(step: Iterable[Counts], card: Card, kind: str) -> tuple[float, float]:
    """Both ends for launches one after the other in a CUDA graph."""
    found = [bounds(one, card, kind) for one in step]
    low, high = (1e6 * sum(b.seconds(end) for b in found) for end in (LOW, HIGH))
    return low, high
