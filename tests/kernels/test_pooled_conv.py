"""A convolution and the max-pool behind it in one launch, against torch in float64 and against the two launches."""

import pytest
import torch
from torch.nn import functional as F

from ibp_triton.kernels.geometry import Geometry
from ibp_triton.kernels.pool import DEAD
from ibp_triton.kernels.pooled_conv import FEW, conv_max_pool, conv_max_pool_jvp, worth_it
from tests.kernels.support import DTYPES, assert_close, last, randn, unchanged

# channels, outputs; image, kernel, stride, padding, dilation; window, stride, padding, rounding up, margin
CASES = [
    ((1, 5), ((10, 9), (4, 4), (1, 1), (0, 0), (1, 1)), ((3, 3), (2, 2), (0, 0), True, (1, 1))),  # the paper's
    ((3, 33), ((9, 8), (2, 2), (1, 2), (1, 0), (1, 1)), ((3, 2), (2, 1), (1, 1), False, (0, 0))),
    ((2, 7), ((8, 11), (3, 2), (2, 1), (1, 1), (1, 2)), ((2, 2), (2, 2), (0, 0), False, (0, 0))),
    ((1, 1), ((3, 3), (1, 1), (1, 1), (0, 0), (1, 1)), ((1, 1), (1, 1), (0, 0), False, (0, 0))),
]


def setting(case, dtype):
    (channels, outputs), sizes, window = case
    conv = Geometry.conv(*sizes)
    pool = Geometry.pool(conv.out, *window)
    x = last(randn(3, channels, *conv.size, dtype=dtype))
    return conv, pool, x, randn(outputs, channels, *conv.kernel, dtype=dtype), randn(outputs, dtype=dtype)


def before_pool(x, w, b, conv):
    return F.conv2d(x.double(), w.double(), None if b is None else b.double(), conv.stride, conv.padding, conv.dilation)


def at_code(y, code, pool):
    """y [N, O, H, W] at the positions that a code [N, PH, PW, O] says, 0 where it says that the ReLU is off."""
    code = code.permute(0, 3, 1, 2).long()
    h = torch.arange(pool.out[0])[:, None] * pool.stride[0] - pool.padding[0] + code // pool.kernel[1]
    w = torch.arange(pool.out[1]) * pool.stride[1] - pool.padding[1] + code % pool.kernel[1]
    found = y.flatten(2).gather(2, (h * y.shape[3] + w).clamp(0, y[0, 0].numel() - 1).flatten(2)).view(code.shape)
    return torch.where(code == DEAD, 0.0, found)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_linear_sweep(case, dtype, relu):
    conv, pool, x, w, b = setting(case, dtype)
    t, bias = last(randn(2, *x.shape, dtype=dtype)), b if relu else None
    with unchanged(x, t, w, b):
        y, code = conv_max_pool(x, w, conv, pool, bias, relu=relu, channels_first=relu)
        sweep = conv_max_pool_jvp(t, w, code, conv, pool, channels_first=relu)
        signs = conv_max_pool_jvp(t, w, code, conv, pool, sign=True)
    exact = before_pool(x, w, bias, conv)
    margin = [n * s + k for n, s, k in zip(pool.out, pool.stride, pool.kernel, strict=True)]
    padded = F.pad(exact, (pool.padding[1], margin[1], pool.padding[0], margin[0]), value=float("-inf"))
    maxima = F.max_pool2d(padded, pool.kernel, pool.stride)[:, :, : pool.out[0], : pool.out[1]]
    assert_close(y, maxima.relu() if relu else maxima, dtype)
    assert_close(y, at_code(exact, code, pool), dtype)  # that is where the maxima are
    assert y.is_contiguous() == relu or min(y.shape[1:]) == 1
    for found, seeds in ((sweep, t), (signs, t.sign())):
        assert_close(found, torch.stack([at_code(before_pool(u, w, None, conv), code, pool) for u in seeds]), dtype)


def test_ties_and_nan_are_those_of_torch():
    conv, pool = (
        Geometry.conv((7, 7), (2, 2), (1, 1), (0, 0), (1, 1)),
        Geometry.pool((6, 6), (3, 3), (2, 2), (0, 0), True),
    )
    x, w = torch.randint(-1, 2, (3, 1, 7, 7)).float(), torch.randint(-1, 2, (5, 1, 2, 2)).float()
    x[0, 0, 3, 3] = float("nan")
    y, code = conv_max_pool(x, w, conv, pool)
    expected, at = F.max_pool2d(F.conv2d(x, w), 3, 2, ceil_mode=True, return_indices=True)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    h = torch.arange(3)[:, None] * 2 + code.permute(0, 3, 1, 2).long() // 3
    v = torch.arange(3) * 2 + code.permute(0, 3, 1, 2).long() % 3
    assert torch.equal(h * 6 + v, at)


def test_where_it_is_worth_it():
    conv, pool = (
        Geometry.conv((28, 28), (4, 4), (1, 1), (0, 0), (1, 1)),
        Geometry.pool((25, 25), (3, 3), (2, 2), (0, 0), True),
    )
    few, many = FEW // pool.positions, FEW // pool.positions + 1
    for dtype, samples, channels, expected in [
        (torch.float32, many, 1, True),
        (torch.float32, many, 2, False),  # too much to compute anew
        (torch.bfloat16, few, 1, True),
        (torch.bfloat16, many, 1, False),
    ]:
        assert worth_it(torch.empty(1, samples, channels, 28, 28, dtype=dtype), conv, pool) is expected


def test_what_is_refused():
    conv, pool, x, w, b = setting(CASES[0], torch.float32)
    _, code = conv_max_pool(x, w, conv, pool)
    with pytest.raises(ValueError, match="do not meet"):
        conv_max_pool(x[..., :-1], w, conv, pool)
    with pytest.raises(ValueError, match="dtypes"):
        conv_max_pool(x.double(), w.double(), conv, pool)
    with pytest.raises(ValueError, match="bias"):
        conv_max_pool(x, w, conv, pool, b[:-1])
    with pytest.raises(ValueError, match="code"):
        conv_max_pool_jvp(x[None], w, code[:-1], conv, pool)
    with pytest.raises(ValueError, match="too much"):
        conv_max_pool(x.expand(-1, 2, -1, -1), w.expand(-1, 2, -1, -1), conv, pool)
