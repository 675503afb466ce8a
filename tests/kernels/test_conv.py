"""The contraction as a convolution, against float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from ibp_triton.kernels import conv
from ibp_triton.kernels.conv import conv2d, conv2d_vjp
from ibp_triton.kernels.geometry import Geometry
from ibp_triton.kernels.launcher import recording
from tests.kernels.support import DTYPES, assert_close, last, randn, unchanged

# (tangents, samples, channels, outputs, image, kernel, stride, padding, dilation); the paper's first: one channel
SHAPES = [
    (1, 2, 1, 5, (9, 8), (4, 4), (1, 1), (0, 0), (1, 1)),
    (1, 1, 37, 11, (5, 5), (5, 5), (1, 1), (2, 2), (1, 1)),
    (5, 1, 3, 7, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 2, 6, 4, (9, 7), (3, 2), (2, 3), (1, 0), (2, 1)),
    (0, 2, 3, 4, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 1, 53, 40, (3, 3), (1, 1), (1, 1), (0, 0), (1, 1)),
]


def reference(x, weight, geometry):
    options = {"stride": geometry.stride, "padding": geometry.padding, "dilation": geometry.dilation}
    return F.conv2d(x.double().flatten(0, 1), weight.double(), **options).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_reverse_and_linear_sweep(shape, dtype):
    tangents, samples, channels, outputs, image, *window = shape
    geometry = Geometry.conv(image, *window)
    x = last(randn(tangents, samples, channels, *image, dtype=dtype, zeros=True))
    weight, bias = last(randn(outputs, channels, *geometry.kernel, dtype=dtype)), randn(outputs, dtype=dtype)
    after = last(randn(samples, outputs, *geometry.out, dtype=dtype, zeros=True))
    before = last(randn(samples, channels, *image, dtype=dtype, zeros=True))
    d = last(randn(tangents, samples, outputs, *geometry.out, dtype=dtype))
    with unchanged(x, weight, bias, after, before, d):
        forward = conv2d(x, weight, geometry, bias, relu=True)
        sweep = conv2d(x, weight, geometry, mask=after, sign=True)
        reverse = conv2d_vjp(d, weight, geometry, before)
    exact = reference(x, weight, geometry)
    assert_close(forward, (exact + bias.double()[:, None, None]).clamp(min=0), dtype)
    assert_close(sweep, reference(x.double().sign(), weight, geometry) * (after > 0), dtype)
    leaf = torch.zeros(tangents, samples, channels, *image, dtype=torch.float64, requires_grad=True)
    (back,) = torch.autograd.grad(reference(leaf, weight, geometry), leaf, d.double())
    assert_close(reverse, back * (before > 0), dtype)
    assert forward.stride(2) == 1
    assert reverse.stride(2) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] < 16 <= shape[2] * math.prod(shape[5])])
@pytest.mark.parametrize("layout", [last, torch.Tensor.contiguous])
def test_the_reverse_of_few_channels_by_taps(shape, dtype, layout, monkeypatch, instruments):
    """One product with all taps and their sum: what many positions take, at a few."""
    monkeypatch.setattr(conv, "MANY", 1)
    tangents, samples, channels, outputs, image, *window = shape
    geometry = Geometry.conv(image, *window)
    weight = layout(randn(outputs, channels, *geometry.kernel, dtype=dtype))
    before = last(randn(samples, channels, *image, dtype=dtype, zeros=True))
    d = last(randn(tangents, samples, outputs, *geometry.out, dtype=dtype))
    with unchanged(weight, before, d), recording() as launches:
        reverse = conv2d_vjp(d, weight, geometry, before)
    leaf = torch.zeros(tangents, samples, channels, *image, dtype=torch.float64, requires_grad=True)
    (back,) = torch.autograd.grad(reference(leaf, weight, geometry), leaf, d.double())
    assert_close(reverse, back * (before > 0), dtype)
    assert [launch.name for launch in launches] == ["contract", "fold"][: 2 * tangents]
    for asked, seen in zip(launches, instruments, strict=True):
        assert (asked.cost.loaded, asked.cost.stored) == (seen.total("loaded"), seen.total("stored"))
        assert asked.cost.flops == (2 * d.numel() * weight[0].numel() if asked.name == "contract" else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tangents", [1, 3])
def test_the_reverse_to_one_channel_takes_no_matrix_unit(tangents, dtype, instruments):
    geometry = Geometry.conv((9, 8), (4, 3), (1, 2), (1, 0), (1, 1))
    weight = randn(37, 1, 4, 3, dtype=dtype)
    before = last(randn(2, 1, 9, 8, dtype=dtype, zeros=True))
    d = last(randn(tangents, 2, 37, *geometry.out, dtype=dtype))
    with unchanged(weight, before, d):
        reverse = conv2d_vjp(d, weight, geometry, before)
    leaf = torch.zeros(tangents, 2, 1, 9, 8, dtype=torch.float64, requires_grad=True)
    (back,) = torch.autograd.grad(reference(leaf, weight, geometry), leaf, d.double())
    assert_close(reverse, back * (before > 0), dtype)
    assert [seen.flops for seen in instruments] == [0]


def test_few_positions_a_weight_with_gaps_and_an_image_in_nchw_take_one_launch(monkeypatch):
    geometry = Geometry.conv((6, 6), (4, 4), (1, 1), (0, 0), (1, 1))
    d, weight = last(randn(1, 2, 4, 3, 3)), randn(4, 1, 5, 5)
    for many, left, right in (
        (99, d, weight[:, :, :4, :4].contiguous()),
        (1, d, weight[:, :, :4, :4]),
        (1, d.contiguous(), weight[:, :, :4, :4].contiguous()),
        (1, last(randn(1, 2, 4, 3, 3)), randn(4, 17, 4, 4)),
    ):
        monkeypatch.setattr(conv, "MANY", many)
        with recording() as launches:
            conv2d_vjp(left, right, geometry)
        assert [launch.name for launch in launches] == ["contract"]


def test_any_strides_of_the_image_and_of_the_weight():
    x, weight = randn(1, 2, 3, 6, 6), randn(4, 3, 3, 3)
    geometry = Geometry.conv((6, 6), (3, 3), (1, 1), (1, 1), (1, 1))
    assert_close(conv2d(x, weight, geometry), reference(x, weight, geometry), torch.float32)
    assert torch.equal(conv2d(x, weight, geometry), conv2d(last(x), last(weight), geometry))
    d = randn(1, 2, 4, 6, 6)
    assert torch.equal(conv2d_vjp(d, weight, geometry), conv2d_vjp(last(d), last(weight), geometry))


def test_a_weight_and_a_bias_with_gaps():
    x, weight, bias = last(randn(1, 2, 3, 6, 6)), randn(4, 3, 5, 5)[:, :, :3, :3], randn(8)[::2]
    geometry = Geometry.conv((6, 6), (3, 3), (1, 1), (1, 1), (1, 1))
    dense = weight.contiguous()
    expected = conv2d(x, dense, geometry, bias.contiguous())
    assert torch.equal(conv2d(x, weight, geometry, bias), expected)
    assert torch.equal(conv2d_vjp(expected, weight, geometry), conv2d_vjp(expected, dense, geometry))


def test_what_is_rejected():
    geometry = Geometry.conv((5, 5), (3, 3), (1, 1), (0, 0), (1, 1))
    with pytest.raises(ValueError, match="do not meet"):
        conv2d(randn(1, 1, 2, 6, 5), randn(4, 2, 3, 3), geometry)
    with pytest.raises(ValueError, match="dtypes"):
        conv2d(randn(1, 1, 2, 5, 5), randn(4, 2, 3, 3).double(), geometry)
    with pytest.raises(ValueError, match="channels last"):
        conv2d(randn(1, 2, 2, 5, 5), randn(4, 2, 3, 3), geometry, mask=randn(2, 4, 3, 3))
    with pytest.raises(ValueError, match="does not fit"):
        Geometry.conv((2, 5), (3, 3), (1, 1), (0, 0), (1, 1))
