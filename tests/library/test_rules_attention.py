"""Softmax, products of activations and attention against torch.func."""

import operator
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ibp_triton as ibp
from ibp_triton.backends.torch import attention
from ibp_triton.backends.torch.multihead import MultiHeadAttention
from ibp_triton.backends.torch.softmax import softmax_pull
from ibp_triton.layer import Pieces
from tests.library.comparing import error, oracle, ours
from tests.library.layers import Call, check, floating, half_agrees, random_like


def numbers(*shape, seed=0, cast=lambda x: x):
    generator = torch.Generator().manual_seed(seed)
    return cast(torch.randn(*shape, generator=generator, dtype=torch.float64))


def pair(function, left, right, kinds=None, cast=lambda x: x, **kwargs):
    return Call(function, (numbers(*left, cast=cast), numbers(*right, seed=1, cast=cast)), kwargs, kinds or {})


def triple(function, shapes, kinds=None, cast=lambda x: x, **kwargs):
    return Call(function, tuple(numbers(*s, seed=i, cast=cast) for i, s in enumerate(shapes)), kwargs, kinds or {})


def einsum(equation, *shapes, kinds=None, cast=lambda x: x):
    values = [numbers(*s, seed=i, cast=cast) for i, s in enumerate(shapes)]
    return Call(torch.einsum, (equation, *values), {}, kinds or {})


def softmax(function, *args, shape=(3, 4, 5), cast=lambda x: x, **kwargs):
    return Call(function, (numbers(*shape, cast=cast), *args), kwargs)


def sdpa(q=(2, 3, 4, 5), k=(2, 3, 6, 5), v=(2, 3, 6, 7), kinds=None, cast=lambda x: x, **kwargs):
    values = tuple(numbers(*s, seed=i, cast=cast) for i, s in enumerate((q, k, v)))
    return Call(F.scaled_dot_product_attention, values, kwargs, {"attn_mask": "constant"} | (kinds or {}))


def bools(*shape):
    mask = numbers(*shape, seed=9) > -0.5
    return mask.index_fill_(-2, torch.tensor(0), False)  # one row sees nothing


PARAMETRIC = {"other": "parametric"}
CASES = {
    "softmax": lambda **k: softmax(F.softmax, -1, **k),
    "softmax along 1": lambda **k: softmax(torch.softmax, dim=1, **k),
    "softmax of a method, batch 1": lambda **k: softmax(torch.Tensor.softmax, 0, shape=(1, 4), **k),
    "softmax along 0": lambda **k: softmax(F.softmax, 0, shape=(3, 4), **k),
    "softmax, strided": lambda **k: softmax(F.softmax, 1, shape=(2, 4, 3, 3), **k),
    "log softmax": lambda **k: softmax(F.log_softmax, -1, **k),
    "log softmax along 1": lambda **k: softmax(torch.log_softmax, 1, **k),
    "matmul": lambda **k: pair(operator.matmul, (2, 3, 4, 5), (2, 3, 5, 2), **k),
    "matmul by a parameter": lambda **k: pair(torch.matmul, (2, 3, 4, 5), (5, 2), PARAMETRIC, **k),
    "matmul of a parameter": lambda **k: pair(torch.matmul, (4, 5), (3, 5, 2), {"input": "parametric"}, **k),
    "matmul, broadcast": lambda **k: pair(torch.Tensor.matmul, (3, 1, 4, 5), (2, 5, 2), **k),
    "matmul of a row": lambda **k: pair(torch.matmul, (5,), (3, 5, 2), **k),
    "matmul by a column": lambda **k: pair(torch.matmul, (2, 3, 5), (5,), PARAMETRIC, **k),
    "matmul of vectors": lambda **k: pair(torch.matmul, (5,), (5,), **k),
    "mm": lambda **k: pair(torch.mm, (3, 5), (5, 2), {"mat2": "parametric"}, **k),
    "bmm": lambda **k: pair(torch.bmm, (3, 4, 5), (3, 5, 2), **k),
    "addmm": lambda **k: triple(torch.addmm, ((2,), (3, 5), (5, 2)), {"input": "parametric"}, **k),
    "addmm by a parameter": lambda **k: triple(torch.addmm, ((1, 2), (3, 5), (5, 2)), {"mat2": "parametric"}, **k),
    "baddbmm": lambda **k: triple(torch.baddbmm, ((4, 2), (3, 4, 5), (3, 5, 2)), beta=0.5, alpha=2, **k),
    "einsum of two": lambda **k: einsum("bhld,bhsd->bhls", (2, 3, 4, 5), (2, 3, 6, 5), **k),
    "einsum by a parameter": lambda **k: einsum(
        "nld,dk -> nlk", (2, 4, 5), (5, 3), kinds={"operands.1": "parametric"}, **k
    ),
    "einsum, implied": lambda **k: einsum("ij,jk", (2, 4), (4, 5), **k),
    "einsum of one": lambda **k: einsum("abc->cab", (2, 3, 4), **k),
    "attention": lambda **k: sdpa(**k),
    "attention, causal": lambda **k: sdpa(k=(2, 3, 4, 5), v=(2, 3, 4, 7), is_causal=True, **k),
    "attention, scaled": lambda **k: sdpa(scale=0.3, **k),
    "attention, masked": lambda **k: sdpa(attn_mask=bools(4, 6), **k),
    "attention, grouped queries": lambda **k: sdpa((2, 6, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5), enable_gqa=True, **k),
    "attention, learned queries": lambda **k: sdpa(kinds={"query": "parametric"}, **k),
    "attention to constants": lambda **k: sdpa(kinds={"key": "constant", "value": "parametric"}, **k),
    "attention, five axes": lambda **k: sdpa((2, 2, 3, 4, 5), (2, 2, 3, 6, 5), (2, 2, 3, 6, 7), **k),
    "attention, three axes, batch 1": lambda **k: sdpa((1, 4, 5), (1, 6, 5), (1, 6, 7), **k),
}
NOT_COUNTED = ("matmul by a column", "matmul of vectors")  # by torch, whose counter knows products of matrices


@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_torch(name):
    torch.manual_seed(3)
    check(CASES[name]())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision(name, dtype):
    torch.manual_seed(5)
    half_agrees(lambda cast: CASES[name](cast=cast), dtype, 0.05)


def test_attention_with_a_mask_that_is_added():
    torch.manual_seed(3)
    for kind in ("constant", "parametric", "active"):
        for shape in ((3, 4, 6), (4, 1), (6,)):  # broadcast over what is in front
            check(sdpa(attn_mask=numbers(*shape, seed=8), kinds={"attn_mask": kind}))
    others = dict.fromkeys(("query", "key", "value"), "constant")
    check(sdpa(attn_mask=numbers(4, 6), kinds={**others, "attn_mask": "active"}))


def test_attention_draws_the_dropout_mask_as_torch_does():
    call = sdpa(dropout_p=0.4)
    torch.manual_seed(3)
    layer, value = call.layer()
    torch.manual_seed(3)
    expected = call.plain(list(call.operands))(*call.args)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    t, d = random_like(call.operands["query"], ()), random_like(value, ())
    left = (layer.jvp({"query": t}) * d).sum()
    torch.testing.assert_close(left, (layer.vjp(d, ["query"])["query"] * t).sum())


def multi_head(shapes, module, kinds=None, **kwargs):
    """A call of F.multi_head_attention_forward as nn.MultiheadAttention makes it."""
    x = numbers(*shapes[0])
    values = [x if i and s is None else numbers(*s, seed=i) for i, s in enumerate(shapes)]
    module = module.double()
    separate = {}
    if module.in_proj_weight is None:
        separate = {f"{n}_proj_weight": getattr(module, f"{n}_proj_weight").detach() for n in "qkv"}
        separate["use_separate_proj_weight"] = True
    packed = None if separate else module.in_proj_weight.detach()
    bias = None if module.in_proj_bias is None else torch.nn.init.normal_(module.in_proj_bias).detach()
    last = None if module.out_proj.bias is None else module.out_proj.bias.detach()
    args = (*values, module.embed_dim, module.num_heads, packed, bias, None, None, False)
    args = (*args, module.dropout, module.out_proj.weight.detach(), last)
    names = ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias")
    parametric = {**dict.fromkeys((*names, *separate), "parametric"), "attn_mask": "constant"}
    return Call(F.multi_head_attention_forward, args, separate | kwargs, parametric | (kinds or {}))


SELF, CROSS = ((4, 2, 6), None, None), ((4, 2, 6), (5, 2, 6), (5, 2, 6))
HEADS = {
    "self": lambda: multi_head(SELF, nn.MultiheadAttention(6, 2), need_weights=False),
    "self, with weights": lambda: multi_head(SELF, nn.MultiheadAttention(6, 2)),
    "cross, without biases": lambda: multi_head(CROSS, nn.MultiheadAttention(6, 3, bias=False), need_weights=False),
    "cross, weights of each head": lambda: multi_head(CROSS, nn.MultiheadAttention(6, 3), average_attn_weights=False),
    "cross, learned queries": lambda: multi_head(CROSS, nn.MultiheadAttention(6, 2), {"query": "parametric"}),
    "cross, weights that stand still": lambda: multi_head(
        CROSS, nn.MultiheadAttention(6, 2), {"query": "constant", "key": "constant"}
    ),
    "cross, other widths": lambda: multi_head(
        ((4, 2, 6), (5, 2, 3), (5, 2, 7)), nn.MultiheadAttention(6, 2, kdim=3, vdim=7)
    ),
    "key is value": lambda: multi_head(((4, 2, 6), (5, 2, 6), (5, 2, 6)), nn.MultiheadAttention(6, 1)),
    "unbatched": lambda: multi_head(((4, 6), None, None), nn.MultiheadAttention(6, 2)),
    "unbatched, weights of each head": lambda: multi_head(
        ((4, 6), None, None), nn.MultiheadAttention(6, 2), average_attn_weights=False
    ),
    "unbatched, padded": lambda: multi_head(
        ((4, 6), None, None), nn.MultiheadAttention(6, 2), key_padding_mask=torch.tensor([False, True, False, False])
    ),
    "masked": lambda: multi_head(
        SELF,
        nn.MultiheadAttention(6, 2),
        attn_mask=torch.ones(4, 4, dtype=torch.bool).triu(1),
        key_padding_mask=torch.tensor([[False] * 4, [False] * 3 + [True]]),
    ),
    "masks that are added": lambda: multi_head(
        SELF, nn.MultiheadAttention(6, 2), attn_mask=numbers(4, 4, 4, seed=7), need_weights=False
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_multi_head_attention_agrees_with_torch(name):
    torch.manual_seed(3)
    check(HEADS[name](), leads=((), (1,), (3,)))


@pytest.mark.parametrize("name", [name for name in CASES | HEADS if name not in NOT_COUNTED])
def test_multiply_adds_are_torchs(name):
    call = (CASES | HEADS)[name]()
    layer, _ = call.layer()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call.function(*call.args, **call.kwargs)
    assert 2 * layer.multiply_adds() == counter.get_total_flops()


def test_what_multi_head_attention_keeps_of_one_derivative_does_not_answer_for_another():
    """It is linear: the derivatives of the output and of the weights add up."""
    layer, (output, weights) = HEADS["self, with weights"]().layer()
    parts = random_like(output, ()), random_like(weights, ())
    alone = [layer.vjp(Pieces({i: part}), ["query"])["query"] for i, part in enumerate(parts)]
    for both in (Pieces(enumerate(parts)), Pieces({1: parts[1], 0: parts[0]})):
        torch.testing.assert_close(layer.vjp(both, ["query"])["query"], alone[0] + alone[1])
        torch.testing.assert_close(layer.vjp(Pieces({0: parts[0]}), ["query"])["query"], alone[0])


@pytest.mark.parametrize("name", ["self", "unbatched, weights of each head"])
def test_many_derivatives_meet_one_tangent_as_their_sum(name):
    call = HEADS[name]()
    layer, value = call.layer()
    d, t = random_like(floating(value), (3,)), {n: random_like(call.operands[n], ()) for n in call.names("active")}
    found = layer.curvature(Pieces(d), t, ["query"])["query"]
    expected = layer.curvature(Pieces({i: part.sum(0) for i, part in d.items()}), t, ["query"])["query"]
    torch.testing.assert_close(found, expected)


def test_multi_head_attention_draws_its_dropout_as_torch_does():
    for weights in (True, False):
        call = multi_head(SELF, nn.MultiheadAttention(6, 2, dropout=0.3), need_weights=weights)
        torch.manual_seed(3)
        _, value = call.layer()
        torch.manual_seed(3)
        expected = call.function(*call.args, **call.kwargs)
        torch.testing.assert_close(value[0], expected[0])


def test_what_multi_head_attention_does_not_cover_is_left_to_the_generic_rule():
    call = multi_head(SELF, nn.MultiheadAttention(6, 2))
    assert call.rule() is MultiHeadAttention
    call.arguments["add_zero_attn"] = True
    assert call.rule() is None
    assert einsum("ii->i", (3, 3)).rule() is None
    assert einsum("ij->i", (3, 3)).rule() is None
    assert einsum("ij,jk,kl", (3, 4), (4, 5), (5, 2)).rule() is None
    assert Call(F.softmax, (numbers(3),)).rule() is None


NESTED = ["softmax", "matmul", "matmul by a parameter", "einsum of two", "attention", "attention, masked"]


@pytest.mark.parametrize("name", NESTED)
def test_it_runs_under_vmap(name):
    torch.manual_seed(6)
    call = CASES[name]()
    where = 1 if call.function is torch.einsum else 0
    along = call.names("active")
    _, value = call.layer()
    d, t = random_like(value, (2,)), {n: random_like(call.operands[n], (2,)) for n in along}

    def one(x):
        args = (*call.args[:where], x, *call.args[where + 1 :])
        layer, y = Call(call.function, args, call.kwargs, call.kinds).layer()
        return y, layer.vjp(d, list(call.operands)), layer.jvp(t), layer.curvature(d, t, along)

    xs = torch.stack([call.args[where], random_like(call.args[where], ())])
    found, expected = torch.func.vmap(one)(xs), [one(x) for x in xs]
    flat = [torch.utils._pytree.tree_leaves(e) for e in (found, *expected)]
    for both, first, second in zip(*flat, strict=True):
        torch.testing.assert_close(both, torch.stack([first, second]), rtol=1e-9, atol=1e-10)


def test_attentions_tangents_may_be_vmapped_alone():
    torch.manual_seed(6)
    call = sdpa((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 7))
    layer, value = call.layer()
    along = call.names("active")
    d = torch.randn(3, 2, *value.shape, dtype=value.dtype)
    t = {n: torch.randn(3, 2, *call.operands[n].shape, dtype=value.dtype) for n in along}
    for found, expected in (
        (torch.func.vmap(lambda d: layer.vjp(d, along))(d), [layer.vjp(one, along) for one in d]),
        (
            torch.func.vmap(lambda t: {"": layer.jvp(t)})(t),
            [{"": layer.jvp({n: t[n][i] for n in t})} for i in range(3)],
        ),
    ):
        for name, both in found.items():
            torch.testing.assert_close(both, torch.stack([one[name] for one in expected]), rtol=1e-12, atol=1e-12)


def test_attention_broadcasts():
    torch.manual_seed(3)
    check(sdpa((1, 3, 4, 5), (1, 3, 6, 5), (2, 3, 6, 7)))
    check(sdpa((2, 3, 4, 5), (1, 3, 6, 5), (1, 1, 6, 7), attn_mask=bools(2, 1, 4, 6)))


@pytest.mark.parametrize("name", [name for name in CASES if "attention" in name])
def test_a_few_samples_at_a_time_are_all_of_them(name, monkeypatch):
    monkeypatch.setattr(attention, "_CACHED", 1)
    torch.manual_seed(3)
    check(CASES[name]())


class Attending(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x):
        return self.attend(x, x, x, need_weights=False)[0].mean(1)


class Across(nn.Module):
    """Attention to rows in another order, and its weights if they are asked for."""

    def __init__(self, weights):
        super().__init__()
        self.attend, self.weights = nn.MultiheadAttention(8, 2, batch_first=True), weights

    def forward(self, x):
        y, p = self.attend(x, x.roll(1, 1), x.tanh(), need_weights=self.weights)
        return y.mean(1) if p is None else y.mean(1) + p.square().sum((1, 2))[:, None]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("method", [ibp.LossIBP(0.3), ibp.FastTangentBP(0.3)])
def test_other_terms_of_multi_head_attention_add_up_one_by_one(method, weights):
    torch.manual_seed(0)
    model, x, labels = Across(weights).double(), torch.randn(4, 5, 8).double(), torch.arange(4) % 8
    network, tau = ibp.Network(model), torch.randn(1, 4, 5, 8).double() if method.needs_tangents else None
    assert error(ours(method, network, x, labels, tau)[1], oracle(method, model, x, labels, tau)[1]) < 1e-12
    assert any(node.rule is MultiHeadAttention for node in network.graph().nodes)


@pytest.mark.parametrize("batch_first", [False, True])
def test_self_attention_takes_each_product_over_all_rows_at_once(batch_first):
    model, x = Attending(batch_first), torch.randn(4, 5, 8)
    network = ibp.Network(model)
    with profile(record_shapes=True) as seen:
        ibp.LossIBP(0.1).gradients(network, x, torch.arange(4) % 8)
    assert any(node.rule is MultiHeadAttention for node in network.graph().nodes)
    batched = [event for event in seen.events() if event.name == "aten::bmm"]
    assert batched
    assert all(event.input_shapes[0][0] == (8 if batch_first else 10) for event in batched)  # heads of samples


@pytest.mark.parametrize("frozen", [(), ("in_proj_weight",), ("out_proj.weight", "in_proj_bias"), ("out_proj.bias",)])
@pytest.mark.parametrize("method", [ibp.LossIBP(0.3), ibp.LossIBP(torch.tensor(0.3)), ibp.FastTangentBP(0.3)])
def test_activations_and_tangents_beside_one_derivative_share_products(method, frozen):
    model, x, labels = Attending(True).double(), torch.randn(4, 5, 8).double(), torch.arange(4) % 8
    for name in frozen:
        model.attend.get_parameter(name).requires_grad_(False)
    network, tau = ibp.Network(model), torch.randn(1, 4, 5, 8).double() if method.needs_tangents else None
    assert error(ours(method, network, x, labels, tau)[1], oracle(method, model, x, labels, tau)[1]) < 1e-12
    shapes = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes[tuple(out.shape) if func is torch.ops.aten.mm.default else ()] += 1
            return out

    with Counting():
        method.gradients(network, x, labels, tau)
    assert shapes[24, 8] == (0 if "in_proj_weight" in frozen else 2)
    assert shapes[8, 8] == (0 if "out_proj.weight" in frozen else 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 64), (1, 1)])
def test_a_softmax_pulls_in_the_place_of_a_fresh_derivative_alone(shape, dtype):
    y, d = torch.softmax(torch.randn(shape), -1).to(dtype), torch.randn(shape).to(dtype)
    before, fresh = d.clone(), d.clone()
    expected = softmax_pull(y, d)
    assert torch.equal(d, before)
    found = softmax_pull(y, fresh, fresh=True)
    assert torch.equal(found, expected)
    assert found.data_ptr() == fresh.data_ptr()
