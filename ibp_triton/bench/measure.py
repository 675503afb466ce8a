"""Timing that can be believed: candidates in turn, A B A B …, CPU time beside wall time, ratios round by round."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = Literal["cpu", "wall", "device"]
FLUSHED = 256 << 20  # bytes written before each call on CUDA, more than its L2 holds


@dataclass(frozen=True)
class Times:
    """Seconds of each round: of this process's CPU, of the wall clock and, on CUDA, of the device; ``clock`` counts.

    That is the device's on CUDA, else the CPU's, for wall time is at the mercy of whatever else runs; but several
    processes that wait for each other go by the wall clock.
    """

    clock: Clock
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """What counts."""
        return {"cpu": self.cpu, "wall": self.wall, "device": self.device}[self.clock]

    @property
    def median(self) -> float:
        """Of what counts."""
        return statistics.median(self.seconds)


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    clock: Clock = "cpu",
    tick: Callable[[], Any] = lambda: None,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, Times]:
    """Every candidate once a round, after ``warmup`` rounds off the clock.

    ``before`` is called before each call, off the clock, and ``tick`` after each round.
    """
    times, cuda = {name: Times(clock) for name in candidates}, clock == "device"
    flush = torch.empty(FLUSHED, dtype=torch.int8, device="cuda") if cuda else None
    for number in range(warmup + rounds):
        for name, run in candidates.items():
            if flush is not None:
                flush.zero_()
            before()
            found = _timed(run, cuda)
            if number >= warmup:
                for kept, seconds in zip((times[name].cpu, times[name].wall, times[name].device), found, strict=False):
                    kept.append(seconds)
        tick()
    return times


def _timed(run: Callable[[], Any], cuda: bool) -> tuple[float, ...]:
    """Seconds of one call: CPU, wall and, on CUDA, between two events."""
    if cuda:
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if not cuda:
        return time.process_time() - cpu, time.perf_counter() - wall
    stop.record()
    torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall, start.elapsed_time(stop) / 1e3


def cpu_seconds() -> float:
    """Of this process so far, and of the compilers that it ran and that have ended."""
    return sum(os.times()[:4])


def ratio(a: Times, b: Times) -> float:
    """The median over rounds of a / b: a drift of the machine's speed cancels."""
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def device_time(run: Callable[[], Any], rounds: int = 20) -> list[float]:
    """Seconds of each call on CUDA: warm-up, L2 flushed before each call, events around it."""
    return interleave({"run": run}, rounds, warmup=3, clock="device")["run"].device


class PeakMemory(TorchDispatchMode):
    """The largest number of bytes alive at once in tensors made inside (parameters and inputs not counted)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}  # with some that are gone
        self.size = self.peak = 0  # of all of these; of those alive at once

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id_of(tensor) not in given:
                storage = tensor.untyped_storage()
                _, before = self.alive.get(storage._cdata, (None, 0))
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.size += storage.nbytes() - before
        if self.size > self.peak:  # else those alive are no more than that either
            self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
            self.size = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.size)
        return result


def id_of(tensor: torch.Tensor) -> int:
    """What tells a tensor's storage from others."""
    return int(tensor.untyped_storage()._cdata)


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes."""
    run()
    mode = PeakMemory()
    with mode:
        kept = run()
    del kept
    return mode.peak


def machine() -> dict[str, Any]:
    """What figures are measured on."""
    return {
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def best_rate(dtype: torch.dtype) -> float:
    """Multiply-adds a second of the fastest of a large matrix product and the MNIST network's second convolution."""
    a = torch.randn(1024, 1024).to(dtype)
    x = torch.randn(32, 32, 12, 12).to(dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 32, 5, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    convolution = 32 * 144 * 64 * 32 * 25
    found = interleave({"gemm": lambda: a @ a, "conv": lambda: torch.conv2d(x, w, padding=2)}, rounds=15)
    return max(1024**3 / min(found["gemm"].cpu), convolution / min(found["conv"].cpu))
