"""The host's part of a launch: what its Python costs, with a driver that launches nothing.

Inside `empty_driver("sm_90")` kernels are compiled for a chip that need not be there, as they would be on it, and take
CPU tensors. A launch comes back at once, from where Triton hands it to the launcher that it makes for each kernel: what
that takes (its own Python, the arguments' unpacking in C, the driver) is not in it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from ibp_triton.kernels import columns, conv, gates, gemm, loss, norm_seeds, norms, plans, pool, pooled_conv, wgrad
from ibp_triton.kernels.launcher import interpreted
from ibp_triton.kernels.workbench.aot import chip_named

FUNCTIONS: dict[ModuleType, tuple[str, ...]] = {  # that launch, and allocate what they return
    gemm: ("linear", "linear_vjp"),
    conv: ("conv2d", "conv2d_vjp"),
    wgrad: ("weight_gradient",),
    pool: ("max_pool2d", "pool2d_jvp", "pool2d_vjp"),
    pooled_conv: ("conv_max_pool", "conv_max_pool_jvp"),
    gates: ("relu",),
    loss: ("cross_entropy", "hessian_product", "objective"),
    norm_seeds: ("norm_seed", "fgsm_step", "fast_tbp_seed"),
    columns: ("batch_norm_project", "batch_norm_cross"),
    norms: ("group_norm", "group_norm_vjp", "group_norm_jvp", "group_norm_cross", "group_norm_curvature"),
}


class EmptyDriver(DriverBase):  # type: ignore[misc] # without types
    """A driver of Triton's for a chip that is not there, whose tensors are the CPU's.

    Args:
        name: a chip of `aot.CHIPS` or `aot.GUESTS`.
        launched: called in place of each launch, as Triton calls its launcher: grid (3), stream, function, packed and
            launch metadata, both hooks, then the kernel's arguments.
    """

    def __init__(self, name: str, launched: Callable[..., None]) -> None:
        super().__init__()
        chip = chip_named(name)
        self._target, self._launched, self._handles = chip.target, launched, count(1)
        properties = {"max_shared_mem": chip.shared}
        self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=lambda device: properties)

    def _load(self, *_: Any) -> tuple[Any, ...]:
        """A kernel's module and function, its registers and spills, the threads that it may have."""
        return self, next(self._handles), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What a compiled kernel is launched by."""
        return self._launched

    @staticmethod
    def is_active() -> bool:
        """Never found by a search for devices."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Asked for by nobody."""
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        """Nothing can be timed."""
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        """The chip."""
        return self._target

    def get_active_torch_device(self) -> torch.device:
        """Where its tensors are."""
        return torch.device("cpu")

    def get_current_device(self) -> Any:
        """Itself: Triton keeps compiled kernels by device, and no other may find those of this driver."""
        return self

    def get_current_stream(self, device: Any) -> int:
        """The default stream."""
        return 0


def _nothing(*_: Any) -> None:
    pass


@contextmanager
def empty_driver(name: str, launched: Callable[..., None] = _nothing) -> Iterator[None]:
    """A block in which launches of CPU tensors compile for a chip and run nothing; arguments as of `EmptyDriver`.

    Raises RuntimeError in an interpreting process.
    """
    if interpreted():
        raise RuntimeError("this process interprets kernels (TRITON_INTERPRET=1): measure in another one")
    plans.forget()
    driver.set_active(EmptyDriver(name, launched))
    try:
        yield
    finally:
        driver.set_active(None)  # found again when it is asked for
        plans.forget()


@contextmanager
def stopwatch() -> Iterator[list[tuple[str, int]]]:
    """Collect name and nanoseconds of CPU time of each call of `FUNCTIONS` in a block; the clock takes 0.4 µs of it."""
    seen: list[tuple[str, int]] = []
    stock = [(module, name, getattr(module, name)) for module, names in FUNCTIONS.items() for name in names]
    for module, name, function in stock:
        setattr(module, name, _timed(function, seen))
    try:
        yield seen
    finally:
        for module, name, function in stock:
            setattr(module, name, function)


def _timed(function: Callable[..., Any], seen: list[tuple[str, int]]) -> Callable[..., Any]:
    clock, name = time.thread_time_ns, function.__name__

    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        out = function(*args, **kwargs)
        seen.append((name, clock() - start))
        return out

    return timed
