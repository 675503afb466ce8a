"""Tile shapes, chosen by a table: operation, chip family, dtype and shape class, each row with its reason.

The first row that fits is taken, so that special cases stand above general ones. The reasons are static facts (the
compiler's registers, spills and shared memory, and the counted bytes) unless they say *measured*.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "gfx1100": 96}
NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = ("gfx942", "gfx1100")
HOPPER = ("sm_90", "sm_100")  # and later: matrix instructions of 64 rows and more
FAMILIES = NVIDIA + AMD
HALF = ("bfloat16", "float16")
FLOATS = ("float32", "tf32", *HALF)  # tf32: float32 whose products are


@dataclass(frozen=True)
class Config:
    """Tile of a program and its launch options; `block_k` is the depth of a step of the reduction."""

    block_m: int
    block_n: int = 1
    block_k: int = 1
    warps: int = 4
    stages: int = 3
    group: int = 5  # tangents of one program of a contraction: the five Lie operators share weights and masks
    registers: int = 0  # of a thread, at most; 0: as many as the compiler likes

    @property
    def options(self) -> dict[str, int]:
        """As Triton calls them."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages} | limit


@dataclass(frozen=True)
class TileRow:
    """One row of the table: where it holds, what it says, why."""

    operation: str
    shape: str  # a shape class of the operation, its part before a comma, or "any" in place of that
    families: tuple[str, ...]
    dtypes: tuple[str, ...]
    config: Config
    reason: str


TABLE = (
    # contract: rows are samples times positions, columns output channels, the depth channels times taps
    TileRow("contract", "one column, tangents", ("gfx942",), HALF, Config(32, 1, 32, warps=2, stages=2),
        "as below; 128-bit loads of 32×32 halves feed 128 threads, not 256"),
    TileRow("contract", "one column, tangents", FAMILIES, FLOATS, Config(32, 1, 32, warps=4, stages=2),
        "as below; five sums of 32×128 would spill"),
    TileRow("contract", "one column", FAMILIES, FLOATS, Config(32, 1, 128, warps=4, stages=2),
        "no matrix unit, 128-bit loads, few steps that wait for one another (the reverse to an image of one channel)"),
    TileRow("contract", "any", ("gfx1100",), ("float32",), Config(32, 32, 16, warps=4, stages=2, group=1),
        "no float32 matrix unit: products take registers; deeper steps or five accumulators spill (842 VGPRs)"),
    TileRow("contract", "tangents", ("gfx1100",), HALF, Config(32, 32, 32, warps=4, stages=2),
        "five accumulators of 32×32 take 165–197 of 256 VGPRs; a step of 64 spills"),
    TileRow("contract", "any", ("gfx1100",), HALF, Config(32, 32, 32, warps=4, stages=2),
        "no spills at any shape, 128-bit loads; 64×64 tiles spill"),
    TileRow("contract", "tangents", ("gfx942",), HALF, Config(32, 32, 32, warps=2, stages=2),
        "128-bit loads of 32×32 halves (weights, mask) feed 128 threads, not 256; as many waves fit (144–174 VGPRs)"),
    TileRow("contract", "tangents", NVIDIA, ("float32",), Config(32, 32, 32, warps=8, stages=2),
        "FFMA alone: 66–80 registers (126 on sm_100); 4 warps take up to 164, or spill on sm_80"),
    TileRow("contract", "tangents", FAMILIES, FLOATS, Config(32, 32, 32, warps=4, stages=2),
        "five accumulators of 32×32 take 40 registers a thread; two stages of six tiles fit 64 KiB of LDS; in halves a "
        "step of 64 spills 8 to 32 bytes in the first convolution"),
    TileRow("contract", "few rows", ("gfx942",), HALF, Config(32, 32, 64, warps=2, stages=2),
        "as below; 128-bit loads of a mask of 32×32 halves feed 128 threads, not 256"),
    TileRow("contract", "few rows", FAMILIES, FLOATS, Config(32, 32, 64, warps=4, stages=3),
        "a batch of 32 is one tile of rows: narrow columns and a deep step give programs enough to split"),
    TileRow("contract", "shallow", ("gfx942",), HALF, Config(64, 32, 16, warps=1, stages=2),
        "as below; 128-bit loads of a weight tile of 16×32 halves feed 64 threads"),
    TileRow("contract", "shallow", NVIDIA, HALF, Config(64, 32, 16, warps=2, stages=2),
        "as below; 64 threads take 128 bits of the weights each; HGMMA wants 4 warps, and would leave them at 64"),
    TileRow("contract", "shallow", ("gfx942",), FLOATS, Config(64, 32, 16, warps=2, stages=2),
        "as below; 128-bit loads of a weight tile of 16×32 floats feed 128 threads"),
    TileRow("contract", "shallow", NVIDIA, FLOATS, Config(64, 32, 16, warps=4, stages=3),
        "a patch of 16 (the first convolution on one channel) is one step; a deeper one would load padding; with two "
        "stages ptxas takes 72 registers and spills 8 bytes on sm_80"),
    TileRow("contract", "narrow, tall", HOPPER, HALF, Config(256, 32, 64, warps=8, stages=2, registers=128),
        "as below; without the limit ptxas is content with 64 registers on sm_100, and spills 32 bytes"),
    TileRow("contract", "narrow, tall", HOPPER, ("tf32",), Config(256, 32, 32, warps=8, stages=1),
        "as below, and each tile of rows reads all weights anew"),
    TileRow("contract", "narrow", FAMILIES, HALF, Config(64, 32, 64, warps=4, stages=2),
        "32 columns or fewer; a step of 64 halves fills 128-bit loads on gfx942's 256 threads"),
    TileRow("contract", "narrow", HOPPER, ("tf32",), Config(64, 32, 64, warps=8, stages=1),
        "as by columns, below; few steps that wait for one another"),
    TileRow("contract", "narrow", FAMILIES, FLOATS, Config(64, 32, 32, warps=4, stages=2),
        "32 columns or fewer (the first convolution): a wider tile would compute padding"),
    TileRow("contract", "by columns, tall", HOPPER, ("tf32",), Config(256, 64, 32, warps=8, stages=1),
        "as by columns, below, and each tile of rows reads all weights anew"),
    TileRow("contract", "by columns, large", HOPPER, ("tf32",), Config(128, 128, 32, warps=8, stages=1),
        "as by columns, below, and large: half the bytes of 64×64"),
    TileRow("contract", "by columns", HOPPER, ("tf32",), Config(64, 64, 32, warps=4, stages=1),
        "tf32 HGMMA wants the depth contiguous, and asynchronous copies would transpose the weight 32 bits at a time: "
        "one stage loads 128 bits, and transposes on the way from registers"),
    TileRow("contract", "any, tall", HOPPER, ("tf32", *HALF), Config(256, 64, 32, warps=8, stages=2),
        "32768 rows or more, 64 columns or fewer: each tile of rows reads all weights anew"),
    TileRow("contract", "any, large", HOPPER, ("tf32",), Config(128, 128, 32, warps=8, stages=3),
        "tiles enough for the chip in half the bytes of 64×64; 100 to 127 registers"),
    TileRow("contract", "any, large", HOPPER, HALF, Config(128, 128, 64, warps=8, stages=2), "as above, in halves"),
    TileRow("contract", "any", HOPPER, ("tf32",), Config(64, 64, 64, warps=8, stages=2),
        "few steps that wait for one another; 4 warps take 126 registers"),
    TileRow("contract", "any", NVIDIA, ("float32",), Config(64, 64, 16, warps=8, stages=2),
        "FFMA alone: 4 warps take up to 162 registers, or spill, for 64×64; a third stage spills at 3 channels"),
    TileRow("contract", "any", FAMILIES, FLOATS, Config(64, 64, 32, warps=4, stages=3),
        "the largest tile without spills on every target; 48 KiB of stages fit gfx942's 64 KiB"),
    # wgrad: rows are output channels, columns channels times taps, the depth samples times positions
    TileRow("wgrad", "any", ("gfx1100",), ("float32",), Config(32, 32, 16, warps=4, stages=2),
        "no float32 matrix unit: 64×64 spills 2500 VGPRs, this takes 150"),
    TileRow("wgrad", "any", ("gfx1100",), HALF, Config(32, 32, 32, warps=4, stages=2),
        "117 of 256 VGPRs, 128-bit loads"),
    TileRow("wgrad", "narrow", NVIDIA, ("float32",), Config(32, 32, 32, warps=8, stages=2),
        "FFMA alone: with the push of a + βt, 4 warps or a step of 64 take 255 registers and spill 400 bytes"),
    TileRow("wgrad", "narrow, short", NVIDIA, ("tf32", *HALF), Config(32, 16, 64, warps=4, stages=2),
        "a patch of 16 (the first convolution on one channel): a tile of 32 columns would be half padding"),
    TileRow("wgrad", "narrow", FAMILIES, FLOATS, Config(32, 32, 64, warps=4, stages=2),
        "32 output channels or fewer, or a short patch (the first convolution): no padded rows, a deep step"),
    TileRow("wgrad", "any", HOPPER, ("tf32",), Config(64, 128, 32, warps=8, stages=1),
        "both operands are contiguous along the other axis than tf32 HGMMA wants: one stage, as in contract; "
        "fewer tiles read each operand anew"),
    TileRow("wgrad", "any", HOPPER, HALF, Config(64, 128, 32, warps=8, stages=2, registers=128),
        "fewer tiles read each operand anew; without the limit ptxas is content with 80 registers for replicas on "
        "sm_100, and spills 16 bytes"),
    TileRow("wgrad", "any", NVIDIA, ("float32",), Config(64, 64, 16, warps=8, stages=3),
        "FFMA alone: with the push of a + βt, 4 warps or a step of 32 reach 255 registers and spill"),
    TileRow("wgrad", "any", FAMILIES, FLOATS, Config(64, 64, 32, warps=4, stages=2),
        "two accumulators (the segment and the total) of 64×64 take 64 registers a thread"),
    TileRow("pooled conv", "any", ("sm_100",), HALF, Config(32, 32, warps=8),
        "as below, for twice the windows: with 4 warps ptxas takes 96 registers in float16, and spills 216 bytes"),
    TileRow("pooled conv", "any", FAMILIES, FLOATS, Config(16, 32, warps=4),
        "a thread holds one window's patch and the taps of four columns: 127–138 registers; two windows take 255"),
    TileRow("pool", "any", FAMILIES, FLOATS, Config(512, warps=4),
        "one element a lane, four a thread; bound by bandwidth"),
    TileRow("pointwise", "any", FAMILIES, FLOATS, Config(1024, warps=4), "128-bit loads, two a thread; bandwidth"),
    TileRow("sample", "any", FAMILIES, FLOATS, Config(1024, warps=4),
        "one program a sample walks its features in blocks"),
    TileRow("objective", "any", FAMILIES, FLOATS, Config(8192, warps=16), "one program: wide loads, few steps"),
    TileRow("combine", "many parts", FAMILIES, FLOATS, Config(32, block_k=64, warps=4),
        "64 parts or more are a small gradient's (the first convolution): few rounds that wait for one another"),
    TileRow("combine", "several", FAMILIES, FLOATS, Config(64, block_k=32, warps=2),
        "gradients of all sizes and numbers of parts: runs of 256 bytes, few rounds"),
    TileRow("combine", "any", FAMILIES, FLOATS, Config(256, block_k=8, warps=2),
        "small outputs: many programs hide the S loads, eight of which are under way together"),
    TileRow("norm", "long", NVIDIA, FLOATS, Config(8192, warps=16, registers=128),
        "a row of 4096 to 8192 numbers, 16 a thread: x̂, γ, a tangent and two sums take 128 registers at most; without "
        "the limit ptxas is content with 64 in bfloat16, and spills 16 bytes"),
    TileRow("norm", "long", AMD, FLOATS, Config(8192, warps=16), "as above; 8 numbers a thread of gfx942"),
    TileRow("norm", "middle", NVIDIA, FLOATS, Config(4096, warps=8, registers=128),
        "as above, for rows of 1024 to 4096 numbers"),
    TileRow("norm", "middle", AMD, FLOATS, Config(4096, warps=8), "as above, for AMD"),
    TileRow("norm", "any", NVIDIA, FLOATS, Config(1024, warps=4, registers=128),
        "short rows, several a tile, 8 numbers a thread: 40 to 64 registers; without the limit some spill 8 bytes"),
    TileRow("norm", "any", ("gfx942",), HALF, Config(1024, warps=2),
        "as below; 128-bit loads of 1024 halves feed 128 threads, not 256"),
    TileRow("norm", "any", AMD, FLOATS, Config(1024, warps=4), "as above, for AMD"),
    TileRow("columns", "sums", NVIDIA, FLOATS, Config(4096, warps=8, registers=128),
        "two sums and a tangent of 16 numbers a thread, the tangents among them; the limit as for norms"),
    TileRow("columns", "any", NVIDIA, FLOATS, Config(2048, warps=8, registers=128), "8 numbers a thread; bandwidth"),
    TileRow("columns", "sums", AMD, FLOATS, Config(4096, warps=8), "as above, for AMD"),
    TileRow("columns", "any", AMD, FLOATS, Config(2048, warps=4), "as above, for AMD"),
    # attention: rows are queries, columns keys, the other way round for "keys"; an operand's depth is a head's width
    TileRow("attention", "any", ("gfx1100",), ("float32",), Config(32, 16, warps=16, stages=1),
        "no float32 matrix unit: 193 to 225 of 256 VGPRs; 32 keys spill in both sweeps"),
    TileRow("attention", "any", ("gfx1100",), HALF, Config(32, 16, warps=8, stages=1),
        "107 to 240 of 256 VGPRs; both sweeps spill with 64 queries and with 32 keys"),
    TileRow("attention", "wide", NVIDIA, ("float32",), Config(16, 16, warps=16, stages=1, registers=128),
        "heads of 65 to 128 numbers, FFMA alone: 64 to 105 registers; 32 queries spill"),
    TileRow("attention", "wide", NVIDIA, FLOATS, Config(32, 32, warps=8, stages=1, registers=255),
        "heads of 65 to 128 numbers: 114 to 216 registers; 64 queries spill"),
    TileRow("attention", "wide", ("gfx942",), FLOATS, Config(32, 16, warps=8, stages=1),
        "heads of 65 to 128 numbers: 64 queries or 32 keys spill"),
    TileRow("attention", "sweep, long", ("gfx942",), FLOATS, Config(64, 32, warps=4, stages=1),
        "288 registers in float32; 64 keys spill"),
    TileRow("attention", "any", ("gfx942",), FLOATS, Config(64, 64, warps=4, stages=1),
        "up to 394 of 512 registers, where MFMA accumulates; 16 KiB of LDS; as below for 64 queries"),
    TileRow("attention", "short", NVIDIA, ("float32",), Config(64, 64, warps=16, stages=1, registers=128),
        "FFMA alone, both operands from shared memory: 92 to 128 registers; 8 warps spill; as below for 64 queries"),
    TileRow("attention", "sweep, long", ("sm_100",), ("float32",), Config(32, 32, warps=8, stages=1, registers=255),
        "as below; with 16 warps ptxas spills 8 bytes"),
    TileRow("attention", "sweep, long", NVIDIA, ("float32",), Config(32, 32, warps=16, stages=1, registers=128),
        "FFMA alone: 126 registers; 64 queries spill 16 bytes on sm_90"),
    TileRow("attention", "any", NVIDIA, ("float32",), Config(64, 32, warps=16, stages=1, registers=128),
        "FFMA alone: 90 to 116 registers; 64 keys spill 8 bytes on sm_100, forward"),
    TileRow("attention", "short", NVIDIA, FLOATS, Config(64, 64, warps=4, stages=1, registers=255),
        "one tile holds up to 64 queries and keys: Q, K, V and P stay for all tangents; 98 to 255 registers"),
    TileRow("attention", "forward, long", NVIDIA, FLOATS, Config(256, 32, warps=8, stages=1, registers=255),
        "K and V are read once for 256 queries: 125 to 216 registers"),
    TileRow("attention", "sweep, long", NVIDIA, HALF, Config(256, 16, warps=8, stages=1, registers=255),
        "as above, with t_Q beside Q and two tiles of scores: 206 to 246 registers; 32 keys spill on sm_80"),
    TileRow("attention", "reverse, long", ("sm_90", "sm_100"), HALF, Config(256, 32, warps=8, stages=1, registers=255),
        "as above; up to 256 queries d_K and d_V are whole in one launch"),
    TileRow("attention", "reverse, long", NVIDIA, HALF, Config(128, 32, warps=8, stages=1, registers=255),
        "256 queries spill 24 bytes on sm_80"),
    TileRow("attention", "keys, long", ("sm_90", "sm_100"), HALF, Config(64, 64, warps=4, stages=1, registers=255),
        "two sums of 64×64 take 64 registers a thread"),
    TileRow("attention", "keys, long", NVIDIA, FLOATS, Config(32, 32, warps=8, stages=1, registers=255),
        "tf32, and half precision on sm_80: 134 to 140 registers; 64 keys spill on sm_80"),
    TileRow("attention", "any", NVIDIA, FLOATS, Config(128, 16, warps=8, stages=1, registers=255),
        "tf32 of more than 64 queries, both sweeps: 150 to 233 registers; 256 queries spill"),
    TileRow("loss", "any", FAMILIES, FLOATS, Config(1024, warps=4), "4096 logits a program would take 201 registers"),
)  # fmt: skip

_CUDNN: Any = torch.backends.cudnn  # its settings are made at run time
_MATMUL, _CONVOLUTIONS = torch.backends.cuda.matmul, _CUDNN.conv
_setting = torch._C._get_fp32_precision_getter  # what their `fp32_precision` asks, in a quarter of its time
_forced: list[str] = []
Key = tuple[str, str, str, str, tuple[int, ...]]  # operation, shape class, chip family, dtype, sizes
tuned: dict[Key, Config] = {}  # what `autotune` found stands above the table
watchers: list[set[Key]] = []


def select(operation: str, shape: str, tensor: Tensor, sizes: tuple[int, ...] = ()) -> Config:
    """The configuration for an operation on a shape class, on the chip and in the dtype of `tensor`.

    `sizes`, those of the operation with the batch in them, tell what was tuned apart; the table looks at the class.

    Raises LookupError when the table has no row for it.
    """
    family, dtype = chip(tensor.device), str(tensor.dtype).removeprefix("torch.")
    if precision(tensor) == "tf32":
        dtype = "tf32"
    key = (operation, shape, family, dtype, sizes)
    for watcher in watchers:
        watcher.add(key)
    if key in tuned:
        return tuned[key]
    kind, _, size = shape.partition(", ")
    names = (shape, kind, f"any, {size}", "any")
    for row in TABLE:
        if row.operation == operation and row.shape in names and family in row.families and dtype in row.dtypes:
            return row.config
    raise LookupError(f"no configuration for {operation} ({shape}) in {dtype} on {family}")


def surroundings() -> tuple[str | None, str, str]:
    """What decides tiles and precision beside the tensors and what was tuned: the chip asked for, torch's settings."""
    return _forced[-1] if _forced else None, _setting("cuda", "matmul"), _setting("cuda", "conv")


def chip(device: torch.device) -> str:
    """The chip family whose rows serve a device; sm_90 for the interpreter."""
    if _forced:
        return _forced[-1]
    return _device(device.index).family if device.type == "cuda" else "sm_90"


@dataclass(frozen=True)
class _Device:
    """What is asked of a real device."""

    family: str
    tf32: bool  # whether its matrix units have it
    multiprocessors: int


@cache
def _device(index: int | None) -> _Device:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    count = properties.multi_processor_count
    if torch.version.hip:
        name = properties.gcnArchName
        return _Device("gfx942" if name.startswith("gfx9") else "gfx1100", name.startswith("gfx94"), count)
    # 12.x has Ampere's matrix instructions and shared memory, not those of 10.x; else the nearest older family
    version = 80 if properties.major >= 12 else 10 * properties.major + properties.minor
    known = [int(name.removeprefix("sm_")) for name in NVIDIA]
    family = f"sm_{max((sm for sm in known if sm <= version), default=known[0])}"
    return _Device(family, properties.major >= 8, count)


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
    if tensor.device.type == "cuda" and not _forced:
        return _device(tensor.device.index).multiprocessors
    return MULTIPROCESSORS[chip(tensor.device)]


def splits(tensor: Tensor, programs: int, steps: int) -> int:
    """Into how many parts to split a reduction of `steps` steps so that `programs` tiles fill the chip twice over.

    A split costs a second launch and a workspace: it is not worth it for fewer than 16 steps, nor where half of the
    chip is busy without; each part keeps four steps. Two programs a multiprocessor are predicted best (Loss IBP on
    MNIST, H100, low end): at three and four a step takes up to 9 % more, for larger workspaces.
    """
    chip = multiprocessors(tensor)
    if steps < 16 or 2 * programs >= chip:
        return 1
    return max(1, min(2 * chip // max(programs, 1), steps // 4))


def precision(tensor: Tensor) -> str:
    """How the products of a float32 tensor are computed: `tf32` where torch's setting and the chip say so, or `ieee`.

    The setting is that of torch's own operation: cuDNN's convolutions for images [..., C, H, W], matrix products for
    the rest. AMD's convolutions have none and follow the matrix products'. It is read by `fp32_precision`, which knows
    what was set by `allow_tf32` too, while `allow_tf32` can't be read once the other was set.
    """
    if tensor.dtype != torch.float32:
        return "ieee"
    family = chip(tensor.device)
    exists = _device(tensor.device.index).tf32 if tensor.device.type == "cuda" and not _forced else family != "gfx1100"
    image = tensor.dim() > 3 and family in NVIDIA
    setting = _CONVOLUTIONS if image else _MATMUL
    return "tf32" if exists and setting.fp32_precision == "tf32" else "ieee"
