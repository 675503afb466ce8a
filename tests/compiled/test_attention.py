"""Attention of up to 64 tokens, of more, and with wide heads, compiled for every chip family: no spills, wide loads."""

import pytest
import torch

from ibp_triton.kernels.workbench import aot, cases

CHIPS = [(family, dtype) for family in aot.CHIPS for dtype in ("float32", "tf32", "bfloat16", "float16")]
SPILLING = {"gfx1100": 128}  # width of heads from which a sweep spills


def launches(family, kind):
    """The cases' launches, tf32 being float32 whose products are."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    return cases.collected(family, dtype, kind == "tf32", cases.attention_cases)


KERNELS = [
    (family, kind, index)
    for family, kind in CHIPS
    if (family, kind) != ("gfx1100", "tf32")  # has none
    for index, launch in enumerate(launches(family, kind))
    if launch.arguments["SIZES"][3] < SPILLING.get(family, 1000)
]


@pytest.mark.parametrize(("family", "kind", "index"), KERNELS)
def test_a_kernel_spills_nothing(family, kind, index):
    """Registers, shared memory and matrix units; what a program holds is loaded 128 bits at a time."""
    launch = launches(family, kind)[index]
    built = aot.compile_launch(launch, family)
    what = f"{launch.name} {launch.arguments['SIZES']} {launch.config}: {built}"
    assert (built.spills, built.fits) == (0, True), what
    ffma = kind == "float32" and family != "gfx942"
    assert bool(built.matrix) != ffma, what
    held = ("k", "v") if launch.name == "pull_keys" else ("q", "d", "t_q")  # of 16 rows that it walks over 64 bits
    assert all(set(built.by_pointer[name]) == {128} for name in held if name in built.by_pointer), what
