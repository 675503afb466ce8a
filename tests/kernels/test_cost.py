"""What a launch says it must move and compute is what the interpreter counts."""

import pytest
import torch

from ibp_triton.kernels import conv
from ibp_triton.kernels.attentions import attention, attention_jvp, attention_vjp
from ibp_triton.kernels.bends import activation_curvature
from ibp_triton.kernels.columns import batch_norm_cross, batch_norm_project
from ibp_triton.kernels.conv import conv2d, conv2d_vjp
from ibp_triton.kernels.gates import relu
from ibp_triton.kernels.gemm import linear, linear_activation, linear_vjp
from ibp_triton.kernels.geometry import ONE, Geometry
from ibp_triton.kernels.launcher import LaunchPlan, launch, recording
from ibp_triton.kernels.loss import cross_entropy, hessian_product, objective
from ibp_triton.kernels.norm_seeds import fast_tbp_seed, fgsm_step, norm_seed
from ibp_triton.kernels.norms import (
    group_norm,
    group_norm_cross,
    group_norm_curvature,
    group_norm_jvp,
    group_norm_vjp,
)
from ibp_triton.kernels.pool import max_pool2d, pool2d_jvp, pool2d_vjp
from ibp_triton.kernels.pooled_conv import conv_max_pool, conv_max_pool_jvp
from ibp_triton.kernels.smooth import Activation
from ibp_triton.kernels.tiles import on_chip
from ibp_triton.kernels.wgrad import Segment, weight_gradient
from tests.kernels.support import last, randn

GEOMETRY = Geometry.conv((9, 7), (3, 2), (2, 1), (1, 0), (1, 2))
SQUARE = Geometry.conv((9, 9), (4, 4), (1, 1), (0, 0), (1, 1))
POOL = Geometry.pool((9, 10), (3, 3), (2, 2), (1, 1), True)
POOLED = (
    Geometry.conv((9, 10), (2, 3), (1, 2), (1, 0), (1, 1)),
    Geometry.pool((10, 4), (3, 2), (2, 1), (1, 0), True),
)


def everything():
    for tangents, inputs in [(1, 53), (3, 37), (1, 1300), (2, 1100)]:  # the longer ones are split
        x, w, d = randn(tangents, 5, inputs), randn(19, inputs), randn(tangents, 5, 19)
        linear(x, w, randn(19))
        linear(x, w, mask=randn(5, 19))
        linear_vjp(d, w, randn(5, inputs))
        linear(x, w[:1], randn(1))  # one column
        linear_activation(x, w, randn(19), Activation.SILU)
        linear(x, w, slope=randn(5, 19))
        linear_vjp(d, w, slope=randn(5, inputs))
        activation_curvature(d, d, d[0], Activation.GELU)
    image, kernel = last(randn(3, 2, 5, 9, 7)), last(randn(11, 5, 3, 2))
    d = last(randn(3, 2, 11, *GEOMETRY.out))
    conv2d(image, kernel, GEOMETRY, randn(11))
    conv2d_vjp(d, kernel, GEOMETRY, last(randn(2, 5, 9, 7)))
    conv2d_vjp(d, kernel[:, :1], GEOMETRY, last(randn(2, 1, 9, 7)))
    weight_gradient([Segment(1.0, image[0], d[0], bias=True), Segment(1.0, image[1], d[0])], kernel, GEOMETRY)
    a, t, right = randn(1300, 7), randn(1300, 7), randn(1300, 5)
    weight_gradient([Segment(1.0, a, right, bias=True, push=t)], randn(5, 7), ONE)
    pixels = last(randn(2, 5, 9, 10) + 4)  # no window dies in the ReLU
    _, code = max_pool2d(pixels, POOL, relu=True)
    for codes in (code, None):
        pool2d_jvp(last(randn(3, 2, 5, 9, 10)), codes, POOL)
        pool2d_vjp(last(randn(3, 2, 5, *POOL.out)), codes, POOL)
    x, w = randn(3, 2, 2, 9, 10), randn(33, 2, 2, 3)
    _, code = conv_max_pool(x[0], w, *POOLED, randn(33) + 50, relu=True)
    conv_max_pool(x[0], w, *POOLED)
    conv_max_pool_jvp(x, w, code, *POOLED)
    relu(pixels)
    relu(randn(3, 4, 5), randn(4, 5))
    z = randn(5, 10)
    cross_entropy(z, torch.zeros(5, dtype=torch.int64))
    hessian_product(z, randn(2, 5, 10))
    objective(randn(7), randn(3, 5), 1.0, 0.5)
    norm_seed(pixels)
    norm_seed(pixels, 2, seed_wanted=False)
    fgsm_step(pixels, pixels, 0.1)
    fast_tbp_seed(pixels, torch.stack([pixels, pixels]))


def norms():
    pixels = last(randn(2, 5, 9, 10))
    for x, groups in ((randn(70, 53), 1), (randn(3, 1300), 1), (pixels, 5), (last(randn(1, 3, 53, 59)), 1)):
        weight, v = randn(x.shape[1]), torch.stack([x, x, x])
        _, statistics = group_norm(x, groups, weight, weight)
        group_norm_vjp(v[:1], x, statistics, groups, weight, sums=True)
        group_norm_vjp(v, x, statistics, groups)
        group_norm_jvp(v, x, statistics, groups, weight, right=v)
        group_norm_cross(v, v, x, statistics, groups)
    for x in (randn(140, 21), pixels, pixels.contiguous()):
        one, v = torch.ones(x.shape[1]), torch.stack([x, x, x])
        v = v if x.is_contiguous() else last(v)
        _, sums = batch_norm_project(v, x, one, one, one)
        batch_norm_cross(v, v, sums, x, one, one)
    x, weight = randn(7, 53), randn(53)
    _, statistics = group_norm(x, 1, weight, centred=False)
    group_norm_curvature(x[None], x[None], x, statistics, 1, weight)


def replicas():
    """Shared and own tensors, split products, the sum by taps."""
    for tangents, inputs in [(1, 53), (3, 37), (1, 700)]:
        x, w, d = randn(3, tangents, 5, inputs), randn(3, 19, inputs), randn(3, tangents, 5, 19)
        linear(x, w, randn(3, 19))
        linear(x[:1].expand_as(x), w, mask=randn(3, 5, 19))
        linear_vjp(d, w, randn(5, inputs).expand(3, 5, inputs))
        linear(x, w[:, :1], randn(3, 1))
        linear_activation(x, w, randn(3, 19), Activation.GELU_TANH)
        linear(x, w, slope=randn(5, 19).expand(3, 5, 19))
    image, kernel = last(randn(2, 3, 2, 5, 9, 7)), last(randn(2, 11, 5, 3, 2))
    d = last(randn(2, 3, 2, 11, *GEOMETRY.out))
    conv2d(image, kernel, GEOMETRY, randn(11).expand(2, 11))
    conv2d_vjp(d, kernel, GEOMETRY, last(randn(2, 2, 5, 9, 7)))
    conv2d_vjp(d, kernel[:, :, :1], GEOMETRY, last(randn(2, 2, 1, 9, 7)))
    terms = [Segment(1.0, image[:, 0], d[:, 0], bias=True), Segment(1.0, image[:1, 1].expand(2, 2, 5, 9, 7), d[:, 0])]
    weight_gradient(terms, kernel, GEOMETRY)
    a, t, right = randn(2, 600, 7), randn(2, 600, 7), randn(600, 5).expand(2, 600, 5)
    weight_gradient([Segment(torch.rand(2), a, right, bias=True, push=t)], randn(2, 5, 7), ONE)
    pixels, small = randn(1, 1, 1, 9, 10), randn(2, 33, 1, 2, 3)
    _, code = conv_max_pool(pixels.expand(2, 1, 1, 9, 10), small, *POOLED, randn(2, 33) + 50, relu=True)
    conv_max_pool_jvp(randn(2, 2, 1, 1, 9, 10), small, code, *POOLED)
    objective(randn(2, 7), randn(3, 5).expand(2, 3, 5), torch.rand(2), 0.5, replicated=True)
    fgsm_step(pixels.expand(2, 1, 1, 9, 10), randn(2, 1, 1, 9, 10), torch.rand(2), replicated=True)
    relu(randn(2, 3, 4, 5), randn(4, 5).expand(2, 4, 5), replicated=True)
    x, weight, v = randn(2, 70, 13), randn(1, 13).expand(2, 13), randn(2, 3, 70, 13)
    _, statistics = group_norm(x, 1, weight, weight, replicated=True)
    group_norm_vjp(v, x, statistics, 1, weight, sums=True, replicated=True)
    group_norm_jvp(v, x, statistics, 1, weight, right=v, replicated=True)
    group_norm_curvature(v, v, x, statistics, 1, weight, replicated=True)
    one = torch.ones(2, 13)
    _, sums = batch_norm_project(v, x, one, one, weight, replicated=True)
    batch_norm_cross(v, v, sums, x, one, one, replicated=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "MANY", 1)
        conv2d_vjp(last(randn(2, 3, 2, 4, 6, 6)), randn(2, 4, 1, 4, 4), SQUARE, last(randn(2, 2, 1, 9, 9)))


def attentions():
    """One tile and, by the tiles of another chip, several; causal, with a mask that all heads share, parts alone."""
    for queries, keys, width, chip, causal in (
        (7, 9, 24, "sm_90", False),
        (9, 7, 8, "sm_90", True),
        (33, 20, 20, "gfx1100", False),
        (40, 17, 16, "gfx1100", True),
    ):
        q, k, v = (randn(1, n, 2, width).transpose(1, 2) for n in (queries, keys, keys))
        mask = randn(queries, keys).expand(1, 2, queries, keys) if keys != 9 else None
        t = [torch.stack([x, x]) for x in (q, k, v)]
        settings = {"scale": 0.3, "causal": causal}
        with on_chip(chip):
            out, lse = attention(q, k, v, mask, **settings)
            attention_jvp(t, q, k, v, out, lse, mask, **settings)
            attention_jvp([None, None, t[2]], q, k, v, out, lse, mask, **settings)
            attention_vjp(t[0], q, k, v, out, lse, mask, **settings)
            attention_vjp(t[0], q, k, v, out, lse, mask, **settings, wanted=(True, False, False))
            attention_vjp(t[0], q, k, v, out, lse, mask, **settings, wanted=(False, False, True))


def test_splits_are_among_them():
    with recording(execute=False) as launches:
        everything()
    assert len(launches) > 30
    assert sum(launch.arguments.get("splits", 1) > 1 for launch in launches) > 6


@pytest.mark.parametrize("call", [everything, norms, replicas, attentions])
def test_costs_are_what_the_interpreter_counts(call, instruments):
    with recording() as launches:
        call()
    assert len(launches) == len(instruments) > 14
    for asked, seen in zip(launches, instruments, strict=True):
        assert asked.name == seen.kernel
        assert asked.cost.loaded == seen.total("loaded"), asked
        assert asked.cost.stored == seen.total("stored"), asked
        assert asked.cost.padded_flops == seen.flops, asked
        assert asked.cost.flops <= seen.flops
        for name, bytes_ in asked.cost.pointers.items():
            assert name not in seen.traffic or seen.traffic[name].loaded == bytes_, (name, asked)
        unique = seen.total("unique_loaded") + seen.total("unique_stored")
        assert unique <= asked.unique_bytes, asked


def test_a_launch_can_be_recorded_without_being_run():
    with recording(execute=False) as launches:
        y = linear(randn(1, 3, 5), randn(4, 5))
    assert [launch.name for launch in launches] == ["contract"]
    assert y.isnan().all()


def test_what_a_launch_refuses(monkeypatch):
    (asked,) = _recorded()
    constants = {name: value for name, value in asked.arguments.items() if not isinstance(value, torch.Tensor)}
    tensors = {name: value for name, value in asked.arguments.items() if isinstance(value, torch.Tensor)}

    def again(grid=(1, 1, 1), **other):
        plan = LaunchPlan(asked.kernel, grid, constants, asked.config, asked.cost)
        launch(plan, *(tensors | other).values())

    with pytest.raises(ValueError, match="over 65535"):
        again((1, 65536, 1))
    with pytest.raises(ValueError, match="several devices"):
        again(out=torch.empty(4, device="meta"))
    with pytest.raises(ValueError, match="spans more than"):
        again(x=torch.empty(1, dtype=torch.uint8).expand(2**31))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="need a CUDA device"):
        again()


def _recorded():
    with recording(execute=False) as launches:
        linear(randn(1, 3, 5), randn(4, 5))
    return launches
