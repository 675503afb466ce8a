"""Batch, layer, group, instance and RMS normalisation: against torch.func, finite differences, half precision, vmap."""

import pytest
import torch
import torch.nn.functional as F

from ibp_triton.backends.torch.batch_norm import BatchNorm, BatchNormEval
from tests.library.layers import Call, check, half_agrees, random_like

PARAMETRIC = {"weight": "parametric", "bias": "parametric"}
BUFFERS = {"running_mean": "constant", "running_var": "constant"}


def numbers(*shape, cast=lambda x: x, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return cast(torch.randn(*shape, generator=generator, dtype=torch.float64) * 1.5 + 0.7)


def scale(shape, affine, cast):
    """Weight and bias, one of the two by its name, or neither."""
    names = {"weight": 1, "bias": 2}
    return tuple(numbers(*shape, seed=names[n], cast=cast) if affine in (True, n) else None for n in names)


def batch_norm(shape, affine=True, training=True, buffers=False, layout=None, cast=lambda x: x):
    x, c = numbers(*shape, cast=cast), shape[1]
    x = x.contiguous(memory_format=layout) if layout else x
    own = scale((c,), affine, cast)
    kept = (numbers(c, seed=3, cast=cast), numbers(c, seed=4, cast=cast).square()) if buffers else (None, None)
    return Call(F.batch_norm, (x, *kept, *own, training, 0.1, 1e-3), {}, PARAMETRIC | BUFFERS)


def layer_norm(shape, last, affine=True, cast=lambda x: x):
    own = scale(last, affine, cast)
    return Call(F.layer_norm, (numbers(*shape, cast=cast), last, *own, 1e-3), {}, PARAMETRIC)


def group_norm(shape, groups, affine=True, layout=None, cast=lambda x: x):
    x, c = numbers(*shape, cast=cast), shape[1]
    x = x.contiguous(memory_format=layout) if layout else x
    own = scale((c,), affine, cast)

    def plain(x, groups, weight, bias, eps):  # torch's second derivative fails for a bias without a weight
        weight = torch.ones_like(bias) if weight is None and bias is not None else weight
        return F.group_norm(x.contiguous(), groups, weight, bias, eps)

    return Call(F.group_norm, (x, groups, *own, 1e-3), {}, PARAMETRIC, plain)


def instance_norm(shape, affine=True, own=True, cast=lambda x: x):
    c = shape[1]
    affine = scale((c,), affine, cast)
    kept = (None, None) if own else (numbers(c, seed=3, cast=cast), numbers(c, seed=4, cast=cast).square())
    return Call(F.instance_norm, (numbers(*shape, cast=cast), *kept, *affine, own, 0.1, 1e-3), {}, PARAMETRIC | BUFFERS)


def rms_norm(shape, last, affine=True, eps=1e-3, cast=lambda x: x):
    weight = numbers(*last, seed=1, cast=cast) if affine else None
    return Call(F.rms_norm, (numbers(*shape, cast=cast), last, weight, eps), {}, PARAMETRIC)


CASES = {
    "batch norm": lambda **k: batch_norm((4, 3, 5, 2), **k),
    "batch norm, batch 1": lambda **k: batch_norm((1, 3, 5, 2), **k),
    "batch norm, one channel": lambda **k: batch_norm((4, 1, 3, 3), **k),
    "batch norm, channels last": lambda **k: batch_norm((4, 6, 5, 3), layout=torch.channels_last, **k),
    "batch norm 3d": lambda **k: batch_norm((2, 3, 2, 3, 2), **k),
    "batch norm 3d, channels last": lambda **k: batch_norm((2, 3, 2, 3, 2), layout=torch.channels_last_3d, **k),
    "batch norm 1d": lambda **k: batch_norm((7, 5), **k),
    "batch norm 1d of lines": lambda **k: batch_norm((3, 5, 4), **k),
    "batch norm, plain": lambda **k: batch_norm((4, 3, 5, 2), affine=False, **k),
    "batch norm, eval": lambda **k: batch_norm((4, 3, 5, 2), training=False, buffers=True, **k),
    "batch norm, eval, plain": lambda **k: batch_norm((1, 3, 5), affine=False, training=False, buffers=True, **k),
    "batch norm, weight alone": lambda **k: batch_norm((4, 3, 5), affine="weight", **k),
    "batch norm, bias alone": lambda **k: batch_norm((4, 3, 5), affine="bias", **k),
    "batch norm, eval, bias alone": lambda **k: batch_norm((4, 3), affine="bias", training=False, buffers=True, **k),
    "layer norm": lambda **k: layer_norm((3, 4, 6), (6,), **k),
    "layer norm over two axes": lambda **k: layer_norm((3, 4, 6), (4, 6), **k),
    "layer norm over an axis of one": lambda **k: layer_norm((3, 1, 6), (1, 6), **k),
    "layer norm, plain": lambda **k: layer_norm((1, 6), (6,), affine=False, **k),
    "layer norm, weight alone": lambda **k: layer_norm((3, 4, 6), (6,), affine="weight", **k),
    "layer norm, bias alone": lambda **k: layer_norm((3, 4, 6), (6,), affine="bias", **k),
    "group norm": lambda **k: group_norm((3, 6, 4, 3), 2, **k),
    "group norm, one group": lambda **k: group_norm((1, 6, 4), 1, **k),
    "group norm, channels last": lambda **k: group_norm((3, 6, 4, 3), 3, layout=torch.channels_last, **k),
    "group norm, plain, no positions": lambda **k: group_norm((3, 6), 2, affine=False, **k),
    "group norm, weight alone": lambda **k: group_norm((3, 6, 4), 2, affine="weight", **k),
    "group norm, bias alone": lambda **k: group_norm((3, 6, 4), 2, affine="bias", **k),
    "instance norm": lambda **k: instance_norm((3, 4, 5, 2), **k),
    "instance norm, plain": lambda **k: instance_norm((1, 4, 5), affine=False, **k),
    "instance norm by running statistics": lambda **k: instance_norm((3, 4, 5, 2), own=False, **k),
    "instance norm, weight alone": lambda **k: instance_norm((3, 4, 5), affine="weight", **k),
    "instance norm, bias alone": lambda **k: instance_norm((3, 4, 5), affine="bias", **k),
    "rms norm": lambda **k: rms_norm((3, 4, 6), (6,), **k),
    "rms norm over two axes, plain": lambda **k: rms_norm((3, 4, 6), (4, 6), affine=False, **k),
    "rms norm, default eps": lambda **k: rms_norm((3, 6), (6,), eps=None, **k),
}


@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_torch(name):
    torch.manual_seed(3)
    check(CASES[name]())


@pytest.mark.parametrize("name", CASES)
def test_its_curvature_and_tangent_agree_with_finite_differences(name):
    torch.manual_seed(4)
    call = CASES[name]()
    layer, value = call.layer()
    x, h = call.operands["input"], 1e-5
    d, t = random_like(value, ()), random_like(x, ())

    def moved(step):
        other = CASES[name]()
        other.args = (x + step * t, *other.args[1:])
        return other.layer()

    (right, up), (left, down) = moved(h), moved(-h)
    torch.testing.assert_close(layer.jvp({"input": t}), (up - down) / (2 * h), rtol=1e-6, atol=1e-7)
    found = layer.curvature(d, {"input": t}, ["input"]).get("input", torch.zeros_like(x))
    slope = (right.vjp(d, ["input"])["input"] - left.vjp(d, ["input"])["input"]) / (2 * h)
    torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_computes_statistics_and_sums_in_float32(name, dtype):
    torch.manual_seed(5)
    half_agrees(lambda cast: CASES[name](cast=cast), dtype, 0.02)


@pytest.mark.parametrize("name", CASES)
def test_it_runs_under_vmap(name):
    torch.manual_seed(6)
    call = CASES[name]()
    _, value = call.layer()
    d, t = random_like(value, ()), random_like(call.operands["input"], (2,))
    others = call.names("parametric")

    def one(x):
        layer, y = Call(call.function, (x, *call.args[1:]), {}, call.kinds).layer()
        return (
            y,
            layer.vjp(d, ["input", *others]),
            layer.jvp({"input": t}),
            layer.tangent_param_vjp({"input": t}, torch.stack([d, d]), others),
            layer.curvature(d, {"input": t[0]}, ["input"]),
        )

    xs = torch.stack([call.operands["input"], random_like(call.operands["input"], ())])
    found, expected = torch.func.vmap(one)(xs), [one(x) for x in xs]
    flat = [torch.utils._pytree.tree_leaves(found)] + [torch.utils._pytree.tree_leaves(e) for e in expected]
    for both, first, second in zip(*flat, strict=True):
        torch.testing.assert_close(both, torch.stack([first, second]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_running_statistics_move_as_torch_moves_them(dtype, affine):
    x = numbers(4, 3, 5, cast=lambda x: x.to(dtype))
    own = [torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)] if affine else [None, None]
    kept = [[torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)] for _ in range(2)]
    call = Call(F.batch_norm, (x, *kept[0], *own, True, 0.3, 1e-3), {}, PARAMETRIC | BUFFERS)
    layer, value = call.layer()
    half = dtype == torch.bfloat16
    expected = F.batch_norm(x, *kept[1], *own, True, 0.3, 1e-3)
    torch.testing.assert_close(value, expected, rtol=0.02 if half else 1e-6, atol=1e-3 if half else 1e-6)
    for found, wants in zip(*kept, strict=True):
        torch.testing.assert_close(found, wants)
    assert isinstance(layer, BatchNorm)
    layer.vjp(value, ["input"])
    torch.testing.assert_close(kept[0][0], kept[1][0])


def test_batch_norm_keeps_channels_last_and_refuses_a_single_number():
    call = CASES["batch norm, channels last"]()
    layer, value = call.layer()
    t, d = random_like(call.operands["input"], (3,)), random_like(value, ())
    for result in (
        layer.vjp(d, ["input"])["input"],
        layer.jvp({"input": t})[0],
        layer.curvature(d, {"input": d}, [])["input"],
    ):
        assert result.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm((1, 3)).layer()
    assert CASES["batch norm, eval"]().rule() is BatchNormEval
