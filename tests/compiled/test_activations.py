"""Linear layers with smooth activations, compiled for every chip family: no spills, loads as wide as those without."""

import pytest
import torch

from ibp_triton.kernels import tiles
from ibp_triton.kernels.gemm import linear, linear_activation, linear_vjp
from ibp_triton.kernels.launcher import recording
from ibp_triton.kernels.smooth import Activation
from ibp_triton.kernels.workbench import aot, cases


def kernels(family, dtype, collect):
    """One launch for each kernel."""
    launches = cases.collected(family, dtype, False, collect)
    return {aot.signature(launch): launch for launch in launches}.values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", aot.CHIPS)
@pytest.mark.slow
def test_nothing_spills(family, dtype):
    """Some 30 kernels at 0.4 to 1 s; the compiler's cache makes a second run quick."""
    stored, read = 0, 0
    for launch in kernels(family, dtype, cases.activation_cases):
        built = aot.compile_launch(launch, family)
        what = f"{launch.name} {aot.signature(launch)[2]} {launch.config}: {built}"
        assert (built.fits, built.spills) == (True, 0), what
        stored += launch.arguments["ACTIVATION"] > 0
        read += launch.arguments.get("FACTOR", False)
        if launch.name == "curve":
            few = (
                family == "gfx942" and dtype != torch.float32
            )  # 1024 halves for 256 threads, as every pointwise kernel
            assert all(set(built.by_pointer[name]) == {64 if few else 128} for name in "dtz"), what
        if launch.name == "contract":
            allowed = aot.wide_operands(launch)
            assert {name: set(built.by_pointer[name]) == {128} for name in allowed} == allowed, what
    assert stored >= 3 * 3
    assert read >= 6


def test_an_epilogue_costs_what_it_reads_and_stores():
    """The slope once, beside what the same product moves without; a ViT-tiny's block."""
    make = cases.zeros(torch.bfloat16)
    x, w, d, v, slope = make(1, 6304, 192), make(768, 192), make(1, 6304, 192), make(192, 768), make(6304, 768)
    with tiles.on_chip("sm_90"), recording(execute=False) as launches:
        linear(x, w)
        linear_activation(x, w, None, Activation.GELU)
        linear(x, w, slope=slope)
        linear_vjp(d, v)
        linear_vjp(d, v, slope=slope)
    plain, forward, sweep, back, reverse = (launch.cost.loaded + launch.cost.stored for launch in launches)
    bytes_ = slope.numel() * slope.element_size()
    assert [forward - plain, sweep - plain, reverse - back] == [bytes_] * 3
