"""The sweeps of a batch norm in train mode against float64, and networks with one against torch's rules."""

import copy

import pytest
import torch
from torch import nn

import ibp_triton as ibp
from ibp_triton.kernels.columns import batch_norm_cross, batch_norm_project
from ibp_triton.kernels.launcher import recording
from ibp_triton.kernels.workbench.cases import zeros
from tests.kernels.support import DTYPES, assert_close, last, randn, unchanged
from tests.kernels.test_methods import TOLERANCE, errors

# [N, C, ...], channels last
SHAPES = [((11, 53), False), ((7, 6, 5, 7), False), ((7, 6, 5, 7), True), ((5, 70, 3, 5), True), ((2, 5, 131), False)]


@pytest.mark.parametrize("tangents", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "channels_last"), SHAPES)
def test_sweep_sums_and_tangent_term(shape, channels_last, dtype, tangents):
    def made(*size):
        return (last(randn(*size)) if channels_last else randn(*size)).to(dtype)

    x, v, r, weight = made(*shape) * 2 + 3, made(tangents, *shape), made(tangents, *shape), randn(shape[1], dtype=dtype)
    axes, wide = [0, *range(2, len(shape))], (1, -1, *[1] * (len(shape) - 2))
    X, V, R = x.double(), v.double(), r.double()
    mean = X.mean(axes).float()
    rstd = (X.var(axes, correction=0) + 1e-5).rsqrt().float()
    unit = (X - mean.double().view(wide)) * rstd.double().view(wide)
    with unchanged(x, v, r, mean, rstd, weight):
        out, sums = batch_norm_project(v, x, mean, rstd, weight)
        plain, _ = batch_norm_project(v, x, mean, rstd)
        cross = batch_norm_cross(v, r, sums, x, mean, rstd)
    away = [axis + 1 for axis in axes]
    pushed = V - V.mean(away, keepdim=True) - unit * (unit * V).mean(away, keepdim=True)
    scaled = pushed * rstd.double().view(wide)
    assert_close(out, scaled * weight.double().view(wide), dtype)
    assert_close(plain, scaled, dtype)
    assert_close(sums, torch.stack([(unit * V).sum(away), V.sum(away)], 1), torch.float32)
    assert_close(cross, (R * pushed).sum([0, *away]), torch.float32)
    assert out.stride() == v.stride()


def test_x_is_read_once_in_each_stage(instruments):
    x, statistics = randn(70, 9), torch.ones(9)
    for tangents in (1, 5):
        batch_norm_project(randn(tangents, 70, 9), x, statistics, statistics, statistics)
    loads = [seen.traffic["x"].loaded for seen in instruments if seen.kernel != "combine" and "x" in seen.traffic]
    assert loads == [4 * x.numel()] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 64, 32, 32), (2048, 256)])
def test_each_stage_moves_little_more_than_it_must(shape, dtype):
    make = zeros(dtype)
    x, one = make(*shape), torch.zeros(shape[1])
    with recording(execute=False) as launches:
        for tangents in (1, 5):
            v = make(tangents, *shape)
            _, sums = batch_norm_project(v, x, one, one, make(shape[1]))
            batch_norm_cross(v, make(tangents, *shape), sums, x, one, one)
    for launch in launches:
        if launch.name == "combine":
            continue
        read = ("v", "x", "mean", "rstd", "sums", *(["r"] if launch.arguments.get("CROSS") else []), "weight", "out")
        sizes = {n: a.numel() * a.element_size() for n, a in launch.arguments.items() if isinstance(a, torch.Tensor)}
        assert launch.cost.loaded + launch.cost.stored <= 1.3 * sum(sizes.get(name, 0) for name in read)


def test_without_tangents_and_what_is_rejected():
    x, one = randn(6, 4), torch.ones(4)
    out, sums = batch_norm_project(randn(0, 6, 4), x, one, one)
    assert (out.shape, sums.shape) == ((0, 6, 4), (0, 2, 4))
    with pytest.raises(ValueError, match="contiguous or channels last"):
        batch_norm_project(randn(1, 6, 4), randn(6, 8)[:, ::2], one, one)
    with pytest.raises(ValueError, match=r"mean must be \[4\]"):
        batch_norm_project(randn(1, 6, 4), x, torch.ones(5), one)
    with pytest.raises(ValueError, match="T at most 64"):
        batch_norm_project(randn(65, 6, 4), x, one, one)
    with pytest.raises(ValueError, match="over x"):
        batch_norm_cross(randn(1, 6, 4), randn(2, 6, 4), sums, x, one, one)


def network():
    """Channels last, rows of features, and one without parameters."""
    body = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, affine=False)]
    return nn.Sequential(*body, nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))


@pytest.mark.parametrize(
    "method",
    [
        ibp.BP(),
        ibp.LossIBP(0.3),
        ibp.TangentBP(0.3),
        ibp.LossIBP(0.3, semantics="exact"),
        ibp.TangentBP(0.3, semantics="exact"),
    ],
    ids=repr,
)
def test_networks_have_the_gradients_of_torchs_rules(method):
    torch.manual_seed(5)
    model = network().train()
    twin = copy.deepcopy(model).double()
    x, labels, tau = torch.randn(6, 2, 7, 7), torch.arange(6), torch.randn(5, 6, 2, 7, 7)
    tau = tau if method.needs_tangents else None
    _, found = method.gradients(ibp.Network(model, backend="triton"), x, labels, tau)
    tau = None if tau is None else tau.double()
    _, expected = method.gradients(ibp.Network(twin, backend="torch"), x.double(), labels, tau)
    assert errors(found, expected) < TOLERANCE
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)


def test_tangents_share_launches():
    """TBP of five tangents takes the launches of one."""
    model, x, labels = network().train(), torch.randn(6, 2, 7, 7), torch.arange(6)
    counts = []
    for tangents in (2, 5):
        with recording() as launches:
            tau = torch.randn(tangents, 6, 2, 7, 7)
            ibp.TangentBP(0.3).gradients(ibp.Network(model, backend="triton"), x, labels, tau)
        counts.append(sum(launch.name.startswith("column") for launch in launches))
    assert counts[0] == counts[1]
