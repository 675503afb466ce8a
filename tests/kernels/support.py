"""Shared by the kernel tests: tolerances, tensors, and the check that inputs stay as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Largest error: half an epsilon of each result, for its rounding to the dtype, and what the sums of a few thousand
# float32 products lose, in units of the expected tensor's RMS.
ACCUMULATED = 1e-5


def randn(*shape: int, dtype: torch.dtype = torch.float32, zeros: bool = False) -> Tensor:
    """Normal numbers; with `zeros` about a third of them exactly zero, as behind a ReLU."""
    x = torch.randn(*shape)
    return (x * (torch.rand(*shape) > 1 / 3) if zeros else x).to(dtype)


def last(x: Tensor) -> Tensor:
    """[..., C, H, W] with the channels last in memory."""
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """`actual` is `expected` (float64) up to rounding in the dtype it was computed in, and NaN nowhere."""
    assert actual.shape == expected.shape
    expected = expected.double()
    rms = expected.square().mean().sqrt() if expected.numel() else torch.tensor(0.0)
    excess = (actual.double() - expected).abs() - torch.finfo(dtype).eps * 0.51 * expected.abs()
    worst = excess.max().item() if excess.numel() else 0.0
    assert worst <= ACCUMULATED * rms.item() + torch.finfo(dtype).tiny, f"error {worst:.3g}, RMS {rms.item():.3g}"


@contextmanager
def unchanged(*tensors: Tensor | None) -> Iterator[None]:
    """The block leaves these tensors as they are, bit for bit."""
    present = [t for t in tensors if t is not None]
    before = [t.clone() for t in present]
    yield
    for tensor, copy in zip(present, before, strict=True):
        assert tensor.dtype == copy.dtype
        assert torch.equal(tensor.contiguous().view(torch.uint8), copy.contiguous().view(torch.uint8))
