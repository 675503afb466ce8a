"""Tile shapes, chosen by a table: operation, chip family, dtype and shape class, each row with its reason.

The first row that fits is taken, so that special cases stand above general ones. The reasons are static facts (the
compiler's registers, spills and shared memory, and the counted bytes) unless they say *measured*.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "gfx1100": 96}
NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = ("gfx942", "gfx1100")
FAMILIES = NVIDIA + AMD
HALF = ("bfloat16", "float16")
FLOATS = ("float32", *HALF)


@dataclass(frozen=True)
class Config:
    """Tile of a program and its launch options; `block_k` is the depth of a step of the reduction."""

    block_m: int
    block_n: int = 1
    block_k: int = 1
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Row:
    """One row of the table: where it holds, what it says, why."""

    operation: str
    shape: str  # a shape class of the operation, or "any"
    families: tuple[str, ...]
    dtypes: tuple[str, ...]
    config: Config
    reason: str


TABLE = (
    Row(
        "contract",
        "tangents",
        FAMILIES,
        FLOATS,
        Config(32, 32, 32, warps=4, stages=2),
        "five accumulators of 32×32 take 40 registers a thread; two stages of six tiles fit 64 KiB of LDS",
    ),
    Row(
        "contract",
        "few rows",
        FAMILIES,
        FLOATS,
        Config(32, 32, 64, warps=4, stages=3),
        "a batch of 32 is one tile of rows: narrow columns and a deep step give programs enough to split",
    ),
    Row(
        "contract",
        "narrow",
        FAMILIES,
        FLOATS,
        Config(64, 32, 32, warps=4, stages=2),
        "32 columns or fewer (the first convolution): a wider tile would compute padding",
    ),
    Row(
        "contract",
        "any",
        FAMILIES,
        FLOATS,
        Config(64, 64, 32, warps=4, stages=3),
        "the largest tile without spills on every target; 48 KiB of stages fit gfx942's 64 KiB",
    ),
    Row(
        "wgrad",
        "narrow",
        FAMILIES,
        FLOATS,
        Config(32, 32, 64, warps=4, stages=2),
        "32 output channels or fewer, or a short patch (the first convolution): no padded rows, a deep step",
    ),
    Row(
        "wgrad",
        "any",
        FAMILIES,
        FLOATS,
        Config(64, 64, 32, warps=4, stages=2),
        "two accumulators (the segment and the total) of 64×64 take 64 registers a thread",
    ),
    Row("pool", "any", FAMILIES, FLOATS, Config(512, warps=4), "one element a lane, four a thread; bound by bandwidth"),
    Row("pointwise", "any", FAMILIES, FLOATS, Config(1024, warps=4), "128-bit loads, two a thread; bound by bandwidth"),
    Row("sample", "any", FAMILIES, FLOATS, Config(1024, warps=4), "one program a sample walks its features in blocks"),
    Row("combine", "any", FAMILIES, FLOATS, Config(256, warps=2), "small outputs: many programs hide the S loads"),
    Row("loss", "any", FAMILIES, FLOATS, Config(4096, warps=4), "elements of a block of logits in registers"),
)

_forced: list[str] = []
_tuned: dict[tuple[str, str, str, str], Config] = {}


def select(operation: str, shape: str, tensor: Tensor) -> Config:
    """The configuration for an operation on a shape class, on the chip and in the dtype of `tensor`.

    Raises LookupError when the table has no row for it.
    """
    family, dtype = chip(tensor.device), str(tensor.dtype).removeprefix("torch.")
    if (operation, shape, family, dtype) in _tuned:
        return _tuned[operation, shape, family, dtype]
    for row in TABLE:
        if (
            row.operation == operation
            and row.shape in (shape, "any")
            and family in row.families
            and dtype in row.dtypes
        ):
            return row.config
    raise LookupError(f"no configuration for {operation} ({shape}) in {dtype} on {family}")


def chip(device: torch.device) -> str:
    """The chip family of a device: its own, or the nearest older one in `FAMILIES`; sm_90 for the interpreter."""
    if _forced:
        return _forced[-1]
    return _family(device.index or 0) if device.type == "cuda" else "sm_90"


@cache
def _family(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return "gfx942" if properties.gcnArchName.startswith("gfx9") else "gfx1100"
    known = [int(name.removeprefix("sm_")) for name in NVIDIA]
    version = 10 * properties.major + properties.minor
    return f"sm_{max((sm for sm in known if sm <= version), default=known[0])}"


@contextmanager
def on_chip(family: str) -> Iterator[None]:
    """Select as if the tensors were on a chip of this family: for counting and compiling without one.

    Raises ValueError for a family that is not in the table.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown chip family {family!r}; the table has {', '.join(FAMILIES)}")
    _forced.append(family)
    try:
        yield
    finally:
        _forced.pop()


def multiprocessors(tensor: Tensor) -> int:
    """How many programs keep the chip of `tensor` busy."""
    return MULTIPROCESSORS[chip(tensor.device)]


def splits(tensor: Tensor, programs: int, steps: int) -> int:
    """Into how many parts to split a reduction of `steps` steps so that `programs` tiles fill the chip.

    A split costs a second launch and a workspace: it is not worth it for fewer than 16 steps, nor where a quarter of
    the chip is busy without; each part keeps four steps.
    """
    if steps < 16 or 4 * programs >= multiprocessors(tensor):
        return 1
    return max(1, min(multiprocessors(tensor) // max(programs, 1), steps // 4, 64))


def precision(tensor: Tensor) -> str:
    """How float32 products are computed: torch's setting for matrix products, `ieee` where the chip has no tf32."""
    allowed = torch.backends.cuda.matmul.allow_tf32 and chip(tensor.device) != "gfx1100"
    return "tf32" if allowed and tensor.dtype == torch.float32 else "ieee"
