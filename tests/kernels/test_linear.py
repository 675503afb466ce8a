"""The contraction as a linear layer, against float64."""

import pytest
import torch

from ibp_triton.kernels.gates import relu
from ibp_triton.kernels.gemm import linear, linear_vjp
from ibp_triton.kernels.launcher import recording, span
from ibp_triton.kernels.workbench.cases import allowing_tf32
from tests.kernels.support import DTYPES, assert_close, randn, unchanged

# (tangents, samples, inputs, outputs): odd sizes, one sample, one feature, no tangents, more tangents than a group;
# the last one is split
SHAPES = [
    (1, 37, 53, 19),
    (1, 1, 5, 1),
    (5, 7, 37, 53),
    (0, 3, 5, 7),
    (7, 5, 20, 6),
    (3, 5, 20, 1),
    (1, 8, 1300, 1),
    (1, 8, 1300, 20),
    (5, 4, 700, 10),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_reverse_and_linear_sweep(shape, dtype):
    tangents, samples, inputs, outputs = shape
    x, weight = randn(tangents, samples, inputs, dtype=dtype, zeros=True), randn(outputs, inputs, dtype=dtype)
    bias, after = randn(outputs, dtype=dtype), randn(samples, outputs, dtype=dtype, zeros=True)
    d, before = randn(tangents, samples, outputs, dtype=dtype), randn(samples, inputs, dtype=dtype, zeros=True)
    with unchanged(x, weight, bias, after, d, before):
        forward = linear(x, weight, bias, relu=True)
        sweep = linear(x, weight, mask=after, sign=True)
        reverse = linear_vjp(d, weight, before)
    X, W = x.double(), weight.double()
    assert_close(forward, (X @ W.T + bias.double()).clamp(min=0), dtype)
    assert_close(sweep, (X.sign() @ W.T) * (after > 0), dtype)
    assert_close(reverse, (d.double() @ W) * (before > 0), dtype)


def test_nan_passes_the_relu():
    x = torch.full((1, 1, 4), float("nan"))
    assert linear(x, randn(3, 4), randn(3), relu=True).isnan().all()


def test_rows_of_a_wider_tensor():
    wide = randn(2, 6, 40)
    weight = randn(7, 20)
    assert_close(linear(wide[:, :, 20:], weight), wide[:, :, 20:].double() @ weight.double().T, torch.float32)


def test_tf32_follows_torch():
    x, weight = randn(1, 16, 64), randn(16, 64)
    exact = x.double() @ weight.double().T
    assert_close(linear(x, weight), exact, torch.float32)
    with allowing_tf32(True):
        error = (linear(x, weight).double() - exact).abs().max()
    assert 1e-5 < error / exact.square().mean().sqrt() < 1e-2


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(1, 2, 3), torch.ones(4, 5), "do not meet"),
        (torch.ones(1, 2, 3), torch.ones(4, 3).double(), "dtypes"),
        (torch.ones(1, 2, 3), torch.ones(3, 4).T, "contiguous"),
        (torch.ones(1, 3, 2).transpose(1, 2), torch.ones(4, 3), "contiguous"),
    ],
)
def test_what_is_rejected(x, weight, message):
    with pytest.raises(ValueError, match=message):
        linear(x, weight)


def test_a_bias_with_gaps_and_masks_that_do_not_fit():
    x, weight, bias = randn(1, 5, 7), randn(4, 7), randn(8)[::2]
    assert torch.equal(linear(x, weight, bias), linear(x, weight, bias.contiguous()))
    with pytest.raises(ValueError, match=r"bias .* does not have 4 elements"):
        linear(x, weight, randn(3))
    with pytest.raises(ValueError, match=r"mask .* does not have 20 elements"):
        linear(x, weight, mask=randn(4, 4))
    with pytest.raises(ValueError, match="mask must be contiguous"):
        linear(x, weight, mask=randn(4, 5).T)
    with pytest.raises(ValueError, match="mask must be contiguous"):
        linear_vjp(randn(1, 5, 4), weight, randn(7, 5).T)


def test_offsets_that_32_bits_do_not_reach_are_refused():
    """Tensors without storage: what is checked are their sizes, and the span of a view with few elements."""
    weight = torch.empty(4, 7, device="meta")
    with recording(execute=False):
        far = torch.empty_strided((1, 3, 7), (0, 2**30, 1), device="meta")
        with pytest.raises(ValueError, match=r"x .* spans more than"):
            linear(far, weight)
        linear(far[:, :2], weight)
        linear(torch.empty_strided((1, 3, 7), (2**40, 9, 1), device="meta"), weight)  # an axis of one element
        with pytest.raises(ValueError, match=r"x .* spans more than"):
            relu(torch.empty(2**31 - 100, device="meta"))  # the last block would count beyond 2^31


def test_the_span_of_a_view():
    assert span(torch.zeros(3, 4)) == 12
    assert span(torch.zeros(3, 4)[:, ::3]) == 12
    assert span(torch.zeros(3, 4).T[1:]) == 11
    assert span(torch.zeros(5).expand(9, 5)) == 5
    assert span(torch.zeros(0, 5)) == 0
