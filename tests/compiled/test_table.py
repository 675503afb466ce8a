"""Every row of the table, compiled for every chip family it names: it fits, spills nothing, uses the matrix units."""

import pytest
import torch

from ibp_triton.kernels import aot, cases, config

KINDS = [("float32", False), ("float32", True), ("bfloat16", False), ("float16", False)]
SKIPPED = {("gfx1100", "float32", True)}  # no tf32 on RDNA3
PAIRS = [(f, d, tf32) for f in aot.CHIPS for d, tf32 in KINDS if (f, d, tf32) not in SKIPPED]


def unaligned(launch):
    """One channel in or out (the first convolution): rows that no 128-bit load can start at."""
    return 1 in (launch.arguments["C"], launch.arguments["J"])


@pytest.mark.parametrize(("family", "dtype", "tf32"), PAIRS)
@pytest.mark.slow
def test_the_table_compiles(family, dtype, tf32):
    """Up to 34 kernels each at 0.3 to 0.8 s; the compiler's cache makes a second run quick."""
    seen = set()
    for launch in cases.launches(family, getattr(torch, dtype), tf32):
        signature = aot.signature(launch)
        if signature in seen:
            continue
        seen.add(signature)
        built = aot.compile_launch(launch, family)
        what = f"{launch.name} {launch.config} {signature[2]}: {built}"
        assert built.fits, what
        assert built.spills == 0, what
        assert 0 < built.occupancy <= 1, what
        if launch.name in ("contract", "wgrad"):
            ffma = dtype == "float32" and not tf32 and family != "gfx942"  # no float32 matrix unit
            assert bool(built.matrix) != ffma, what
            assert unaligned(launch) or built.load_bits == 128, what
            assert unaligned(launch) or built.wide_share > 0.7, what
    assert len(seen) >= 12


def test_every_row_of_the_table_is_reached():
    reached = set()
    for family, dtype, tf32 in PAIRS:
        for launch in cases.launches(family, getattr(torch, dtype), tf32):
            reached.add(launch.config)
    assert {row.config for row in config.TABLE} == reached


def test_rows_have_reasons_and_select_takes_the_first():
    assert all(len(row.reason) > 10 for row in config.TABLE)
    x = torch.zeros(1)
    with config.on_chip("gfx1100"):
        assert config.select("contract", "any", x).group == 1
    with pytest.raises(LookupError, match="no configuration"):
        config.select("contract", "any", x.double())
    with pytest.raises(ValueError, match="unknown chip family"), config.on_chip("sm_61"):
        pass


def test_splits_fill_the_chip_and_never_run_empty():
    x = torch.zeros(1)
    assert config.splits(x, 8, 98) == 16
    assert config.splits(x, 33, 98) == 1  # a quarter of 132 multiprocessors is busy
    assert config.splits(x, 1, 15) == 1
    assert all(config.splits(x, 1, steps) <= max(1, steps // 4) for steps in range(200))


def test_the_compiled_process_does_not_run_kernels_on_a_cpu():
    from ibp_triton.kernels.gemm import linear

    with pytest.raises(RuntimeError, match="need a CUDA device"):
        linear(torch.zeros(1, 2, 3), torch.zeros(4, 3))
