"""The one door through which every kernel is launched: it can be watched, and it can be left shut.

`recording()` collects a `Launch` for each launch of a block, with what it must move and compute; with
`execute=False` the kernels do not run, so that a whole training step can be counted, or compiled ahead of time for a
chip that is not there, in the time that its Python takes.

A `LaunchPlan` is launched by Triton's own path the first time, which compiles it; from then on the compiled kernel is
called straight.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import reduce
from math import prod
from operator import or_
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from ibp_triton.kernels.tiles import Config

SPAN = 2**31 - 2**16  # offsets are 32-bit, and a last block counts beyond the end of its tensor
ALIGNED = 16  # bytes of an address that Triton makes kernels for


@dataclass(frozen=True)
class Cost:
    """What one launch must do, from the shapes alone; the interpreter's counts agree (a test)."""

    loaded: int  # bytes, each lane that is not masked off, as often as it is loaded
    stored: int  # bytes
    flops: int = 0  # multiplications and additions inside matrix products, without padding
    padded_flops: int = 0  # with the padding of the tiles
    pointers: dict[str, int] = field(default_factory=dict)  # bytes loaded through some; of 0, unused

    def times(self, replicas: int) -> "Cost":
        """That of so many in one launch."""
        pointers = {name: replicas * moved for name, moved in self.pointers.items()}
        counts = {f.name: replicas * getattr(self, f.name) for f in fields(self) if f.name != "pointers"}
        return Cost(**counts, pointers=pointers)


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
        used = {name: v for name, v in self.arguments.items() if self.cost.pointers.get(name) != 0}
        tensors = {(v.data_ptr(), v.numel()): v for v in used.values() if isinstance(v, Tensor)}.values()
        runs = [_run(v) for v in tensors if v.numel() == span(v)]  # without gaps: others may lie inside
        return sum(
            _distinct(v) * v.element_size()
            for v in tensors
            if not any(low <= v.data_ptr() and _run(v)[1] <= high and _run(v) != (low, high) for low, high in runs)
        )


class LaunchPlan:
    """A launch but for its tensors and the numbers that change: right for any tensors of the same layouts.

    Args:
        kernel: the function under @triton.jit; its first parameters are what changes, pointers and floats.
        grid: programs along three axes; one without any is never launched.
        constants: the other arguments by name.
        config: the tile, which holds the launch options.
        cost: of one launch.
        replicas: how many there are along the first axis of all tensors; if several, offsets need not reach from one to
            the next.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        constants: dict[str, Any],
        config: Config,
        cost: Cost,
        replicas: int = 1,
    ) -> None:
        self.kernel, self.grid, self.config, self.cost, self.replicas = kernel, grid, config, cost, replicas
        names = kernel.arg_names
        self.constants = tuple(constants[name] for name in names[len(names) - len(constants) :])
        self.ready: dict[tuple[bool, ...], Callable[..., None]] = {}  # compiled, by which addresses are aligned
        self.device: int | None = None  # on which it was compiled

    def arguments(self, changing: tuple[Any, ...]) -> dict[str, Any]:
        """All of the kernel's arguments, by name and in order."""
        return dict(zip(self.kernel.arg_names, (*changing, *self.constants), strict=True))


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


def launch(plan: LaunchPlan, *changing: Any) -> None:
    """Launch a plan on the device of its tensors; an empty grid launches nothing.

    Args:
        plan: made for tensors of these layouts.
        changing: the kernel's first arguments: tensors, and numbers as float or as tensors of one.

    Raises ValueError for a tensor whose last element lies `SPAN` elements or more behind its first, for tensors on
    several devices and for a grid that no chip accepts, and RuntimeError where kernels cannot run (no CUDA device, and
    no interpreter).
    """
    addresses = [value.data_ptr() for value in changing if type(value) is not float]
    # kernels differ by the alignment of addresses; nearly always all are aligned
    aligned = () if reduce(or_, addresses) % ALIGNED == 0 else tuple(a % ALIGNED == 0 for a in addresses)
    run = None if _records else plan.ready.get(aligned)
    if run is None:
        _launch_anew(plan, changing, aligned)
    elif plan.device is None or plan.device == torch.cuda.current_device():
        run(*changing, *plan.constants)
    else:
        with torch.cuda.device(plan.device):
            run(*changing, *plan.constants)


def _launch_anew(plan: LaunchPlan, changing: tuple[Any, ...], aligned: tuple[bool, ...]) -> None:
    """Check and record a launch, run it by Triton's own path, and keep the compiled kernel."""
    if 0 in plan.grid:
        return
    kernel, arguments = plan.kernel, plan.arguments(changing)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    for name, whole in tensors.items():
        tensor = whole[0] if plan.replicas > 1 else whole
        if tensor.numel() > SPAN or span(tensor) > SPAN:
            raise ValueError(
                f"{kernel.__name__}: {name} {tuple(tensor.shape)} by {tensor.stride()} spans more than {SPAN} "
                "elements, the reach of 32-bit offsets: use smaller batches, or a copy without gaps"
            )
    if max(plan.grid[1:]) > 65535:
        raise ValueError(f"{kernel.__name__}: grid {plan.grid} is over 65535 in its second or third axis")
    asked = Launch(kernel, plan.grid, arguments, plan.config, plan.cost)
    for record in _records:
        record.append(asked)
    if any(_shut):
        return
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) != 1:
        raise ValueError(f"{kernel.__name__}: tensors on several devices: {sorted(map(str, devices))}")
    device = devices.pop()
    if not _runs_on(device):
        raise RuntimeError(f"{kernel.__name__}: Triton kernels need a CUDA device (these tensors are on {device})")
    compiled = relaunch(asked)
    if isinstance(compiled, CompiledKernel):
        plan.device = device.index
        plan.ready[aligned] = compiled[plan.grid]


def relaunch(launch: Launch) -> Any:
    """A recorded launch once more, on the tensors that it had; the compiled kernel, None from the interpreter."""
    device = next(value.device for value in launch.arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return launch.kernel[launch.grid](**launch.arguments, **launch.config.options)


def span(tensor: Tensor) -> int:
    """Elements from the first to the last of a tensor, the gaps between them included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _run(tensor: Tensor) -> tuple[int, int]:
    """The addresses of its first byte and of the one behind its last."""
    return tensor.data_ptr(), tensor.data_ptr() + span(tensor) * tensor.element_size()


def _distinct(tensor: Tensor) -> int:
    """Elements, those along an axis of stride 0 once."""
    return min(tensor.numel(), prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride))


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1" and bool(triton.knobs.runtime.interpret)


def _runs_on(device: torch.device) -> bool:
    """Whether kernels run on a device: a CUDA device, any in the interpreter, and whatever Triton's driver drives."""
    if device.type == "cuda" or interpreted():
        return True
    try:
        return bool(triton.runtime.driver.active.get_active_torch_device().type == device.type)
    except RuntimeError:  # no driver: there is no device
        return False


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)
