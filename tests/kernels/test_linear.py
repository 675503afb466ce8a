"""The contraction as a linear layer, against float64."""

import pytest
import torch
import torch.nn.functional as F

from ibp_triton.kernels.bends import activation_curvature
from ibp_triton.kernels.gates import relu
from ibp_triton.kernels.gemm import linear, linear_activation, linear_vjp
from ibp_triton.kernels.launcher import recording, span
from ibp_triton.kernels.smooth import Activation
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


TORCHS = {
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda z: F.gelu(z, approximate="tanh"),
    Activation.SILU: F.silu,
}


def both(activation, z):
    """σ(z) and σ'(z) by torch."""
    z = z.detach().requires_grad_()
    y = TORCHS[activation](z)
    return y.detach(), torch.autograd.grad(y.sum(), z)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", TORCHS, ids=lambda a: a.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_smooth_activations_give_their_slopes(shape, activation, dtype):
    """From z in float32, never rounded to the dtype; numbers from deep in the tails among them."""
    tangents, samples, inputs, outputs = shape
    x, weight, bias = randn(tangents, samples, inputs, dtype=dtype), randn(outputs, inputs, dtype=dtype), randn(outputs)
    bias = (3 * bias).to(dtype)
    with unchanged(x, weight, bias):
        found = linear_activation(x, weight, bias, activation), linear_activation(x, weight, None, int(activation))
    product = x.double() @ weight.double().T
    for (y, slope), z in zip(found, (product + bias.double(), product), strict=True):
        expected, steep = both(activation, z)
        assert_close(y, expected, dtype)
        assert_close(slope, steep, dtype)


@pytest.mark.parametrize("activation", TORCHS, ids=lambda a: a.name)
def test_smooth_activations_far_from_zero(activation):
    """One product with the number 1, from where slopes are 0 to where they are 1, and no NaN beyond."""
    z = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([-1e4, -100.0, 100.0, 1e4])])
    y, slope = linear_activation(z.view(1, -1, 1), torch.ones(1, 1), None, activation)
    expected, steep = both(activation, z.double())
    torch.testing.assert_close(y.flatten().double(), expected, rtol=2e-6, atol=1e-6)  # 1 + erf cancels, as torch's does
    torch.testing.assert_close(slope.flatten().double(), steep, rtol=2e-6, atol=1e-6)
    assert linear_activation(torch.full((1, 1, 4), float("nan")), randn(3, 4), None, activation)[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sweeps_multiply_by_a_slope(shape, dtype):
    tangents, samples, inputs, outputs = shape
    x, weight = randn(tangents, samples, inputs, dtype=dtype), randn(outputs, inputs, dtype=dtype)
    after, before = randn(samples, outputs, dtype=dtype), randn(samples, inputs, dtype=dtype)
    d = randn(tangents, samples, outputs, dtype=dtype)
    with unchanged(x, weight, after, d, before):
        sweep, signs = linear(x, weight, slope=after), linear(x, weight, slope=after, sign=True)
        reverse = linear_vjp(d, weight, slope=before)
    X, W = x.double(), weight.double()
    assert_close(sweep, (X @ W.T) * after.double(), dtype)
    assert_close(signs, (X.sign() @ W.T) * after.double(), dtype)
    assert_close(reverse, (d.double() @ W) * before.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", TORCHS, ids=lambda a: a.name)
@pytest.mark.parametrize("tangents", [0, 1, 5])
def test_curvature_of_smooth_activations(tangents, activation, dtype):
    """∇_z ⟨d, σ'(z) t⟩ by torch in float64, over more than one block, and far from zero."""
    d, t, z = randn(tangents, 3, 371, dtype=dtype), randn(tangents, 3, 371, dtype=dtype), 3 * randn(3, 371, dtype=dtype)
    z.view(-1)[:4] = torch.tensor([-1e4, -30.0, 30.0, 1e4])
    with unchanged(d, t, z):
        found = activation_curvature(d, t, z, activation)
    wide = z.double().requires_grad_()
    (slope,) = torch.autograd.grad(TORCHS[activation](wide).sum(), wide, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), wide)
    assert_close(found, (d.double() * t.double()).sum(0) * second, dtype)


def test_what_curvature_refuses():
    d, z = randn(2, 3, 4), randn(3, 4)
    with pytest.raises(ValueError, match="an activation in"):
        activation_curvature(d, d, z, Activation.NONE)
    with pytest.raises(ValueError, match="an activation in"):
        activation_curvature(d.double(), d.double(), z.double(), Activation.SILU)
    with pytest.raises(ValueError, match="does not meet"):
        activation_curvature(d, d[:1], z, Activation.SILU)
    with pytest.raises(ValueError, match="does not meet"):
        activation_curvature(d, d, z.half(), Activation.SILU)
    with pytest.raises(ValueError, match="contiguous"):
        activation_curvature(d, d, z.T.contiguous().T, Activation.SILU)


def test_what_activations_and_slopes_refuse():
    x, weight, d = randn(1, 5, 7), randn(4, 7), randn(1, 5, 4)
    with pytest.raises(ValueError, match="an activation is wanted"):
        linear_activation(x, weight, None, Activation.NONE)
    with pytest.raises(ValueError, match="not a valid Activation"):
        linear_activation(x, weight, None, 9)
    with pytest.raises(ValueError, match="not both"):
        linear(x, weight, mask=randn(5, 4), slope=randn(5, 4))
    with pytest.raises(ValueError, match="not both"):
        linear_vjp(d, weight, randn(5, 7), randn(5, 7))
    with pytest.raises(ValueError, match="behind a ReLU"):
        linear(x, weight, relu=True, slope=randn(5, 4))
    with pytest.raises(ValueError, match="does not have 20 elements"):
        linear(x, weight, slope=randn(4, 4))
    with pytest.raises(ValueError, match="must be contiguous, and a slope"):
        linear_vjp(d, weight, slope=randn(7, 5).T)
    with pytest.raises(ValueError, match="dtypes"):
        linear_activation(x.double(), weight.double(), None, Activation.GELU)


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
