"""The instrumented interpreter finds planted bugs, stays silent without them, and counts right."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from ibp_triton.kernels.workbench import lab


@triton.jit
def copy(x, out, n, SHIFT: tl.constexpr, MASKED: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if OTHER:  # noqa: SIM108 - statements are chosen at compile time
        v = tl.load(x + i + SHIFT, mask=i < n, other=0.0)
    else:
        v = tl.load(x + i + SHIFT, mask=i < n)
    tl.store(out + i, v, mask=(i < n) if MASKED else (i < BLOCK * tl.num_programs(0)))


@triton.jit
def overlap(x, out, READS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if READS:
        tl.store(out + tl.program_id(0) * BLOCK + i, tl.load(x + i))
        tl.store(x + i, tl.zeros((BLOCK,), tl.float32), mask=(i < 1) & (tl.program_id(0) == 1))
    else:
        tl.store(out + tl.program_id(0) + i, tl.load(x + i))


@triton.jit
def collide(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, tl.load(x + i))


@triton.jit
def count(out):
    tl.atomic_add(out, 1.0)


@triton.jit
def product(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@triton.jit
def broadcast_sum(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(tl.load(x + i), 0))


def test_counts(instruments):
    x, out = torch.arange(37.0), torch.empty(37)
    copy[(3,)](x, out, 37, SHIFT=0, MASKED=True, OTHER=True, BLOCK=16)
    assert torch.equal(out, x)
    (seen,) = instruments
    assert (seen.kernel, seen.programs, seen.total("loaded"), seen.total("stored")) == ("copy", 3, 148, 148)
    product[(1,)](*torch.rand(3, 16, 16), BLOCK=16)
    assert instruments[-1].flops == 2 * 16**3


def test_unique_bytes_count_an_address_once(instruments):
    x, out = torch.arange(16.0), torch.empty(4)
    broadcast_sum[(4,)](x, out, BLOCK=16)
    seen = instruments[-1].traffic
    assert (seen["x"].loaded, seen["x"].unique_loaded, seen["out"].unique_stored) == (4 * 64, 64, 16)


@pytest.mark.parametrize("shift", [-1, 1])
def test_out_of_bounds_load(shift):
    with pytest.raises(InterpreterError, match="out of bounds: load in copy"):
        copy[(3,)](torch.arange(37.0), torch.empty(37), 37, SHIFT=shift, MASKED=True, OTHER=True, BLOCK=16)


def test_out_of_bounds_store_inside_the_storage():
    """The view is what counts: its neighbours in the same storage are not the kernel's to touch."""
    storage = torch.zeros(64)
    with pytest.raises(InterpreterError, match=r"out of bounds: store in copy.*`out`"):
        copy[(3,)](torch.arange(37.0), storage[:37], 37, SHIFT=0, MASKED=False, OTHER=True, BLOCK=16)


def test_masked_lanes_without_other_hold_nan():
    out = torch.zeros(48)
    copy[(3,)](torch.arange(37.0), out, 37, SHIFT=0, MASKED=False, OTHER=False, BLOCK=16)
    assert out[37:].isnan().all()
    assert not out[:37].isnan().any()


@pytest.mark.parametrize("reads", [False, True])
def test_races_between_programs(reads):
    with pytest.raises(InterpreterError, match="race: store in overlap"):
        overlap[(2,)](torch.arange(8.0), torch.empty(16), READS=reads, BLOCK=8)


def test_a_race_through_two_names_of_one_tensor():
    x = torch.arange(32.0)
    with pytest.raises(InterpreterError, match="race"):
        overlap[(2,)](x[:9], x[:9], READS=False, BLOCK=8)


def test_lanes_of_one_store_that_collide():
    with pytest.raises(InterpreterError, match="different values"):
        collide[(1,)](torch.arange(8.0), torch.empty(4), BLOCK=8)
    out = torch.empty(4)
    collide[(1,)](torch.ones(8), out, BLOCK=8)  # equal values: harmless
    assert torch.equal(out, torch.ones(4))


def test_atomics_are_refused():
    with pytest.raises(InterpreterError, match="order of arrival"):
        count[(2,)](torch.zeros(1))


def test_bf16_products_are_products():
    x, y = torch.randn(2, 16, 16).bfloat16()
    out = torch.empty(16, 16)
    product[(1,)](x, y, out, BLOCK=16)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-6, atol=1e-5)


def test_only_the_interpreter_can_be_observed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), lab.observe():
        pass
