"""Networks with attention on kernels: the gradients of torch's rules, and what is left to those rules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ibp_triton as ibp
from ibp_triton.backends.torch.attention import Attention
from ibp_triton.backends.triton.attention_rules import KernelAttention, attention
from ibp_triton.kernels.launcher import recording
from ibp_triton.vmapped import Inputs, Vmapped
from tests.kernels.support import randn
from tests.kernels.test_methods import TOLERANCE, errors

WIDTH, HEADS, TOKENS = 8, 2, 5
KERNELS = ("attend", "push", "pull")


class SelfAttention(nn.Module):
    """Heads from one projection; ``options`` of F.scaled_dot_product_attention."""

    def __init__(self, **options):
        super().__init__()
        self.heads, self.out, self.options = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), options

    def forward(self, x):
        samples, tokens, _ = x.shape
        q, k, v = self.heads(x).view(samples, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if self.options.get("enable_gqa"):
            k, v = k[:, :1], v[:, :1]
        y = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.out(y.transpose(1, 2).reshape(samples, tokens, -1))


class MultiHead(nn.Module):
    """nn.MultiheadAttention of x with itself."""

    def __init__(self, need_weights=False, **options):
        super().__init__()
        self.attend, self.need_weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options), need_weights

    def forward(self, x):
        return self.attend(x, x, x, need_weights=self.need_weights)[0]


class LearnedMask(nn.Module):
    """A mask with derivatives, one for all heads."""

    def __init__(self):
        super().__init__()
        self.heads, self.mask = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(TOKENS, TOKENS))

    def forward(self, x):
        q, k, v = self.heads(x).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, self.mask)[:, 0]


def vit(attend):
    """A block of a vision transformer over five tokens of six numbers, and its head."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.attend, self.second = nn.LayerNorm(WIDTH), attend(), nn.LayerNorm(WIDTH)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

        def forward(self, x):
            x = x + self.attend(self.first(x))
            return x + self.mlp(self.second(x))

    return nn.Sequential(nn.Linear(6, WIDTH), Block(), nn.Flatten(), nn.Linear(TOKENS * WIDTH, 10))


SEEN = torch.tensor([[True] * 3 + [False] * 2] * 4 + [[False] * 5])
NETWORKS = {
    "self": SelfAttention,
    "causal": lambda: SelfAttention(is_causal=True, scale=0.3),
    "booleans": lambda: SelfAttention(attn_mask=SEEN),
    "grouped": lambda: SelfAttention(enable_gqa=True),
    "multi-head": MultiHead,
    "learned mask": LearnedMask,
}
METHODS = (ibp.BP(), ibp.LossIBP(0.3), ibp.TangentBP(0.3), ibp.LossIBP(0.3, 2, "exact"), ibp.TangentBP(0.3, 2, "exact"))
CASES = [
    *[(name, method) for name in ("self", "multi-head") for method in METHODS],
    *[(name, METHODS[1]) for name in ("causal", "booleans", "grouped")],
    ("learned mask", METHODS[1]),
]


def setting(name):
    torch.manual_seed(5)
    model = vit(NETWORKS[name])
    return model, torch.randn(2, TOKENS, 6), torch.tensor([1, 7]), torch.randn(2, 2, TOKENS, 6)


@pytest.mark.parametrize(
    ("name", "method"),
    [("self", METHODS[2]), ("self", METHODS[3]), ("multi-head", METHODS[1]), ("booleans", METHODS[1])],
)
def test_replicas_share_launches(name, method):
    """Gradients up to rounding, and as many launches as of one."""
    model, x, labels, tangents = setting(name)
    tau, counts = tangents if method.needs_tangents else None, []
    models = [model, vit(NETWORKS[name])]
    for some in (models[:1], models):
        replicas = ibp.ReplicatedNetwork(some, seeds=range(len(some)), backend="triton")
        with recording() as launches:
            found = Vmapped(replicas)([method] * len(some), Inputs(x, labels, tau, {}))
        counts.append([launch.name for launch in launches])
    assert counts[0] == counts[1]
    for r, one in enumerate(models):
        with recording() as launches:
            _, expected = method.gradients(ibp.Network(one, backend="triton"), x, labels, tau)
        own = [launch.name for launch in launches]
        assert [own.count(kernel) for kernel in KERNELS] == [counts[1].count(kernel) for kernel in KERNELS]
        assert errors({key: g[r] for key, g in found.gradients.items()}, expected) < TOLERANCE


@pytest.mark.parametrize(("name", "method"), CASES)
def test_networks_have_the_gradients_of_torchs_rules(name, method):
    model, x, labels, tangents = setting(name)
    tau = tangents if method.needs_tangents else None
    networks = [ibp.Network(model, backend=backend) for backend in ("triton", "torch")]
    (value, found), (expected_value, expected) = (method.gradients(n, x, labels, tau) for n in networks)
    assert errors(found, expected) < TOLERANCE
    torch.testing.assert_close(value, expected_value)


def counts(name, method):
    """Launches of the attention kernels in a step."""
    model, x, labels, tangents = setting(name)
    with recording() as launches:
        method.gradients(ibp.Network(model, backend="triton"), x, labels, tangents if method.needs_tangents else None)
    return [sum(one.name == kernel for one in launches) for kernel in KERNELS]


def test_a_sweep_is_one_launch_for_all_tangents():
    """The curvature of exact semantics is torch's; so is the penalty's share of multi-head attention's weights."""
    assert counts("self", ibp.BP()) == [1, 0, 1]
    assert counts("self", ibp.LossIBP(0.3)) == [1, 1, 1]
    assert counts("self", ibp.TangentBP(0.3)) == [1, 1, 2]
    assert counts("self", ibp.LossIBP(0.3, 2, "exact")) == [1, 1, 2]
    assert counts("multi-head", ibp.BP()) == [1, 0, 1]
    assert counts("multi-head", ibp.LossIBP(0.3)) == [1, 0, 1]


def rules(model, shape):
    """The rules of a model's layers by its summary."""
    lines = ibp.Network(model, backend="triton").summary(shape).splitlines()[1:-2]
    return [line.split()[2] for line in lines]


def test_the_summary_names_them():
    for name, rule in (("self", "TritonAttention"), ("multi-head", "TritonMultiHeadAttention")):
        model, x, *_ = setting(name)
        assert rules(model, x.shape).count(rule) == 1


def test_bfloat16_is_no_further_from_float64_than_torchs_rules():
    model, x, labels, _ = setting("self")
    method, found = ibp.LossIBP(0.3, norm=2), {}
    for backend in ("triton", "torch"):
        _, found[backend] = method.gradients(ibp.Network(model, backend=backend, dtype=torch.bfloat16), x, labels)
    _, expected = method.gradients(ibp.Network(model.double(), backend="torch"), x.double(), labels)
    off = {backend: errors(gradients, expected) for backend, gradients in found.items()}
    assert off["triton"] < max(1.5 * off["torch"], 0.02)


def sides(*shapes, dtype=torch.float32):
    return dict(zip(("query", "key", "value"), (randn(*shape, dtype=dtype) for shape in shapes), strict=True))


def test_what_is_left_to_torchs_rules():
    plain = [(2, 2, 5, 8)] * 3
    assert isinstance(attention(sides(*plain), None, None, 0.0), KernelAttention)
    assert isinstance(attention(sides(*[(3, 5, 8)] * 3), None, None, 0.0), KernelAttention)
    for other in (
        attention(sides(*plain), None, None, 0.1),
        attention(sides(*plain, dtype=torch.float64), None, None, 0.0),
        attention(sides(*[(1, 1, 5, 129)] * 3), None, None, 0.0),
        attention(sides((2, 2, 5, 8), (2, 2, 5, 8), (2, 2, 5, 4)), None, None, 0.0),
        attention(sides((2, 2, 5, 8), (2, 1, 5, 8), (2, 1, 5, 8)), None, None, 0.0),
        attention(sides(*[(5, 8)] * 3), None, None, 0.0),
    ):
        assert not isinstance(other, KernelAttention)
    with recording() as launches:
        model, x, labels, _ = setting("multi-head")
        model[1].attend.need_weights = True
        ibp.LossIBP(0.3).gradients(ibp.Network(model, backend="triton"), x, labels)
    assert not any(launch.name in KERNELS for launch in launches)


def test_the_core_is_torchs_where_both_can_be_asked():
    """Three axes, cross-attention, with and without an axis of tangents; weights that are shown by torch's products."""
    given = sides((2, 5, 8), (2, 4, 8), (2, 4, 8))
    ours, theirs = (core(given, 0.3, None, 0.0) for core in (attention, Attention))
    t, d, w = {name: randn(3, *side.shape) for name, side in given.items()}, randn(3, 2, 5, 8), randn(3, 2, 5, 4)
    names = ("query", "key", "value")
    pairs = [(core.take_output(), core.shown, *core.push(t, weights=True)) for core in (ours, theirs)]
    for core, pair in zip((ours, theirs), (0, 1), strict=True):
        one = {name: part[0] for name, part in t.items()}
        pairs[pair] += (core.push(t)[0], core.push({"key": one["key"]})[0])
        parts = (
            core.pull(d, None, names),
            core.pull(d[0], None, ["value"]),
            core.pull(d, w, names),
            core.bend(d, None, t, names),
        )
        pairs[pair] += tuple(part[name] for part in parts for name in sorted(part))
    for found, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert ours.multiply_adds() == theirs.multiply_adds()
