"""Every norm of the case list, compiled for every chip family: no spills, and loads as wide as they can be."""

import pytest
import torch

from ibp_triton.kernels.workbench import aot, cases


def compiled(family, dtype, collect):
    """Launches with what came of them, each kernel once."""
    launches = cases.collected(family, dtype, False, collect)
    kernels = {aot.signature(launch): launch for launch in launches if launch.name != "combine"}
    return [(launch, aot.compile_launch(launch, family)) for launch in kernels.values()]


@pytest.mark.parametrize("collect", [cases.norm_cases, cases.replicated_norm_cases])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("sm_90", torch.float32), ("sm_90", torch.bfloat16), ("sm_90", torch.float16), ("gfx942", torch.bfloat16)],
)
def test_loads_are_as_wide_as_they_can_be(family, dtype, collect):
    """On the other chips the table's test compiles them."""
    found = compiled(family, dtype, collect)
    assert len(found) > 25
    for launch, built in found:
        what = f"{launch.name} {aot.signature(launch)[2]} {launch.config}: {built}"
        assert (built.spills, built.fits) == (0, True), what
        names = ("v", "r", "d") if launch.arguments.get("LANES", 1) > 1 else ("x", "v", "r", "d")
        images = [name for name in names if built.by_pointer.get(name)]  # x is the smaller part beside many tangents
        assert all(set(built.by_pointer[name]) == {128} for name in images), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [family for family in aot.CHIPS if family != "sm_90"])
@pytest.mark.slow
def test_those_of_replicas_spill_nothing(family, dtype):
    for launch, built in compiled(family, dtype, cases.replicated_norm_cases):
        assert launch.arguments["REPLICATED"]
        assert (built.spills, built.fits) == (0, True), f"{launch.name} {launch.config}: {built}"


def odd_cases(make):
    """One channel a group, odd pixels, channels first and last, odd rows: nothing that alignment helps."""
    images = make(32, 32, 13, 13)
    for x, groups in ((images, 32), (images.contiguous(), 32), (images.contiguous(), 8), (make(70, 53), 1)):
        weight = make(x.shape[1])
        _, statistics = cases.group_norm(x, groups, weight)
        v = torch.stack([x]) if x.is_contiguous() else x[None]
        cases.group_norm_vjp(v, x, statistics, groups, weight, sums=True)
        cases.group_norm_jvp(v, x, statistics, groups, weight, right=v)
        cases.group_norm_curvature(v, v, x, statistics, groups, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes_spill_nothing_either(dtype):
    for launch, built in compiled("sm_90", dtype, odd_cases):
        assert (built.spills, built.fits) == (0, True), f"{launch.name} {launch.arguments['VIEW']}: {built}"
