"""Kernels in Triton's interpreter: every test here runs under the instruments of `ibp_triton.kernels.workbench.lab`."""

import os
import sys
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which must not have happened

import pytest
import torch

if "triton" in sys.modules:  # pragma: no cover - a guard on the order of collection
    import triton

    assert triton.knobs.runtime.interpret
    assert type(triton.language.sum).__name__ == "InterpretedFunction", "triton was imported before TRITON_INTERPRET=1"

from ibp_triton.kernels.workbench import lab
from ibp_triton.kernels.workbench.cases import allowing_tf32


@pytest.fixture(autouse=True)
def instruments(request: pytest.FixtureRequest) -> Iterator[list[lab.Observation]]:
    """Exact float32, every access checked, fresh memory filled with NaN, random numbers seeded by the test's name."""
    torch.manual_seed(sum(map(ord, request.node.name)))
    torch.use_deterministic_algorithms(True)  # with it, torch fills every torch.empty with NaN
    try:
        with allowing_tf32(False), lab.observe() as seen:
            yield seen
    finally:
        torch.use_deterministic_algorithms(False)
