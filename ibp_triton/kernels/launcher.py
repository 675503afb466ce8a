"""The one door through which every kernel is launched: it can be watched, and it can be left shut.

`recording()` collects a `Launch` for each launch of a block, with what it must move and compute; with
`execute=False` the kernels do not run, so that a whole training step can be counted, or compiled ahead of time for a
chip that is not there, in the time that its Python takes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from ibp_triton.kernels.tiles import Config

SPAN = 2**31 - 2**16  # offsets are 32-bit, and a last block counts beyond the end of its tensor


@dataclass(frozen=True)
class Cost:
    """What one launch must do, from the shapes alone; the interpreter's counts agree (a test)."""

    loaded: int  # bytes, each lane that is not masked off, as often as it is loaded
    stored: int  # bytes
    flops: int = 0  # multiplications and additions inside matrix products, without padding
    padded_flops: int = 0  # with the padding of the tiles
    pointers: dict[str, int] = field(default_factory=dict)  # bytes loaded through some of the pointers


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what was asked of it, and its cost."""

    kernel: Any  # the function under @triton.jit
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    config: Config
    cost: Cost

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @property
    def unique_bytes(self) -> int:
        """Bytes of the distinct tensors that the launch reads or writes: each address once.

        An upper bound: a kernel may leave a part of a tensor alone.
        """
        tensors = {(v.data_ptr(), v.numel()): v for v in self.arguments.values() if isinstance(v, Tensor)}
        return sum(v.numel() * v.element_size() for v in tensors.values())


_records: list[list[Launch]] = []
_shut: list[bool] = []


@contextmanager
def recording(execute: bool = True) -> Iterator[list[Launch]]:
    """Collect the launches of a block; with `execute=False` none of them runs and outputs hold rubbish."""
    record: list[Launch] = []
    _records.append(record)
    _shut.append(not execute)
    try:
        yield record
    finally:
        _records.remove(record)
        _shut.pop()


def launch(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], config: Config, cost: Cost) -> None:
    """Launch `kernel` on the device of its tensors; an empty grid launches nothing.

    Raises ValueError for a tensor whose last element lies `SPAN` elements or more behind its first, for tensors on
    several devices and for a grid that no chip accepts, and RuntimeError where kernels cannot run (no CUDA device, and
    no interpreter).
    """
    if 0 in grid:
        return
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.numel() > SPAN or (tensor.untyped_storage().nbytes() > SPAN and span(tensor) > SPAN):
            raise ValueError(
                f"{kernel.__name__}: {name} {tuple(tensor.shape)} by {tensor.stride()} spans more than {SPAN} "
                "elements, the reach of 32-bit offsets: use smaller batches, or a copy without gaps"
            )
    if max(grid[1:]) > 65535:
        raise ValueError(f"{kernel.__name__}: grid {grid} is over 65535 in its second or third axis")
    for record in _records:
        record.append(Launch(kernel, grid, arguments, config, cost))
    if any(_shut):
        return
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) != 1:
        raise ValueError(f"{kernel.__name__}: tensors on several devices: {sorted(map(str, devices))}")
    device = devices.pop()
    if device.type != "cuda" and not interpreted():
        raise RuntimeError(f"{kernel.__name__}: Triton kernels need a CUDA device (these tensors are on {device})")
    _run(kernel, grid, arguments, config, device)


def relaunch(launch: Launch) -> None:
    """A recorded launch once more, on the tensors that it had."""
    device = next(value.device for value in launch.arguments.values() if isinstance(value, Tensor))
    _run(launch.kernel, launch.grid, launch.arguments, launch.config, device)


def _run(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], config: Config, device: Any) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, num_warps=config.warps, num_stages=config.stages)


def span(tensor: Tensor) -> int:
    """Elements from the first to the last of a tensor, the gaps between them included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1" and bool(triton.knobs.runtime.interpret)


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)
