"""Pooling in all three directions, with ties, partial windows and the fused ReLU, against torch in float64."""

import pytest
import torch
from torch.nn import functional as F

from ibp_triton.kernels.geometry import Geometry
from ibp_triton.kernels.pool import DEAD, max_pool2d, pool2d_jvp, pool2d_vjp
from tests.kernels.support import DTYPES, assert_close, last, randn, unchanged

# image, window, stride, padding, ceil
WINDOWS = [
    ((9, 10), (3, 3), (2, 2), (0, 0), True),  # the paper's
    ((7, 5), (3, 3), (2, 2), (0, 0), False),
    ((6, 7), (2, 2), (2, 2), (0, 0), False),
    ((8, 5), (3, 2), (3, 1), (1, 1), True),
    ((1, 1), (1, 1), (1, 1), (0, 0), False),
]


def pool(x, window, relu=False):
    _, kernel, stride, padding, ceil = window
    y = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)
    return F.relu(y) if relu else y


def tied(*shape, dtype):
    """Few distinct values: most windows share their maximum, and many are zero."""
    return torch.randint(-2, 3, shape).to(dtype)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_max_pool(window, dtype, relu):
    geometry = Geometry.pool(*window)
    x = last(tied(3, 5, *geometry.size, dtype=dtype))
    t = last(randn(2, 3, 5, *geometry.size, dtype=dtype))
    d = last(randn(2, 3, 5, *geometry.out, dtype=dtype))
    with unchanged(x, t, d):
        y, code = max_pool2d(x, geometry, relu=relu, channels_first=relu)
        sweep, reverse = pool2d_jvp(t, code, geometry, channels_first=relu), pool2d_vjp(d, code, geometry)
    leaf = x.double().requires_grad_()
    exact = pool(leaf, window, relu)
    assert torch.equal(y.double(), exact)
    assert (code.dtype, bool((code == DEAD).any())) == (torch.uint8, relu and bool((exact == 0).any()))
    assert y.is_contiguous() or not relu
    back = [torch.autograd.grad(exact, leaf, e.double(), retain_graph=True)[0] for e in d]
    assert_close(reverse, torch.stack(back), dtype)
    zero = torch.zeros_like(d[0], dtype=torch.float64, requires_grad=True)
    (dual,) = torch.autograd.grad(exact, leaf, zero, create_graph=True)
    forth = [torch.autograd.grad(dual, zero, u.double(), retain_graph=True)[0] for u in t]  # the transposed reverse
    assert torch.equal(sweep.double(), torch.stack(forth))


@pytest.mark.parametrize("count_padding", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_mean_pool(window, dtype, count_padding):
    image, kernel, stride, padding, ceil = window
    geometry = Geometry.pool(*window)
    t, d = last(randn(2, 3, 5, *image, dtype=dtype)), last(randn(2, 3, 5, *geometry.out, dtype=dtype))
    with unchanged(t, d):
        sweep = pool2d_jvp(t, None, geometry, count_padding=count_padding)
        reverse = pool2d_vjp(d, None, geometry, count_padding=count_padding)
    leaf = t.double().requires_grad_()
    exact = F.avg_pool2d(leaf.flatten(0, 1), kernel, stride, padding, ceil, count_padding).unflatten(0, (2, 3))
    assert_close(sweep, exact.detach(), dtype)
    assert_close(reverse, torch.autograd.grad(exact, leaf, d.double())[0], dtype)


def test_the_window_of_minus_infinity_and_of_nan():
    geometry = Geometry.pool((2, 2), (2, 2), (2, 2), (0, 0), False)
    y, code = max_pool2d(torch.full((1, 1, 2, 2), float("-inf")), geometry)
    assert (y.item(), code.item()) == (float("-inf"), 0)
    y, _ = max_pool2d(torch.tensor([[[[1.0, float("nan")], [3.0, 2.0]]]]), geometry)
    assert y.isnan().all()


def test_offsets_are_loaded_once_for_all_tangents(instruments):
    geometry = Geometry.pool(*WINDOWS[0])
    _, code = max_pool2d(last(randn(2, 3, 9, 10)), geometry)
    for tangents in (1, 5):
        pool2d_jvp(last(randn(tangents, 2, 3, 9, 10)), code, geometry)
        pool2d_vjp(last(randn(tangents, 2, 3, *geometry.out)), code, geometry)
    loads = [seen.traffic["code"].loaded for seen in instruments[1:]]
    assert loads[:2] == loads[2:]


def test_no_tangents():
    geometry = Geometry.pool(*WINDOWS[0])
    _, code = max_pool2d(last(randn(2, 3, 9, 10)), geometry)
    assert pool2d_jvp(randn(0, 2, 3, 9, 10), code, geometry).shape == (0, 2, 3, *geometry.out)
    assert pool2d_vjp(randn(0, 2, 3, *geometry.out), code, geometry).shape == (0, 2, 3, 9, 10)


def test_what_is_rejected():
    with pytest.raises(ValueError, match="255"):
        max_pool2d(randn(1, 1, 16, 16), Geometry.pool((16, 16), (16, 16), (1, 1), (0, 0), False))
    with pytest.raises(ValueError, match="does not meet"):
        max_pool2d(randn(1, 1, 4, 5), Geometry.pool((4, 4), (2, 2), (2, 2), (0, 0), False))
    with pytest.raises(ValueError, match="does not fit"):
        Geometry.pool((1, 1), (2, 2), (2, 2), (0, 0), False)
    with pytest.raises(ValueError, match="half"):
        Geometry.pool((4, 4), (2, 2), (2, 2), (2, 2), False)
