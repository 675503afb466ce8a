"""Every row of the table, compiled for every chip family it names: it fits, spills nothing, uses the matrix units."""

from collections import Counter

import pytest
import torch
from triton.compiler.errors import CompilationError

from ibp_triton.kernels import tiles
from ibp_triton.kernels.conv import conv2d, conv2d_vjp
from ibp_triton.kernels.gemm import linear, linear_vjp
from ibp_triton.kernels.geometry import ONE, Geometry
from ibp_triton.kernels.launcher import recording
from ibp_triton.kernels.wgrad import Segment, weight_gradient
from ibp_triton.kernels.workbench import aot, cases

KINDS = [("float32", False), ("float32", True), ("bfloat16", False), ("float16", False)]
SKIPPED = {("gfx1100", "float32", True)}  # no tf32 on RDNA3
PAIRS = [(f, d, tf32) for f in aot.CHIPS for d, tf32 in KINDS if (f, d, tf32) not in SKIPPED]
OTHERS = [(f, d, tf32) for f, d, tf32 in PAIRS if f in ("sm_90", "gfx942") and d != "float16"]


def narrow_only_where_alignment_demands_it(launch, built, what):
    """Every load of an operand is 128 bits wide, or none is and its shape and strides do not allow it."""
    allowed = aot.wide_operands(launch)
    found = {name: set(built.by_pointer[name]) == {128} for name in allowed}
    assert found == allowed, f"{what} allowed {allowed}"
    return allowed


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
        through = sum((Counter(loads) for loads in built.by_pointer.values()), Counter())
        scalar = through - Counter(built.loads)  # AMD has a unit for numbers that all lanes read
        assert through == Counter(built.loads) + scalar, what
        assert not scalar or (family in tiles.AMD and set(scalar) == {32}), what
        if launch.name in ("contract", "wgrad"):
            ffma = dtype == "float32" and not tf32 and family != "gfx942"  # no float32 matrix unit
            assert bool(built.matrix) != (ffma or launch.arguments.get("COLUMN", False)), what
            allowed = narrow_only_where_alignment_demands_it(launch, built, what)
            one_channel = 1 in (launch.arguments["C"], launch.arguments["J"])  # the first convolution
            assert all(allowed.values()) != one_channel, what
    assert len(seen) >= 12


@pytest.mark.parametrize(("family", "dtype", "tf32"), [pair for pair in PAIRS if pair[1] != "float16"])
@pytest.mark.slow
def test_kernels_of_replicas_compile_as_those_of_one(family, dtype, tf32):
    """No spills, and every load of an operand as wide as alignment allows."""
    launches = cases.collected(family, getattr(torch, dtype), tf32, cases.replicated_cases)
    assert all(launch.arguments["REPLICATED"] for launch in launches)
    for launch in {aot.signature(launch): launch for launch in launches}.values():
        built = aot.compile_launch(launch, family)
        what = f"{launch.name} {launch.config} {launch.grid}: {built}"
        assert (built.fits, built.spills) == (True, 0), what
        if launch.name in ("contract", "wgrad"):
            narrow_only_where_alignment_demands_it(launch, built, what)


FAMILY = {"sm_89": "sm_80", "sm_120": "sm_80", "gfx90a": "gfx942", "gfx950": "gfx942"}  # whose rows serve a chip


@pytest.mark.parametrize("name", aot.GUESTS)
def test_chips_without_rows_of_their_own(name, monkeypatch):
    """Linear layers and their weight gradients: they fit; tf32 is no type of gfx90a and gfx950, and never asked for."""
    family = FAMILY[name]
    monkeypatch.setattr(cases, "matrix_cases", linear_cases)
    monkeypatch.setattr(cases, "other_cases", lambda make: None)
    monkeypatch.setattr(cases, "norm_cases", lambda make: None)
    for dtype in (torch.float32, torch.bfloat16):
        for launch in cases.launches(family, dtype):
            built = aot.compile_launch(launch, name)
            assert (built.fits, built.spills) == (True, 0), f"{launch.name} {dtype} {launch.config}: {built}"
    tf32 = [launch for launch in cases.launches(family, torch.float32, True) if launch.name == "contract"]
    for launch in tf32:
        if aot.GUESTS[name].target.backend == "cuda":
            assert aot.compile_launch(launch, name).matrix == "HMMA"
        else:
            with pytest.raises(CompilationError):
                aot.compile_launch(launch, name)


def linear_cases(make):
    """A layer at batch 32, and its weight gradient."""
    x, w, d = make(1, 32, 3136), make(256, 3136), make(1, 32, 256)
    linear(x, w)
    linear_vjp(d, w)
    weight_gradient([Segment(1.0, x[0], d[0], bias=True)], w, ONE)


def other_channels(make, channels, outputs):
    """A few rows of the table at an odd batch of 7 and any number of channels."""
    geometry = Geometry.conv((9, 9), (3, 3), (1, 1), (1, 1), (1, 1))
    x, w, d = make(2, 7, channels, 9, 9), make(outputs, channels, 3, 3), make(2, 7, outputs, 9, 9)
    conv2d(x, w, geometry, mask=d[0])
    conv2d_vjp(d[:1], w, geometry, x[0])
    weight_gradient([Segment(1.0, x[0], d[0], bias=True), Segment(0.1, x[1], d[1])], w, geometry)
    x, w, d = make(2, 7, channels), make(outputs, channels), make(2, 7, outputs)
    linear(x[:1], w, mask=d[0])
    linear_vjp(d, w, x[0])
    weight_gradient([Segment(1.0, x[0], d[0], bias=True), Segment(0.1, x[1], d[1])], w, ONE)


@pytest.mark.parametrize(("family", "dtype", "tf32"), OTHERS)
@pytest.mark.slow
def test_load_widths_at_other_numbers_of_channels(family, dtype, tf32):
    """24 and 40 allow 128 bits in every dtype, 20 and 12 in float32, 3 and 10 never; none is a multiple of 16."""
    for channels, outputs in ((24, 40), (20, 12), (3, 10)):
        with tiles.on_chip(family), cases.allowing_tf32(tf32), recording(execute=False) as launches:
            other_channels(cases.zeros(getattr(torch, dtype)), channels, outputs)
        for launch in launches:
            if launch.name not in ("contract", "wgrad"):
                continue
            built = aot.compile_launch(launch, family)
            what = f"{launch.name} {channels}→{outputs} {launch.config}: {built}"
            assert built.fits, what
            assert built.spills == 0, what
            allowed = narrow_only_where_alignment_demands_it(launch, built, what)
            fits = [n * (4 if dtype == "float32" else 2) % 16 == 0 for n in (channels, outputs)]
            assert all(allowed.values()) == all(fits), what


def test_every_row_of_the_table_is_reached():
    reached = set()
    for family, dtype, tf32 in PAIRS:
        for launch in cases.launches(family, getattr(torch, dtype), tf32):
            reached.add(launch.config)
        others = cases.collected(family, getattr(torch, dtype), tf32, cases.attention_cases)
        reached |= {launch.config for launch in others}
    assert {row.config for row in tiles.TABLE} == reached


def test_rows_have_reasons_and_select_takes_the_first():
    assert all(len(row.reason) > 10 for row in tiles.TABLE)
    x = torch.zeros(1)
    with tiles.on_chip("gfx1100"):
        assert tiles.select("contract", "any", x).group == 1
        narrow = tiles.select("contract", "narrow", x.half())
        assert tiles.select("contract", "narrow, tall", x.half()) == narrow  # no row for the size: that for any
    with tiles.on_chip("sm_90"):
        assert tiles.select("contract", "narrow, tall", x.half()).block_m == 256
        assert tiles.select("contract", "by columns, tall", x.half()).block_m == 256
    with pytest.raises(LookupError, match="no configuration"):
        tiles.select("contract", "any", x.double())
    with pytest.raises(ValueError, match="unknown chip family"), tiles.on_chip("sm_61"):
        pass


def test_splits_fill_the_chip_and_never_run_empty():
    x = torch.zeros(1)
    assert tiles.splits(x, 8, 98) == 24  # no more, for four steps each
    assert tiles.splits(x, 8, 980) == 33  # two programs for each of 132 multiprocessors
    assert tiles.splits(x, 1, 5000) == 264
    assert tiles.splits(x, 64, 196) == 4
    assert tiles.splits(x, 66, 98) == 1  # half of them are busy
    assert tiles.splits(x, 1, 15) == 1
    assert all(tiles.splits(x, 1, steps) <= max(1, steps // 4) for steps in range(200))


def test_the_compiled_process_does_not_run_kernels_on_a_cpu():
    from ibp_triton.kernels.gemm import linear

    with pytest.raises(RuntimeError, match="need a CUDA device"):
        linear(torch.zeros(1, 2, 3), torch.zeros(4, 3))
