"""Ordinary model code of many kinds: every method beside the oracle, exact Loss IBP beside ``create_graph=True``."""

import copy
import gc
import threading
import weakref
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint

import ibp_triton as ibp
from ibp_triton.errors import ModelError
from tests.library.comparing import double_backprop, error, oracle, ours

EXACT = ibp.LossIBP(0.3, 2, "exact")
METHODS = [
    *(ibp.BP(), ibp.LossIBP(0.3), EXACT, ibp.PredictionIBP(0.3, 2), ibp.PredictionIBP(0.3, 2, "exact")),
    *(ibp.TangentBP(0.3, 2), ibp.FastTangentBP(0.3, 2, "exact"), ibp.AdversarialTraining(0.1)),
    ibp.FastAdversarialTraining(0.1),
]


class Body(nn.Module):
    """x [N, 4, 6] → logits [N, 5] around a piece of code, which may use the modules and parameters here."""

    def __init__(self, code, *modules):
        super().__init__()
        self.one, self.two, self.code = nn.Linear(6, 6), nn.Linear(6, 5), code
        self.gain, self.matrix = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6, 6))
        self.inner = nn.ModuleList(modules)
        self.register_buffer("state", torch.rand(6))

    def forward(self, x):
        return self.two(self.code(self, torch.tanh(self.one(x)))).mean(1)


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3, 4, 6, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 4, 1]), torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64)


def check(model, judged=True, by_hand=True):
    """Two steps of every method at the same buffers."""
    x, labels, tau = batch()
    network = ibp.Network(model.double())
    start = {name: b.clone() for name, b in model.named_buffers()}
    for method in METHODS:
        tangents = tau if method.needs_tangents else None
        expected = oracle(method, model, x, labels, tangents)[1] if judged else None
        for _ in range(2):
            model.load_state_dict(start, strict=False)
            found = ours(method, network, x, labels, tangents)[1]
            assert expected is None or error(found, expected) < 1e-10, method
        model.load_state_dict(start, strict=False)
        if method is EXACT and by_hand:
            assert error(found, double_backprop(model, x, labels, method.beta)) < 1e-10
            model.load_state_dict(start, strict=False)
    return network


# ------------------------------------------------------------------------------------------- writes in place


def rows_of_zeros(m, x):
    out = torch.zeros_like(x)
    for i in range(6):
        out[..., i] = x[..., 5 - i] * (i + 1)
    return out


def views_of_views(m, x):
    y = m.one(x)
    v = y[:, 1:3]
    v[..., ::2].mul_(2)
    y[:, 0] = v[:, 0]
    v.add_(1)
    return y * y.sum()


def chained(m, x):
    y = m.one(x)
    y.sub_(0.1).mul_(2).div_(3)
    z = F.silu(y, inplace=True)
    return z + y


def shape_in_place(m, x):
    y = m.one(x)
    y.unsqueeze_(1)
    y.mul_(2)
    return y.squeeze_(1).transpose_(1, 2).transpose(1, 2) * m.gain


def accumulated(m, x):
    index, out = torch.tensor([0, 1, 1, 0]), torch.zeros(3, 2, 6, dtype=x.dtype)
    out.index_add_(1, index, x * m.gain)
    return out[:, index]


def scattered(m, x):
    out = x.new_zeros(3, 4, 6)
    out.scatter_add_(2, torch.zeros(3, 4, 6, dtype=torch.long), x)
    return out + x


def masked(m, x):
    y = m.one(x)
    y[y < 0] *= 0.1
    return y.masked_fill(y > 0.3, 0)


def zeroed(m, x):
    y = m.one(x)
    z = y * 2
    y.zero_()
    return z + y


def differences_with_ends(m, x):
    """A linear map by its first argument alone has other operands too, in keywords."""
    ends = {"prepend": x[..., :1] * m.gain, "append": m.gain.expand(3, 4, 6)[..., :1]}
    return torch.diff(x, dim=-1, **ends)[..., :6].square() + torch.diff(x, 1, -1, None, m.state[:1].expand(3, 4, 1))


def numbers_without_axes(m, x):
    a, b = x.mean(), x.std()
    c = torch.fmax(a * 0, 0.1 + b) + torch.maximum(a, b * 2) + a / b + a.sin().pow(2) + torch.lerp(a, b, 0.3)
    return x * c + torch.where(b > 0, a, b) + torch.stack([a, b]).clamp(max=b).sum()


def axes_of_a_number(m, x):
    a, at = x.mean(), torch.tensor(0)
    sums = a.mean(0) + a.sum(-1) + a.logsumexp(0) + a.amax() + a.softmax(0) * a.log_softmax(0) + a.cumsum(0)
    return x * sums + F.prelu(a, m.gain[:1]) + a.gather(0, at) + a.index_select(0, at[None]) + a.index_add(0, at, a)


def more_axes_in_front(m, x):
    """The rank grows by broadcasting: such tangents look as if they had an axis of their own."""
    table = torch.stack([m.matrix[:4], m.matrix[2:]])[:, None]
    y = x + table - torch.lerp(x, table, 0.3) + torch.addcmul(x, table, table) + torch.where(table > 0, x, table)
    return y.sum(0) + (table - x).sigmoid().mean(0)


def margins_of_samples(m, x):
    return F.pad(x.tanh(), (1, 0, 0, 0, 2, 1))[1:4, :, :6] + x.std(dim=2, keepdim=True, correction=None)


def copied(m, x):
    out = torch.empty_like(x)
    out.copy_(x)
    return out.add_(x)


def expanded(m, x):
    y = m.one(x)[:, :1]
    e = y.expand(3, 4, 6)
    y.mul_(2)
    return e * 1


WRITES = [
    *(rows_of_zeros, views_of_views, chained, shape_in_place, accumulated, scattered, masked, zeroed, copied, expanded)
]

# ---------------------------------------------------------------------------------------------- constants


def clamped_out_of_sight(m, x):
    y = m.one(x)
    z = y * 3
    with torch.no_grad():
        y.clamp_(-0.3, 0.3)
    return z + y.sin()


def nearest_code(m, x):
    with torch.no_grad():
        index = torch.cdist(x.detach().reshape(-1, 6), m.matrix.detach()).argmin(1)
    code = m.matrix[index].view_as(x)
    return x + (code - x).detach() + 0.1 * code


def moving_average(m, x):
    with torch.no_grad():
        m.state.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
    return x * m.state


def replaced_buffer(m, x):
    m.state = 0.9 * m.state + 0.1 * x.detach().mean((0, 1))
    return x * m.state


def switched_off(m, x):
    torch.set_grad_enabled(False)
    mean = x.mean(1, keepdim=True)
    torch.set_grad_enabled(True)
    return x - mean


def by_data(m, x):
    y = m.one(x)
    y.data.mul_(2)
    return y - x.data.mean(1, keepdim=True)


CONSTANTS = {
    "written without gradients": clamped_out_of_sight,
    "quantised to a codebook": nearest_code,
    "moving average": moving_average,
    "buffer replaced": replaced_buffer,
    "gradients switched off": switched_off,
    "data": by_data,
    "straight through": lambda m, x: x + (torch.round(x * 4) / 4 - x).detach(),
}

# ------------------------------------------------------------------------------------------- complex numbers


def spectral(m, x):
    weight = torch.view_as_complex(m.matrix[:4, :2].contiguous())
    return torch.fft.irfft(torch.fft.rfft(x) * weight, n=6)


def polar(m, x):
    return torch.view_as_real((x * 1j).exp() * torch.complex(x, m.one(x))).sum(-1)


def spectrogram(m, x):
    window = torch.hann_window(4, dtype=x.dtype)
    z = torch.stft(x.reshape(12, 6), 4, 2, window=window, return_complex=True)
    return z.abs().pow(2).sum((1, 2)).view(3, 4, 1) * x


COMPLEX = [spectral, polar, spectrogram]

# ------------------------------------------------------------------------------------------------- draws

DRAWS = {
    "noise": lambda m, x: x + torch.randn_like(x) * torch.exp(0.1 * m.one(x)),
    "distribution": lambda m, x: torch.distributions.Normal(x, 1 + x.abs()).rsample(),
    "gumbel": lambda m, x: F.gumbel_softmax(x, tau=0.7),
    "rrelu": lambda m, x: F.rrelu(x, training=True),
    "alpha dropout": lambda m, x: F.feature_alpha_dropout(x, 0.3, True) + F.alpha_dropout(x, 0.3, True),
    "drop path": lambda m, x: x * x.new_empty(3, 1, 1).bernoulli_(0.7).div_(0.7) + x,
    "permutation": lambda m, x: 0.3 * x + 0.7 * x[torch.randperm(3)],
    "uniform": lambda m, x: x * (1 + torch.empty(4, 1, dtype=x.dtype).uniform_(0, 0.2)),
}

# -------------------------------------------------------------------------------------- values of many parts

Pair = namedtuple("Pair", "a b")


@dataclass
class Output:
    z: torch.Tensor
    n: int = 1


class Returns(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(6, 6), wrap

    def forward(self, x):
        return self.wrap(self.linear(x), x)


def packed(m, x):
    out, (h, _) = m.inner[0](rnn.pack_padded_sequence(x, [4, 3, 2], batch_first=True))
    return rnn.pad_packed_sequence(out, batch_first=True)[0] + h[-1][:, None]


def cells(m, x):
    h = None
    for t in range(4):
        h = m.inner[0](x[:, t], h)
    return h[:, None].expand(3, 4, 6)


def extremes(m, x):
    pair, both = x.max(1, keepdim=True), torch.aminmax(x, dim=1, keepdim=True)
    return x * pair.values + x.min(1, keepdim=True)[0] * both.max + x.topk(2, 1).values.sum(1, keepdim=True)


def moments(m, x):
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


class Absent(nn.Module):
    """Sometimes x has no part in the logits, as where classes are dropped for guidance."""

    def __init__(self):
        super().__init__()
        self.one, self.nothing = nn.Linear(24, 5), nn.Parameter(torch.randn(5))

    def forward(self, x):
        return self.one(x.flatten(1)) if x[0, 0, 0] < 0.5 else (self.nothing.exp() * 2).expand(len(x), 5)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.key + getattr(m, "semantics", ""))
def test_logits_of_parameters_alone_have_the_losss_gradient(method):
    torch.manual_seed(0)
    model, (x, labels, tau) = Absent().double(), batch()
    network, tangents = ibp.Network(model), tau if method.needs_tangents else None
    for first in (0.2, 0.8, 0.8):
        x[0, 0, 0] = first
        found = ours(method, network, x, labels, tangents)[1]
        assert error(found, oracle(method, model, x, labels, tangents)[1]) < 1e-12
    assert found["nothing"].any()


def starred(m, x):
    first, *rest = x.unbind(1)
    a, b = torch.broadcast_tensors(first, m.gain)
    return torch.stack([rest[-1], a * b, *rest[:2]], 1)


def like_an_activation(m, x):
    return x * m.state.to(x) + m.matrix[0].to(x).to(tensor=x)


def joined_to_nothing(m, x):
    """As a cache of keys that begins empty: torch skips the empty vector."""
    return torch.cat([torch.tensor([], dtype=x.dtype), x[..., :2], x.new_zeros(0), x[..., 2:]], -1)


STRUCTURES = {
    "like an activation": lambda: Body(like_an_activation),
    "joined to nothing": lambda: Body(joined_to_nothing),
    "dictionary": lambda: Body(lambda m, x: m.inner[0](x)["z"], Returns(lambda z, x: {"z": z, "more": [x, 2]})),
    "named tuple": lambda: Body(lambda m, x: m.inner[0](x).a * m.inner[0](x)[1], Returns(Pair)),
    "dataclass": lambda: Body(lambda m, x: torch.tanh(m.inner[0](x).z), Returns(lambda z, x: Output(z))),
    "nested": lambda: Body(lambda m, x: m.inner[0](x)[1][0] * 2, Returns(lambda z, x: (x, (z, None)))),
    "grid": lambda: Body(lambda m, x: x + torch.meshgrid(x[0, 0], m.gain, indexing="ij")[1].sum(0)),
    "extremes": lambda: Body(extremes),
    "moments": lambda: Body(moments),
    "starred": lambda: Body(starred),
    "GRU": lambda: Body(lambda m, x: m.inner[0](x)[0], nn.GRU(6, 6, batch_first=True)),
    "GRU cells": lambda: Body(cells, nn.GRUCell(6, 6)),
}

# ---------------------------------------------------------------------------------------------- functions


def until_small(m, x):
    while x.norm() > 1:
        x = x * 0.7
    return x


def equilibrium(m, x):
    z = torch.zeros_like(x)
    for _ in range(4):
        z = torch.tanh(m.one(z) * 0.3 + x)
    return z


def determinants(m, x):
    a = x[:, :2, :2]
    log = torch.slogdet(a @ a.mT + torch.eye(2, dtype=x.dtype))[1]
    return x * torch.linalg.det(a)[:, None, None] + log[:, None, None]


def standardised(m, x):
    w = m.matrix
    return F.linear(x, (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-5))


FUNCTIONS = {
    "loop on data": until_small,
    "equilibrium": equilibrium,
    "determinants": determinants,
    "weight standardisation": standardised,
    "inverse": lambda m, x: x @ torch.inverse(torch.eye(6, dtype=x.dtype) * 4 + x.mT @ x),
    "eigenvalues": lambda m, x: x * torch.linalg.eigvalsh(x.mT @ x)[:, None],
    "sorted": lambda m, x: x.sort(-1).values * m.gain + x.gather(-1, x.argsort(-1)),
    "cumulative": lambda m, x: x.cumsum(1) + x.cumprod(2) + torch.logcumsumexp(x, 1),
    "einsum": lambda m, x: torch.einsum("nti,ntj,ij->ntj", x, x, m.matrix),
    "normalised": lambda m, x: F.normalize(x, dim=-1) + x.norm(dim=-1, keepdim=True),
    "bilinear": lambda m, x: F.bilinear(x, x, m.matrix.expand(6, 6, 6)),
    "differences with ends": differences_with_ends,
    "numbers without axes": numbers_without_axes,
    "axes of a number": axes_of_a_number,
    "more axes in front": more_axes_in_front,
    "margins of samples": margins_of_samples,
}
TABLE = {
    **{f.__name__: f for f in (*WRITES, *COMPLEX)},
    **CONSTANTS,
    **{f"draws: {name}": f for name, f in DRAWS.items()},
    **FUNCTIONS,
}


@pytest.mark.parametrize("name", TABLE)
def test_code_of_many_kinds(name):
    torch.manual_seed(0)
    check(Body(TABLE[name]))


@torch.library.custom_op("ibp_triton_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    """x³, of which torch knows the backward alone: forward mode finds zero."""
    return x**3


def _kept(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


torch.library.register_autograd(
    "ibp_triton_tests::cube", lambda ctx, d: 3 * ctx.saved_tensors[0].square() * d, setup_context=_kept
)


def products(x):
    index = torch.tensor([0, 1, 0, 1, 2, 0]).expand(3, 4, 6)
    return torch.ones(3, 4, 3, dtype=x.dtype).scatter_reduce(2, index, x, "prod")


def triangle(x):
    """Of the upper triangle alone: reverse mode shares the derivative with the lower one, forward mode does not."""
    return torch.linalg.cholesky(x.mT @ x + 9 * torch.eye(6, dtype=x.dtype) + x[:, :1], upper=True)


FALSE_DUALS = {  # functions of which torch's forward mode is wrong, or not reverse mode's adjoint; the same otherwise
    "an operator of one's own": (lambda m, x: cube(x), lambda m, x: x**3),
    "products by index": (
        lambda m, x: products(x).repeat(1, 1, 2),
        lambda m, x: torch.stack([x[..., i].prod(2) for i in ([0, 2, 5], [1, 3], [4])], 2).repeat(1, 1, 2),
    ),
    "a triangle": (lambda m, x: triangle(x)[:, :4], None),
}


@pytest.mark.parametrize("name", FALSE_DUALS)
def test_where_forward_mode_is_wrong_reverse_mode_is_taken_twice(name):
    torch.manual_seed(0)
    code, same = FALSE_DUALS[name]
    model, (x, labels, tau) = Body(code).double(), batch()
    network, other = ibp.Network(model), Body(same or code).double()
    other.load_state_dict(model.state_dict())
    for method in METHODS:
        tangents = tau if method.needs_tangents else None
        for _ in range(2):
            found = ours(method, network, x, labels, tangents)[1]
            if method is EXACT:
                assert error(found, double_backprop(model, x, labels, method.beta)) < 1e-10
            if same is not None:
                assert error(found, ours(method, ibp.Network(other), x, labels, tangents)[1]) < 1e-10
    with pytest.raises(ModelError, match="not the adjoint of its reverse mode"):
        oracle(EXACT, model, x, labels)


def test_where_forward_mode_is_wrong_under_vmap():
    torch.manual_seed(0)
    model, (x, labels, tau) = Body(lambda m, x: triangle(x)[:, :4]).double(), batch()
    for method in (EXACT, ibp.LossIBP(0.3), ibp.TangentBP(0.3)):
        network, tangents = ibp.Network(model), tau if method.needs_tangents else None
        found = torch.func.vmap(lambda x, f=method, n=network, t=tangents: f.gradients(n, x, labels, t)[1])(
            torch.stack([x, 2 * x])
        )
        for r, one in enumerate((x, 2 * x)):
            expected = ours(method, ibp.Network(model), one, labels, tangents)[1]
            assert error({name: g[r] for name, g in found.items()}, expected) < 1e-10


@pytest.mark.parametrize("name", STRUCTURES)
def test_values_of_many_parts(name):
    torch.manual_seed(0)
    check(STRUCTURES[name]())


@pytest.mark.parametrize("alpha", [0.7, 1.3])
def test_celu_whose_constant_torch_rounds_to_float32(alpha):
    torch.manual_seed(0)
    model = Body(lambda m, x: F.celu(3 * m.one(x), alpha))
    twin = Body(lambda m, x: torch.where(m.one(x) > 0, 3 * m.one(x), alpha * torch.expm1(3 * m.one(x) / alpha)))
    twin.load_state_dict(model.state_dict())
    x, labels = batch()[:2]
    for method in (ibp.BP(), ibp.LossIBP(0.4, 2, "exact"), ibp.PredictionIBP(0.4)):
        expected = oracle(method, twin.double(), x, labels)[1]
        assert error(oracle(method, model.double(), x, labels)[1], expected) < 1e-12
        assert error(ours(method, ibp.Network(model.double()), x, labels)[1], expected) < 1e-12


def test_hardsigmoid_which_torch_cannot_differentiate_twice():
    torch.manual_seed(0)
    check(Body(lambda m, x: x * F.hardsigmoid(3 * m.one(x))), by_hand=False)


def test_attention_by_a_kernel_without_a_second_derivative():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, add_zero_attn=True, batch_first=True)  # which has no rule of its own
    check(Body(lambda m, x: m.inner[0](x, x, x, need_weights=False)[0], attention), by_hand=False)


def test_what_has_no_second_derivative_is_named():
    torch.manual_seed(0)
    network = ibp.Network(Body(lambda m, x: torch.cdist(x, m.matrix, p=3.0)).double())
    x, labels, _ = batch()
    ibp.BP().gradients(network, x, labels)
    with pytest.raises(RuntimeError, match="the model: cdist has no second derivative"):
        ibp.LossIBP(0.1).gradients(network, x, labels)


def test_packed_sequences():
    torch.manual_seed(0)
    check(Body(packed, nn.LSTM(6, 6, batch_first=True)), judged=False)  # torch.func has no packed sequences


def test_a_recurrent_layer_of_two_directions_and_layers():
    torch.manual_seed(0)
    lstm = nn.LSTM(6, 6, 2, bidirectional=True, batch_first=True, dropout=0.2)
    check(Body(lambda m, x: m.inner[0](x)[0].tanh()[..., :6], lstm))


# ------------------------------------------------------------------------------------------- unseen code


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.flatten(0, -2).t() @ x.flatten(0, -2)


class TwoValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2, x.sin()

    @staticmethod
    def backward(ctx, a, b):
        (x,) = ctx.saved_tensors
        return 2 * a + b * x.cos()


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


def two_values(m, x):
    a, b = TwoValues.apply(x)
    return a * b


def gradient_inside(m, x):
    (g,) = torch.autograd.grad((x.sin() * m.gain).sum(), x, create_graph=True)
    return x - g


UNSEEN = {
    "sign": lambda m, x: Sign.apply(x) + x,
    "weight inside": lambda m, x: Product.apply(x, m.matrix).tanh(),
    "two values": two_values,
    "gradient reversal": lambda m, x: Reversal.apply(m.one(x)),
    "gradient inside forward": gradient_inside,
    "transform inside forward": lambda m, x: torch.func.vmap(lambda row: row * row.sum())(x),
    "fake quantisation": lambda m, x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -8, 7),
    "checkpoint": lambda m, x: checkpoint(m.one, x, use_reentrant=False),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_unseen_code_is_a_leaf_of_autograds(name):
    torch.manual_seed(0)
    check(Body(UNSEEN[name]), judged=False)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.key + getattr(m, "semantics", ""))
@pytest.mark.parametrize("name", ["weight inside", "checkpoint"])
def test_a_parameters_hook_sees_the_whole_gradient_once(name, method):
    torch.manual_seed(0)
    model, (x, labels, tau) = Body(UNSEEN[name]).double(), batch()
    network, tangents, seen = ibp.Network(model), tau if method.needs_tangents else None, []
    expected = method.gradients(network, x, labels, tangents)[1]
    for p in model.parameters():
        p.register_hook(lambda d: seen.append(d) or 2 * d)
    method(network, x, labels, tangents).backward()
    assert len(seen) == len([p for p in model.parameters() if p.grad is not None]) < len(expected)
    assert all(p.grad is None or torch.equal(p.grad, 2 * expected[name]) for name, p in model.named_parameters())
    assert error(method.gradients(network, x, labels, tangents)[1], expected) < 1e-12


def test_nan_passes_through_unseen_code():
    x, labels, _ = batch()
    x[0, 0, 0] = torch.nan
    _, found = EXACT.gradients(ibp.Network(Body(two_values).double()), x, labels)
    assert found["one.weight"].isnan().any()


def test_a_scripted_module_is_a_leaf_too():
    torch.manual_seed(0)
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    check(Body(lambda m, x: m.inner[0](x), scripted), judged=False)


def test_a_copied_scripted_module_whose_parameters_have_a_history():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double()
    plain = Body(lambda m, x: m.inner[0](x), inner).double()
    copied = copy.deepcopy(plain)
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        copied.inner[0] = copy.deepcopy(torch.jit.script(inner))
    x, labels, _ = batch()
    assert error(*(EXACT.gradients(ibp.Network(m), x, labels)[1] for m in (copied, plain))) < 1e-12


def test_the_oracle_refuses_forward_mode_in_scripted_modules():
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        model = Body(lambda m, x: m.inner[0](x), torch.jit.script(nn.Linear(6, 6))).double()
    x, labels, _ = batch()
    assert error(oracle(ibp.BP(), model, x, labels)[1], ours(ibp.BP(), ibp.Network(model), x, labels)[1]) < 1e-12
    with pytest.raises(ModelError, match=r"scripted module 'inner\.0'"):
        oracle(EXACT, model, x, labels)


def test_a_reentrant_checkpoint_is_what_it_ran():
    torch.manual_seed(0)
    plain, hidden = (
        Body(lambda m, x, run=run: run(m, x)).double()
        for run in (
            lambda m, x: m.one(x).sin(),
            lambda m, x: checkpoint(lambda u: m.one(u).sin(), x, use_reentrant=True),
        )
    )
    hidden.load_state_dict(plain.state_dict())
    x, labels, _ = batch()
    for method in (ibp.BP(), EXACT):
        found, expected = (ours(method, ibp.Network(m), x, labels)[1] for m in (hidden, plain))
        assert error(found, expected) < 1e-12


def test_a_backward_without_a_derivative_is_named_with_the_methods_that_work():
    model = Body(lambda m, x: OneWay.apply(x)).double()
    x, labels, _ = batch()
    found = ibp.BP().gradients(ibp.Network(model), x, labels)[1]
    loss = F.cross_entropy(model(x), labels)
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    assert error(found, dict(zip(found, expected, strict=True))) < 1e-12
    ibp.FastAdversarialTraining(0.1).gradients(ibp.Network(model), x, labels)
    with pytest.raises(RuntimeError, match=r"OneWay.*bp, at and fast_at"):
        ibp.LossIBP(0.1).gradients(ibp.Network(model), x, labels)


def test_a_hook_on_an_activation_acts_on_autograd_and_is_refused_by_sweeps():
    def forward(m, x):
        x = m.one(x)
        x.register_hook(lambda d: seen.append(d) or 3 * d)
        return x

    seen, model, (x, labels, _) = [], Body(forward).double(), batch()
    found = ibp.BP().gradients(ibp.Network(model), x, labels)[1]
    assert len(seen) == 1
    loss = F.cross_entropy(model(x), labels)
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    assert error(found, dict(zip(found, expected, strict=True))) < 1e-12
    with pytest.raises(TypeError, match=r"register_hook.*never fire.*bp, at, fast_at"):
        ibp.LossIBP(0.1).gradients(ibp.Network(model), x, labels)


def test_a_checkpoint_that_becomes_reentrant_later_is_named():
    x, labels, _ = batch()
    model = Body(lambda m, x: checkpoint(m.one, x, use_reentrant=True) if m.late else m.one(x)).double()
    model.late = False
    network = ibp.Network(model)
    ibp.BP().gradients(network, x, labels)
    model.late = True
    with pytest.raises(TypeError, match=r"use_reentrant=False"):
        ibp.BP().gradients(network, x, labels)


# ------------------------------------------------------------------------------- modules, hooks and changes

NORMED = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)).eval(),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(6, 6)),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("name", NORMED)
def test_reparametrised_weights(name):
    torch.manual_seed(0)
    check(Body(lambda m, x: m.inner[0](x), NORMED[name]()))


def test_adapters_on_frozen_layers():
    torch.manual_seed(0)

    def adapted(m, x):
        base, up, down = m.inner
        return F.linear(x, base.weight + up.weight @ down.weight, base.bias)

    model = Body(adapted, nn.Linear(6, 6), nn.Linear(2, 6, bias=False), nn.Linear(6, 2, bias=False))
    model.inner[0].requires_grad_(False)
    network = check(model, by_hand=False)
    assert "inner.0.weight" not in ibp.BP().gradients(network, *batch()[:2])[1]


def test_tied_weights():
    torch.manual_seed(0)
    twin = nn.Linear(6, 6)
    model = Body(lambda m, x: m.inner[0](x), twin)
    twin.weight = model.one.weight
    check(model)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.key + getattr(m, "semantics", ""))
def test_a_batch_made_in_inference_mode_trains(method):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    network, x, labels = ibp.Network(model), torch.rand(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    tau = torch.rand(2, 4, 6, dtype=torch.float64) if method.needs_tangents else None
    with torch.inference_mode():
        made = [None if a is None else a.clone() for a in (x, labels, tau)]
    expected = oracle(method, model, x, labels, tau)[1]
    assert error(oracle(method, model, *made)[1], expected) == 0
    assert error(ours(method, network, *made)[1], expected) < 1e-12
    torch.manual_seed(5)
    method(network, *made).backward()
    assert error({name: p.grad for name, p in model.named_parameters()}, expected) < 1e-12
    with torch.inference_mode():
        ibp.fgsm(model, made[0], made[1], 0.1)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.key + getattr(m, "semantics", ""))
def test_hooks_fire_once_a_forward_pass(method):
    model = Body(lambda m, x: m.inner[0](x), nn.Tanh()).double()
    seen = []
    model.inner[0].register_forward_hook(lambda m, i, o: seen.append(o.detach().numpy().mean()))
    model.inner[0].register_full_backward_hook(lambda m, i, o: seen.append(o[0].detach().numpy().mean()))
    x, labels, tau = batch()
    method(ibp.Network(model), x, labels, tau if method.needs_tangents else None).backward()
    passes = method.program.passes
    assert len(seen) == 2 * passes  # forward and backward


def test_hooks_that_change_values_are_part_of_the_model():
    torch.manual_seed(0)
    model = Body(lambda m, x: m.inner[0](x), nn.Tanh())
    model.inner[0].register_forward_hook(lambda m, i, o: o * 2)
    model.inner[0].register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    check(model)


def replaced_layer(model):
    model.inner[0] = nn.Linear(6, 6).double()


CHANGES = {
    "dropout": lambda m: setattr(m.inner[1], "p", 0.1),
    "softplus": lambda m: setattr(m.inner[2], "beta", 10.0),
    "norm's eps": lambda m: setattr(m.inner[3], "eps", 0.5),
    "function": lambda m: setattr(m, "act", torch.sin),
    "number": lambda m: setattr(m, "scale", 3.0),
    "depth": lambda m: setattr(m, "depth", 3),
    "layer": replaced_layer,
    "mode": lambda m: m.eval(),
    "frozen": lambda m: m.inner[0].requires_grad_(False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_steps_take_effect(name):
    torch.manual_seed(0)

    def code(m, x):
        linear, dropout, softplus, norm = m.inner
        x = dropout(softplus(norm(linear(x)))) * m.scale
        for _ in range(m.depth):
            x = m.act(x)
        return x

    model = Body(code, nn.Linear(6, 6), nn.Dropout(0.5), nn.Softplus(), nn.LayerNorm(6)).double()
    model.scale, model.depth, model.act = 1.0, 1, torch.tanh
    network, (x, labels, _) = ibp.Network(model), batch()
    for change in (lambda m: None, CHANGES[name]):
        change(model)
        assert error(ours(EXACT, network, x, labels)[1], oracle(EXACT, model, x, labels)[1]) < 1e-10


def test_a_layer_made_where_a_dead_one_lay_is_another_layer():
    model = Body(lambda m, x: m.inner[0](x), nn.Linear(6, 6)).double()
    network, (x, labels, _) = ibp.Network(model), batch()
    for _ in range(20):
        model.inner[0] = nn.Linear(6, 6, bias=False).double()
        gc.collect()
        found = ibp.BP().gradients(network, x, labels)[1]
        assert error(found, ibp.reference.gradients(model, ibp.BP(), x, labels)[1]) < 1e-12


def test_nothing_of_a_step_outlives_it():
    class Watched(nn.Module):
        def forward(self, x):
            y = x * 2
            alive.append(weakref.ref(y))
            return y

    alive = []
    network, (x, labels, tau) = ibp.Network(Body(lambda m, x: m.inner[0](x), Watched()).double()), batch()
    for method in METHODS:
        method.gradients(network, x, labels, tau if method.needs_tangents else None)
    gc.collect()
    assert not any(reference() is not None for reference in alive)
    graph = network.graph()
    for _ in range(3):
        ibp.BP().gradients(network, x, labels)
        assert network.graph() is graph  # followed, not made again


def test_two_threads_train_two_networks_while_a_third_only_runs_one():
    torch.manual_seed(0)
    models = [Body(lambda m, x: torch.relu_(m.one(x)), nn.Tanh()).double() for _ in range(2)]
    x, labels, _ = batch()
    expected = [ibp.reference.gradients(m, EXACT, x, labels)[1] for m in models]
    plain, failures = models[0](x).detach(), []

    def train(model, right):
        network = ibp.Network(model)
        for _ in range(20):
            if error(EXACT.gradients(network, x, labels)[1], right) > 1e-12:
                failures.append(model)

    def run():
        for _ in range(40):
            if not torch.equal(models[0](x), plain):
                failures.append("plain")

    threads = [threading.Thread(target=train, args=pair) for pair in zip(models, expected, strict=True)]
    threads.append(threading.Thread(target=run))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ------------------------------------------------------------------------------------------- interfaces


class Tokens(nn.Module):
    """Several inputs, one of them by name, and several outputs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 5)

    def forward(self, ids=None, embeds=None, mask=None):
        z = (torch.tanh(self.body(embeds)) * mask[..., None]).sum(1)
        return {"logits": z, "other": 2 * z, "hidden": (z, embeds)}


def test_other_inputs_and_outputs_by_name():
    model = Tokens().double()
    x, labels, tau = batch()
    mask = (torch.arange(12).view(3, 4) % 3 > 0).double()
    for output in (None, "logits", lambda result: result["hidden"][0]):
        network = ibp.Network(model, x="embeds", output=output)
        for method in METHODS:
            tangents = tau if method.needs_tangents else None
            found = method.gradients(network, x, labels, tangents, extra={"mask": mask})[1]
            expected = ibp.reference.gradients(
                model, method, x, labels, tangents, extra={"mask": mask}, interface=network.interface
            )[1]
            assert error(found, expected) < 1e-12
    assert ibp.Network(model, x=1).interface.call(model, x, {"mask": mask})["logits"].shape == (3, 5)
    assert "linear" in ibp.Network(model, x="embeds").summary([3, 4, 6], extra={"mask": mask})
    with pytest.raises(TypeError, match=r"output='logit'.*one of 'logits', 'other'"):
        ibp.BP().gradients(ibp.Network(model, x="embeds", output="logit"), x, labels, extra={"mask": mask})
    with pytest.raises(TypeError, match="extra must map the names"):
        ibp.BP().gradients(network, x, labels, extra=mask)


def test_an_autocast_of_the_models_own_is_refused():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.linear(x)

    with pytest.raises(RuntimeError, match=r"dtype=torch.bfloat16"):
        ibp.BP().gradients(ibp.Network(Cast()), torch.rand(3, 6), torch.tensor([0, 1, 2]))


def test_parameters_of_two_dtypes():
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.adapter = nn.Linear(6, 6).bfloat16(), nn.Linear(6, 4)

        def forward(self, x):
            return self.adapter(self.base(x.bfloat16()).float())

    x, labels = torch.rand(3, 6), torch.tensor([0, 1, 2])
    model = Casting()
    found = ibp.BP().gradients(ibp.Network(model), x, labels)[1]
    expected = torch.autograd.grad(F.cross_entropy(model(x), labels), list(model.parameters()))
    assert (
        error({k: v.float() for k, v in found.items()}, dict(zip(found, (g.float() for g in expected), strict=True)))
        < 1e-2
    )
    plain = nn.Sequential(nn.Linear(6, 6).bfloat16(), nn.Linear(6, 4))
    with pytest.raises(TypeError, match=r"pass Network\(model, dtype=torch.float32\)"):
        ibp.LossIBP(0.1).gradients(ibp.Network(plain), x, labels)
    ibp.LossIBP(0.1).gradients(ibp.Network(plain, dtype=torch.float32), x, labels)


def test_code_that_misses_the_dtype_is_told_where_to_cast():
    x, labels = torch.rand(3, 4, 6), torch.tensor([0, 1, 2])
    constants = Body(lambda m, x: x @ torch.eye(6))
    recurrent = Body(lambda m, x: m.inner[0](x)[0], nn.LSTM(6, 6, batch_first=True))
    for model in (constants, recurrent):
        with pytest.raises(TypeError, match=r"With dtype=torch.bfloat16 .* cast there by \.to\(x\.dtype\)"):
            ibp.LossIBP(0.1).gradients(ibp.Network(model, dtype=torch.bfloat16), x, labels)


class Turning(torch.autograd.Function):
    """Right at first; later with a backward that is not linear."""

    later = False

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, d):
        return 2 * d + 1 if Turning.later else 2 * d


def test_unseen_code_is_checked_at_every_step(monkeypatch):
    x, labels, _ = batch()
    network = ibp.Network(Body(lambda m, x: Turning.apply(x)).double())
    ibp.LossIBP(0.1).gradients(network, x, labels)
    monkeypatch.setattr(Turning, "later", True)
    with pytest.raises(RuntimeError, match="no right second derivative"):
        ibp.LossIBP(0.1).gradients(network, x, labels)
