"""One CPU thread, CPU time as the clock, and rows that describe themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ibp_triton.bench.measure import device_time, machine


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The library versions and the processor, beside what pytest-benchmark finds out by itself."""
    machine_info["ibp_triton"] = machine()


@pytest.fixture
def measured(benchmark: Any, device: str) -> Callable[..., Any]:
    """``measured(run, **info)``: time ``run`` and store what it is with the figure."""

    def measure(run: Callable[[], Any], **info: Any) -> Any:
        benchmark.extra_info.update(machine(), device=device, **info)
        if device == "cuda":
            if benchmark.enabled:
                benchmark.extra_info["device_seconds"] = device_time(run)
            return benchmark(lambda: (run(), torch.cuda.synchronize()))
        benchmark._timer = time.process_time  # wall time is at the mercy of whatever else runs
        return benchmark(run)

    return measure


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and CUDA where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)
