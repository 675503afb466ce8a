"""Layer, RMS, group and instance norms in all directions, against float64."""

from functools import partial

import pytest
import torch

from ibp_triton.kernels.launcher import recording
from ibp_triton.kernels.norms import (
    LARGEST,
    fits,
    group_norm,
    group_norm_cross,
    group_norm_curvature,
    group_norm_jvp,
    group_norm_vjp,
    whole,
)
from ibp_triton.kernels.workbench.cases import zeros
from tests.kernels.support import DTYPES, assert_close, last, randn, unchanged

# [N, C, ...], groups, channels last; the last two have rows over a tile, whose pixels are walked in blocks
SHAPES = [
    ((11, 53), 1, False),
    ((2, 1300), 1, False),
    ((37, 15), 3, False),
    ((3, 6, 5, 7), 3, False),
    ((3, 6, 5, 7), 2, True),
    ((1, 5, 13), 5, False),
    ((2, 3, 3, 3), 3, True),
    ((1, 6, 53, 61), 2, False),
    ((1, 6, 53, 61), 2, True),
]
EPS = 1e-3


def exact(x, groups, weight=None, bias=None, centred=True):
    """The norm of torch's documentation."""
    rows = x.reshape(len(x), groups, -1)
    away = rows - rows.mean(-1, keepdim=True) if centred else rows
    y = (away * (away.square().mean(-1, keepdim=True) + EPS).rsqrt()).reshape(x.shape)
    wide = (1, -1, *[1] * (x.dim() - 2))
    y = y if weight is None else y * weight.view(wide)
    return y if bias is None else y + bias.view(wide)


def laid(x, channels_last):
    return last(x) if channels_last else x


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups", "channels_last"), SHAPES)
def test_forward_sweeps_and_sums(shape, groups, channels_last, dtype, centred):
    x = laid(randn(*shape) * 2 + 1, channels_last).to(dtype)
    t, d = (laid(randn(2, *shape, dtype=dtype), channels_last) for _ in range(2))
    weight, bias = randn(shape[1], dtype=dtype), randn(shape[1], dtype=dtype)
    with unchanged(x, t, d, weight, bias):
        y, statistics = group_norm(x, groups, weight, bias, eps=EPS, centred=centred)
        back, gain, shift = group_norm_vjp(d, x, statistics, groups, weight, sums=True)
        alone = group_norm_vjp(d, x, statistics, groups, weight)
        forth, cross = group_norm_jvp(t, x, statistics, groups, weight, right=d)
        same = group_norm_jvp(t, x, statistics, groups, weight)
        cross_alone = group_norm_cross(t, d, x, statistics, groups)
    X, W, B = (v.double().requires_grad_() for v in (x, weight, bias))
    Y = exact(X, groups, W, B, centred)
    assert_close(y, Y.detach(), dtype)
    found = [torch.autograd.grad(Y, (X, W, B), one.double(), retain_graph=True) for one in d]
    assert_close(back, torch.stack([one[0] for one in found]), dtype)
    assert_close(gain, sum(one[1] for one in found), torch.float32)
    assert_close(shift, sum(one[2] for one in found), torch.float32)

    def pushed(weight):
        function = partial(exact, groups=groups, weight=weight, centred=centred)
        return torch.stack([torch.func.jvp(function, (X.detach(),), (one.double(),))[1] for one in t])

    J = pushed(W)
    assert_close(forth, J.detach(), dtype)
    assert_close(cross, torch.autograd.grad((J * d.double()).sum(), W)[0], torch.float32)
    assert torch.equal(cross, cross_alone)
    assert torch.equal(forth, same[0])
    assert torch.equal(back, alone[0])
    assert same[1] is alone[1] is alone[2] is None
    assert y.stride() == x.stride()
    assert back.stride() == d.stride()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups", "channels_last"), [s for s in SHAPES if s[0][-1] != 61])
def test_curvature(shape, groups, channels_last, dtype, centred):
    """Forward over reverse: reverse over forward is wrong in torch's own norms."""
    x = laid(randn(*shape) * 2 + 1, channels_last).to(dtype)
    t, d = (laid(randn(2, *shape, dtype=dtype), channels_last) for _ in range(2))
    weight = randn(shape[1], dtype=dtype)
    _, statistics = group_norm(x, groups, eps=EPS, centred=centred)
    with unchanged(x, t, d, weight):
        bent = group_norm_curvature(d, t, x, statistics, groups, weight)
        plain = group_norm_curvature(d, t, x, statistics, groups)
    for found, gain in ((bent, weight.double()), (plain, None)):
        function = partial(exact, groups=groups, weight=gain, centred=centred)
        sweeps = [
            torch.func.jvp(partial(pulled, function, e.double()), (x.double(),), (u.double(),))[1]
            for e, u in zip(d, t, strict=True)
        ]
        assert_close(found, torch.stack(sweeps).sum(0), dtype)


def pulled(function, d, x):
    return torch.func.vjp(function, x)[1](d)[0]


@pytest.mark.parametrize("shape", [(3, 8192), (2, 2, 71, 67), (5, 96)])
def test_a_large_offset_is_no_worse_than_torchs(shape):
    """Mean 1000, deviation 1: one pass over x and x² would leave nothing of the variance."""
    x = randn(*shape) + 1000
    y, _ = group_norm(x, 1, eps=1e-5)
    theirs = torch.nn.functional.group_norm(x, 1, eps=1e-5)
    expected = torch.nn.functional.group_norm(x.double(), 1, eps=1e-5)
    assert (y - expected).abs().max() <= 1.5 * (theirs - expected).abs().max() + 1e-6
    assert (y - expected).abs().max() < 1e-3


def test_layer_norm_with_a_zero_row_and_one_number():
    y, statistics = group_norm(torch.zeros(2, 7), 1, eps=EPS)
    assert torch.equal(y, torch.zeros(2, 7))
    assert_close(statistics, torch.tensor([EPS**-0.5, 0.0]).view(2, 1, 1).expand(2, 2, 1), torch.float32)
    assert torch.equal(group_norm(randn(3, 1), 1)[0], torch.zeros(3, 1))


def test_without_samples_or_tangents():
    x = randn(0, 7)
    y, statistics = group_norm(x, 1)
    assert (y.shape, statistics.shape) == ((0, 7), (2, 0, 1))
    back, gain, shift = group_norm_vjp(randn(2, 0, 7), x, statistics, 1, sums=True)
    assert back.shape == (2, 0, 7)
    assert torch.equal(gain, torch.zeros(7))
    assert torch.equal(shift, torch.zeros(7))
    x = randn(3, 7)
    y, statistics = group_norm(x, 1)
    none = randn(0, 3, 7)
    assert group_norm_jvp(none, x, statistics, 1)[0].shape == (0, 3, 7)
    assert torch.equal(group_norm_cross(none, none, x, statistics, 1), torch.zeros(7))
    assert torch.equal(group_norm_curvature(none, none, x, statistics, 1), torch.zeros(3, 7))


@pytest.mark.parametrize(("rows", "kernels"), [(70, ["project", "combine"]), (8, ["project"])])
def test_sums_in_parts_and_in_one(rows, kernels):
    x, d = randn(rows, 9), randn(1, rows, 9)
    _, statistics = group_norm(x, 1)
    with recording() as launches:
        _, gain, shift = group_norm_vjp(d, x, statistics, 1, sums=True)
    assert [launch.name for launch in launches] == kernels
    normal = torch.nn.functional.layer_norm(x.double(), (9,))
    assert_close(gain, (d[0].double() * normal).sum(0), torch.float32)
    assert_close(shift, d[0].double().sum(0), torch.float32)


def test_x_is_read_once_for_all_tangents(instruments):
    x = randn(9, 53)
    _, statistics = group_norm(x, 1)
    for tangents in (1, 5):
        group_norm_jvp(randn(tangents, 9, 53), x, statistics, 1)
    one, five = instruments[1:]
    assert one.traffic["x"].loaded == five.traffic["x"].loaded == 4 * x.numel()
    assert one.traffic["statistics"].loaded == five.traffic["statistics"].loaded == 4 * 2 * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2048, 96), 1), ((512, 768), 1), ((64, 8192), 1), ((32, 64, 14, 14), 8)]
)
def test_bytes_are_within_a_third_of_what_is_needed(shape, groups, dtype):
    """Launches that are not run: their costs are the interpreter's counts (test_cost)."""
    make = zeros(dtype)
    x, weight = make(*shape), make(shape[1])
    with recording(execute=False) as launches:
        _, statistics = group_norm(x, groups, weight, weight)
        for tangents in (1, 5):
            v = make(tangents, *shape)
            group_norm_vjp(v, x, statistics, groups, weight, sums=tangents == 1)
            group_norm_jvp(v, x, statistics, groups, weight, right=v)
            group_norm_jvp(v, x, statistics, groups, weight)
            group_norm_curvature(v, v, x, statistics, groups, weight)
    moved, needed = {}, {}
    for index, launch in enumerate(launches):
        first = launch.name != "combine"
        key = index if first else index - 1  # a launch and its second stage
        moved[key] = moved.get(key, 0) + launch.cost.loaded + launch.cost.stored
        if first:
            needed[key] = required(launch)
    assert max(moved[key] / needed[key] for key in moved) <= 1.3


def required(launch):
    """Bytes of x, the statistics, what is swept and made, γ, b and their gradients, each once; of all replicas."""
    a = launch.arguments
    size = {name: v.numel() * v.element_size() for name, v in a.items() if isinstance(v, torch.Tensor)}
    if launch.name == "normalise":
        return 2 * size["x"] + size["statistics"] + 2 * size["weight"]
    if launch.name == "bend":
        return 2 * size["x"] + size["d"] + size["v"] + size["statistics"] + size["weight"]
    gain = size["weight"] if a["INNER"] or a["OUTER"] else 0
    results = 4 * a["VIEW"][0] * a["VIEW"][1] * launch.grid[1] * (2 * a["SUMS"] + a["CROSS"])
    return size["x"] + size["v"] * (1 + a["STORE"] + a["CROSS"]) + size["statistics"] + gain + results


def test_what_is_rejected():
    x = randn(4, 6)
    _, statistics = group_norm(x, 2)
    with pytest.raises(ValueError, match="in 4 groups"):
        group_norm(x, 4)
    with pytest.raises(ValueError, match="float64"):
        group_norm(x.double(), 2)
    with pytest.raises(ValueError, match="contiguous or channels last"):
        group_norm(randn(4, 12)[:, ::2], 2)
    with pytest.raises(ValueError, match="at most 8192"):
        group_norm(randn(1, LARGEST + 1), 1)
    with pytest.raises(ValueError, match=r"parameters must be \[6\]"):
        group_norm(x, 2, randn(5))
    with pytest.raises(ValueError, match="statistics"):
        group_norm_vjp(randn(1, 4, 6), x, statistics, 3)
    with pytest.raises(ValueError, match="over x"):
        group_norm_vjp(randn(1, 6, 4).mT, x, statistics, 2)
    with pytest.raises(ValueError, match="over x"):
        group_norm_jvp(randn(4, 6), x, statistics, 2)
    with pytest.raises(ValueError, match="as many tangents"):
        group_norm_cross(randn(1, 4, 6), randn(2, 4, 6), x, statistics, 2)
    long = torch.zeros(1, 2, 5000)
    assert fits(long, 1)
    assert not whole(long, 1)
    with pytest.raises(ValueError, match="must fit 8192"):
        group_norm_curvature(long[None], long[None], long, torch.zeros(2, 1, 1), 1)
