"""Activations, elementary functions, products, quotients and choices against torch.func."""

import operator

import pytest
import torch
import torch.nn.functional as F

from ibp_triton.backends.torch.activations import UNARY
from tests.library.layers import Call, check, half_agrees, random_like

POSITIVE = ("log", "sqrt", "rsqrt", "log1p")
T = torch.Tensor


def numbers(*shape, seed=0, cast=lambda x: x, positive=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    return cast(x.abs() + 0.5 if positive else x)


def one(function, *args, shape=(3, 4, 5), reference=None, positive=False, cast=lambda x: x, **kwargs):
    return Call(function, (numbers(*shape, cast=cast, positive=positive), *args), kwargs, {}, reference)


def two(function, left=(3, 4, 5), right=(4, 1), kinds=None, cast=lambda x: x, positive=False):
    values = numbers(*left, cast=cast), numbers(*right, seed=1, cast=cast, positive=positive)
    return Call(function, values, {}, kinds or {})


def unary(name, **kwargs):
    function = getattr(torch, name, None) or getattr(F, name)
    reference = REFERENCES.get(name)
    return one(function, reference=reference, positive=name in POSITIVE, **kwargs)


def celu(a, alpha):
    """torch's own derivative rounds 1/α to float32."""
    return torch.where(a > 0, a, alpha * torch.expm1(a / alpha))


REFERENCES = {  # with second derivatives that torch's own functions lack
    "hardsigmoid": lambda a: (a / 6 + 0.5).clamp(0, 1),
    "hardswish": lambda a: a * (a / 6 + 0.5).clamp(0, 1),
}
PARAMETRIC = {"other": "parametric"}
CASES = {name: (lambda name=name, **k: unary(name, **k)) for name in UNARY} | {
    "elu": lambda **k: one(F.elu, 0.7, **k),
    "celu": lambda **k: one(F.celu, 1.3, reference=celu, **k),
    "hardtanh": lambda **k: one(F.hardtanh, -0.5, 1.5, **k),
    "clamp": lambda **k: one(torch.clamp, -0.5, 1.5, **k),
    "clamp from below": lambda **k: one(T.clamp, min=0.3, **k),
    "clamp_min": lambda **k: one(torch.clamp_min, 0.3, **k),
    "clamp_max": lambda **k: one(T.clamp_max, 0.3, **k),
    "cube": lambda **k: one(operator.pow, 3, **k),
    "square as a power": lambda **k: one(T.pow, 2, **k),
    "first power": lambda **k: one(torch.pow, 1, **k),
    "zeroth power": lambda **k: one(torch.pow, 0, **k),
    "a root": lambda **k: one(T.__pow__, 1.5, positive=True, **k),
    "glu": lambda **k: one(F.glu, shape=(3, 6), **k),
    "glu along 1": lambda **k: one(F.glu, 1, shape=(1, 4, 3, 2), **k),
    "silu": lambda **k: one(F.silu, **k),
    "gelu": lambda **k: one(F.gelu, **k),
    "prelu": lambda **k: two(F.prelu, right=(4,), kinds={"weight": "parametric"}, **k),
    "prelu, one slope": lambda **k: two(F.prelu, right=(1,), kinds={"weight": "parametric"}, **k),
    "prelu, a number": lambda **k: two(F.prelu, right=(), kinds={"weight": "parametric"}, **k),
    "prelu of a line": lambda **k: two(F.prelu, left=(4,), right=(1,), kinds={"weight": "parametric"}, **k),
    "prelu of rows": lambda **k: two(F.prelu, left=(2, 4), right=(4,), kinds={"weight": "parametric"}, **k),
    "multiply": lambda **k: two(torch.mul, **k),
    "multiply by a parameter": lambda **k: two(T.mul, kinds=PARAMETRIC, **k),
    "multiply by a number": lambda **k: one(operator.mul, 3, **k),
    "divide": lambda **k: two(torch.div, positive=True, **k),
    "divide by a parameter": lambda **k: two(operator.truediv, positive=True, kinds=PARAMETRIC, **k),
    "divide by a number": lambda **k: one(T.div, 3, **k),
    "divide a parameter": lambda **k: two(torch.div, (5,), (3, 4, 5), {"input": "parametric"}, positive=True, **k),
    "divide a number": lambda **k: one(T.__rtruediv__, 3, positive=True, **k),
    "subtract from a number": lambda **k: one(torch.rsub, 3, **k),
    "maximum": lambda **k: two(torch.maximum, **k),
    "minimum": lambda **k: two(torch.minimum, kinds=PARAMETRIC, **k),
}


@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_torch(name):
    torch.manual_seed(3)
    check(CASES[name]())


@pytest.mark.parametrize("name", CASES)
def test_half_precision(name):
    torch.manual_seed(5)
    half_agrees(lambda cast: CASES[name](cast=cast), torch.bfloat16, 0.05)


@pytest.mark.parametrize("other", [numbers(4, 1, seed=1), numbers(1, seed=1)])
def test_where(other):
    torch.manual_seed(3)
    condition = numbers(5, seed=2) > 0
    check(Call(torch.where, (condition, numbers(3, 4, 5), other)))
    check(Call(torch.where, (condition, numbers(3, 4, 5), 2.0)))


def test_channels_last_tangents_stay_so():
    x = numbers(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for function in (F.mish, F.gelu, F.relu, F.relu6):
        layer, value = Call(function, (x,)).layer()
        t, plain = random_like(x, (2,)), Call(function, (x.contiguous(),)).layer()[0]
        torch.testing.assert_close(layer.jvp({"input": t}), plain.jvp({"input": t.contiguous()}))
        for found in (layer.jvp({"input": t}), layer.vjp(t, ["input"])["input"]):
            assert all(part.is_contiguous(memory_format=torch.channels_last) for part in found)
        assert value.is_contiguous(memory_format=torch.channels_last)


def test_ties_are_shared_as_in_torch():
    x = torch.zeros(3, dtype=torch.float64)
    check(Call(torch.maximum, (x, torch.tensor([1.0, 0, -1], dtype=torch.float64))))


def test_what_is_not_covered():
    assert one(torch.div, 2, rounding_mode="floor").rule() is None
    assert two(torch.pow).rule() is None
    assert two(torch.clamp).rule() is None


@pytest.mark.parametrize("name", CASES)
def test_it_runs_under_vmap(name):
    call = CASES[name]()
    along, others = call.names("active"), call.names("parametric")
    first = next(i for i, arg in enumerate(call.args) if arg is call.operands[along[0]])
    t = {n: torch.stack([call.operands[n]] * 2) for n in along}

    def one_of_them(x):
        args = (*call.args[:first], x, *call.args[first + 1 :])
        layer, y = Call(call.function, args, call.kwargs, call.kinds).layer()
        return layer.vjp(y, along + others), layer.jvp(t), layer.curvature(y, t, along)

    xs = torch.stack([call.args[first], call.args[first].abs() + 1])
    found, expected = torch.func.vmap(one_of_them)(xs), [one_of_them(x) for x in xs]
    flat = [torch.utils._pytree.tree_leaves(e) for e in (found, *expected)]
    for both, *apart in zip(*flat, strict=True):
        torch.testing.assert_close(both, torch.stack(apart))


KINKS = {
    **{name: (getattr(torch, name, None) or getattr(F, name), (), {}) for name in ("abs", "relu6", "selu")},
    **{name: (getattr(F, name), (), {}) for name in ("hardsigmoid", "hardswish", "elu", "celu", "leaky_relu", "relu")},
    "hardtanh": (F.hardtanh, (-0.5, 0.5), {}),
    "clamp": (torch.clamp, (-0.5, 0.5), {}),
    "clamp_min": (torch.clamp_min, (0.5,), {}),
    "clamp_max": (torch.clamp_max, (0.5,), {}),
    "maximum": (torch.maximum, (torch.full((7,), 0.5, dtype=torch.float64),), {"other": "constant"}),
}


@pytest.mark.parametrize("name", KINKS)
def test_at_a_kink_both_slopes_are_those_that_torch_takes(name):
    function, args, kinds = KINKS[name]
    x = torch.tensor([-6, -3, -0.5, 0, 0.5, 3, 6], dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(leaf, *args).sum(), leaf, create_graph=True)
    layer, y = Call(function, (x, *args), {}, kinds).layer()
    one = torch.ones_like(y)
    torch.testing.assert_close(layer.vjp(one, ["input"])["input"], slope.detach())
    torch.testing.assert_close(layer.jvp({"input": one}), slope.detach())
    if name != "hardsigmoid":  # which torch cannot differentiate twice
        (bend,) = torch.autograd.grad(slope.sum(), leaf, materialize_grads=True) if slope.requires_grad else (0 * x,)
        found = layer.curvature(one, {"input": one}, ["input"])
        torch.testing.assert_close(found.get("input", torch.zeros_like(x)), bend)


def test_dropout_multiplies_by_the_mask_it_drew():
    torch.manual_seed(0)
    x = numbers(40)
    layer, y = Call(F.dropout, (x, 0.25)).layer()
    mask = torch.where(y == 0, 0, 4 / 3).double()
    assert 0 < int((y == 0).sum()) < 40
    torch.testing.assert_close(y, x * mask)
    torch.testing.assert_close(layer.vjp(x, ["input"])["input"], x * mask)
    torch.testing.assert_close(layer.jvp({"input": x.expand(3, 40)}), (x * mask).expand(3, 40))
    for args, kept in (((0.25, False), 1), ((0,), 1), ((1,), 0)):
        layer, y = Call(F.dropout, (x, *args)).layer()
        assert torch.equal(y, kept * x)
        assert torch.equal(layer.vjp(x, ["input"])["input"], kept * x)


@pytest.mark.parametrize("function", [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_draws_the_mask_that_torch_draws(function, p):
    axes = int(function.__name__[-2]) + 2 if function is not F.dropout else 3
    x = numbers(6, 4, 3, 2, 2)[(..., *[0] * (5 - axes))]
    torch.manual_seed(2)
    (layer, y), after = Call(function, (x, p)).layer(), torch.get_rng_state()
    torch.manual_seed(2)
    expected = function(x, p)
    assert torch.equal(after, torch.get_rng_state())
    assert 0 < int((expected == 0).sum()) < x.numel() or p == 1
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.jvp({"input": x}), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_relu_masks_tangents_of_any_memory_format(layout):
    x = numbers(2, 3, 4, 5).contiguous(memory_format=layout) / 4
    layer, y = Call(F.relu, (x,)).layer()
    for t in (numbers(6, 2, 3, 4, 5, seed=1), random_like(y, (6,))):
        torch.testing.assert_close(layer.jvp({"input": t}), t * (x > 0))
        torch.testing.assert_close(layer.vjp(t, ["input"])["input"], t * (x > 0))
