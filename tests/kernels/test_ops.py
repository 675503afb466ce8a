"""The custom operators: opcheck, first and second derivatives against torch's own, torch.compile."""

import pytest
import torch
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn import functional as F

from ibp_triton import ops
from ibp_triton.kernels.smooth import Activation
from ibp_triton.ops import straight
from tests.kernels.support import last, randn

CONV = ([2, 1], [1, 0], [1, 2])
WINDOW = ([3, 3], [2, 2], [0, 0])


def leaf(*shape):
    return randn(*shape).requires_grad_()


def images(*shape):
    return last(randn(*shape)).requires_grad_()


def samples():
    """Arguments of every operator, by name."""
    x, w, b, d = leaf(2, 3, 5), leaf(4, 5), leaf(4), leaf(2, 3, 4)
    image, kernel, right = images(2, 3, 5, 6, 7), images(4, 5, 3, 2), images(2, 3, 4, 3, 5)
    pixels = last(randn(3, 5, 7, 8)).requires_grad_()
    code = ops.max_pool2d(pixels, *WINDOW, [1, 0], True, True)[1]
    normed = (last(randn(3, 4, 3, 5)), ops.group_norm(last(randn(3, 4, 3, 5)), 2)[1])
    sides = [randn(2, 5, 3, 4).transpose(1, 2) for _ in range(3)]
    attended = (*sides, *ops.attention(*sides, 0.5))
    codes = ops.conv2d_max_pool2d(images(3, 2, 8, 9), images(4, 2, 2, 3), *CONV, None, *WINDOW, [1, 0], True)[1]
    return {
        "linear": (x, w, b, None, True),
        "activation_curvature": (leaf(2, 3, 4), randn(2, 3, 4), randn(3, 4), Activation.GELU),
        "linear_activation": (x, w, b, Activation.GELU),
        "linear_vjp": (d, w, randn(3, 5)),
        "conv2d": (image, kernel, *CONV, leaf(4), None, True),
        "conv2d_vjp": (right, kernel, [6, 7], *CONV, last(randn(3, 5, 6, 7))),
        "weight_gradient": (
            *([images(3, 5, 6, 7), images(3, 5, 6, 7)], [images(3, 4, 3, 5), images(3, 4, 3, 5)]),
            *([1.0, 0.5], [True, False], [False, False], [None, torch.tensor(0.5), None]),
            *(kernel.detach(), *CONV, 0.25),
        ),
        "max_pool2d": (pixels, *WINDOW, [1, 0], True, True),
        "max_pool2d_jvp": (images(2, 3, 5, 7, 8), code, *WINDOW, [1, 0], True),
        "max_pool2d_vjp": (images(2, 3, 5, 4, 4), code, [7, 8], *WINDOW, [1, 0], True),
        "conv2d_max_pool2d": (images(3, 2, 8, 9), images(4, 2, 2, 3), *CONV, leaf(4), *WINDOW, [1, 0], True, True),
        "conv2d_max_pool2d_jvp": (images(2, 3, 2, 8, 9), images(4, 2, 2, 3), codes, *CONV, *WINDOW, [1, 0], True),
        "avg_pool2d": (images(2, 3, 5, 7, 8), *WINDOW),
        "avg_pool2d_vjp": (images(2, 3, 5, 3, 3), [7, 8], *WINDOW),
        "relu": (leaf(3, 4, 5), randn(4, 5)),
        "cross_entropy": (leaf(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])),
        "hessian_product": (randn(6, 4), leaf(6, 4)),
        "objective": (leaf(6), leaf(6), 0.5, 0.25, [torch.tensor(0.5), None], 0.5),
        "norm_seed": (leaf(3, 7), 1.5),
        "norm_value": (leaf(3, 7), 1.5),
        "fgsm_step": (leaf(3, 7), randn(3, 7), 0.1, torch.tensor(0.1)),
        "fast_tbp_seed": (randn(3, 7), randn(2, 3, 7), 1.0),
        "batch_norm_project": (images(2, 3, 4, 3, 5), normed[0], randn(4), randn(4).exp(), leaf(4)),
        "batch_norm_cross": (
            *(images(2, 3, 4, 3, 5) for _ in range(2)),
            *(randn(2, 2, 4), normed[0], randn(4), randn(4).exp()),
        ),
        "attention": (*(x.requires_grad_() for x in (side.detach() for side in sides)), 0.5, randn(2, 3, 5, 5), True),
        "attention_jvp": (*attended, leaf(2, 2, 3, 5, 4), None, leaf(2, 2, 3, 5, 4), 0.5),
        "attention_vjp": (
            leaf(2, 2, 3, 5, 4),
            *attended,
            0.5,
            randn(5, 5).expand(2, 3, 5, 5),
            False,
            True,
            False,
            True,
        ),
        "group_norm": (images(3, 4, 3, 5), 2, leaf(4), leaf(4)),
        "group_norm_vjp": (images(2, 3, 4, 3, 5), *normed, 2, leaf(4)),
        "group_norm_jvp": (images(2, 3, 4, 3, 5), *normed, 2, leaf(4), images(2, 3, 4, 3, 5)),
        "group_norm_cross": (images(2, 3, 4, 3, 5), images(2, 3, 4, 3, 5), *normed, 2),
        "group_norm_curvature": (last(randn(2, 3, 4, 3, 5)), last(randn(2, 3, 4, 3, 5)), *normed, 2, randn(4)),
    }


NAMES = (
    "activation_curvature", "linear", "linear_activation", "linear_vjp", "conv2d", "conv2d_vjp", "weight_gradient",
    "max_pool2d", "max_pool2d_jvp", "max_pool2d_vjp", "avg_pool2d", "avg_pool2d_vjp",
    "conv2d_max_pool2d", "conv2d_max_pool2d_jvp",
    "relu", "cross_entropy", "hessian_product", "objective", "norm_seed",
    "norm_value", "fgsm_step", "fast_tbp_seed",
    "batch_norm_project", "batch_norm_cross",
    "attention", "attention_jvp", "attention_vjp",
    "group_norm", "group_norm_vjp", "group_norm_jvp", "group_norm_cross", "group_norm_curvature",
)  # fmt: skip


def test_every_operator_is_here():
    assert set(NAMES) == set(samples()) == {n for n, v in vars(ops).items() if isinstance(v, CustomOpDef)}


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    operator = getattr(torch.ops.ibp_triton, name).default
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    opcheck(operator, samples()[name], test_utils=checks)


def twice(f, g, inputs):
    """First and second derivatives of two scalar functions at the same place."""
    results = []
    for function, dtype in ((f, torch.float32), (g, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        value = sum((d * d).sum() for d in first)
        results.append((first, torch.autograd.grad(value, leaves, allow_unused=True)))
    for ours, theirs in zip(*results, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            expected = torch.zeros_like(a, dtype=torch.float64) if b is None else b
            torch.testing.assert_close(a.double(), expected, rtol=1e-4, atol=1e-4)


def test_second_derivatives_of_the_layers():
    labels, window = torch.tensor([1, 0, 3]), dict(zip(("kernel_size", "stride", "padding"), (3, 2, 0), strict=True))

    def ours(x, w, b, v):
        y = ops.conv2d(x[None], w, *CONV, b, None, False)[0]
        y, _ = ops.max_pool2d(y, *WINDOW, [0, 0], True, True, True)
        y = ops.avg_pool2d(y[None], [1, 2], [1, 2], [0, 0])[0]
        loss, _, _ = ops.cross_entropy(ops.linear(y.flatten(1)[None], v)[0], labels)
        return ops.objective(loss, loss, 1.0, float("nan"), [None, torch.tensor(0.25)], 0.5) * 2 + 0.25 * loss.sum()

    def theirs(x, w, b, v):
        y = F.relu(F.max_pool2d(F.conv2d(x, w, b, *CONV), **window, ceil_mode=True))
        y = F.avg_pool2d(y, (1, 2))
        return 1.5 * F.cross_entropy(y.flatten(1) @ v.T, labels, reduction="sum")

    x, w, b, v = last(randn(3, 2, 9, 10)), last(randn(4, 2, 3, 2)), randn(4), randn(4, 4 * 2 * 1 * 2)
    height = F.max_pool2d(F.conv2d(x, w, b, *CONV), **window, ceil_mode=True).shape
    v = randn(4, 4 * height[2] * (height[3] // 2))
    twice(ours, theirs, (x, w, b, v))


def test_second_derivatives_of_a_convolution_with_its_pool():
    x, w, b, t = last(randn(3, 2, 9, 10)), last(randn(4, 2, 3, 2)), randn(4), last(randn(2, 3, 2, 9, 10))
    pool = (*WINDOW, [0, 0], True)
    code = ops.conv2d_max_pool2d(x, w, *CONV, b, *pool, True)[1]

    def one(x, w, b, t):
        y, _ = ops.conv2d_max_pool2d(x, w, *CONV, b, *pool, True, True)
        sweep = ops.conv2d_max_pool2d_jvp(t, w, code, *CONV, *pool)
        return (y**2).sum() + 0.1 * (sweep**2).sum()

    def two(x, w, b, t):
        y, _ = ops.max_pool2d(ops.conv2d(x[None], w, *CONV, b)[0], *pool, True, True)
        sweep = ops.max_pool2d_jvp(ops.conv2d(t, w, *CONV), code, *pool)
        return (y**2).sum() + 0.1 * (sweep**2).sum()

    for found, expected in zip(*(derivatives(f, (x, w, b, t)) for f in (one, two)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def derivatives(f, inputs):
    """First and second derivatives of a scalar function."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    return *first, *torch.autograd.grad(sum((d * d).sum() for d in first), leaves)


def test_second_derivatives_of_linear_layers_with_a_relu():
    def ours(x, w, b, v):
        hidden = ops.linear(x[None], w, b, None, True)
        return (ops.linear(hidden, v)[0] ** 3).sum() + ops.norm_value(x, 3.0).sum()

    def theirs(x, w, b, v):
        return ((F.relu(x @ w.T + b) @ v.T) ** 3).sum() + (x.abs() ** 3).sum() / 3

    twice(ours, theirs, (randn(4, 5), randn(6, 5), randn(6), randn(3, 6)))


def test_second_derivatives_of_linear_layers_with_slopes():
    """By the slopes too, forward with signs read on the way in."""

    def ours(x, w, v, s):
        back = ops.linear_vjp(ops.linear(x[None], w, None, None, False, False, s), v, None, s)
        return (back**3).sum() + (ops.linear(x[None], w, None, None, False, True, s) ** 2).sum()

    def theirs(x, w, v, s):
        back = ((x @ w.T) * s) @ v * s
        return (back**3).sum() + (((x.sign() @ w.T) * s) ** 2).sum()

    twice(ours, theirs, (randn(4, 5), randn(6, 5), randn(6, 6), randn(4, 6)))


@pytest.mark.parametrize("bias", [True, False])
def test_derivatives_of_a_linear_layer_with_its_activation(bias):
    x, w, b = leaf(1, 3, 5), leaf(4, 5), leaf(4) if bias else None
    y, _ = ops.linear_activation(x, w, b, Activation.GELU_TANH)
    leaves = [t for t in (x, w, b) if t is not None]
    found = torch.autograd.grad((y**3).sum(), leaves)
    expected = torch.autograd.grad((F.gelu(F.linear(x, w, b), approximate="tanh") ** 3).sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_loss_ibp_by_double_backward_through_the_operators():
    """The exact objective's gradient, once by create_graph through the operators, once through torch's own."""

    def ours(w, v, x=None):
        return penalised(lambda u: ops.linear(ops.linear(u[None], w, None, None, True), v)[0], x)

    def theirs(w, v, x=None):
        return penalised(lambda u: F.relu(u @ w.T) @ v.T, x)

    def penalised(model, x):
        x = x.clone().requires_grad_()
        loss = F.cross_entropy(model(x), torch.tensor([0, 1, 2]), reduction="sum")
        (d,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + 0.5 * d.abs().sum()

    x, w, v = randn(3, 5), randn(6, 5), randn(4, 6)
    results = []
    for function, dtype in ((ours, torch.float32), (theirs, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (w, v)]
        results.append(torch.autograd.grad(function(*leaves, x.to(dtype)), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [1.0, 2.0, 1.5, 3.0])
def test_derivatives_of_the_collapsed_seed(norm):
    d, tau, weights, values = randn(3, 7), randn(2, 3, 7), randn(3, 7), randn(3)

    def plain(d, tau):
        slopes = (d * tau).sum(-1)
        psi = slopes.sign() * slopes.abs() ** (norm - 1)
        return (psi[..., None] * tau).sum(0), (slopes.abs() ** norm / norm).sum(0)

    gradients = []
    for function, dtype in ((lambda *a: ops.fast_tbp_seed(*a, norm), torch.float32), (plain, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (d, tau)]
        seed, value = function(*leaves)
        scalar = (seed * weights.to(dtype)).sum() + (value * values.to(dtype)).sum()
        gradients.append(torch.autograd.grad(scalar, leaves))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_second_derivatives_of_norms():
    """Of y, of the sums of a reverse, and of a linear sweep with γ's tangent term."""

    def ours(x, w, b):
        return (ops.group_norm(x, 2, w, b, 1e-2)[0] ** 3).sum()

    def theirs(x, w, b):
        return (F.group_norm(x, 2, w, b, 1e-2) ** 3).sum()

    twice(ours, theirs, (last(randn(3, 4, 3, 5)), randn(4), randn(4)))
    twice(lambda x, w: (ops.group_norm(x, 1, w, None, 1e-2, False)[0] ** 3).sum(),
          lambda x, w: (F.rms_norm(x, (5,), w, 1e-2) ** 3).sum(), (randn(4, 5), randn(5)))  # fmt: skip


def test_derivatives_of_a_norms_sweep():
    """∇⟨g, γ P(t)/s⟩ and of γ's term, by torch.func forward over reverse."""
    x, t, w, r, g, h = randn(3, 10), randn(1, 3, 10), randn(10), randn(1, 3, 10), randn(1, 3, 10), randn(10)
    leaves = [v.requires_grad_() for v in (t, x, w, r)]
    _, statistics = ops.group_norm(x, 2)
    out, cross = ops.group_norm_jvp(t, x, statistics, 2, w, r)
    alone = ops.group_norm_cross(t, r, x, statistics, 2)
    found = torch.autograd.grad((out * g).sum() + (cross * h).sum(), leaves, retain_graph=True)
    parts = torch.autograd.grad((alone * h).sum(), (t, x, r))

    def value(t, x, w, r, first=1.0):
        def norm(v):
            return F.group_norm(v, 2).double()

        _, back = torch.func.vjp(norm, x)  # Df is symmetric: ⟨g, γ P(t)/s⟩ = ⟨P(γ g)/s, t⟩
        return (first * back(w * g[0].double())[0] * t[0]).sum() + (back(h.double() * r[0])[0] * t[0]).sum()

    wide = [v.detach().double().requires_grad_() for v in leaves]
    expected = torch.autograd.grad(value(*wide), wide)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(value(*wide, 0.0), (wide[0], wide[1], wide[3]))
    for ours, theirs in zip(parts, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_derivatives_of_attention_and_its_sweeps():
    """The first by all three, those of the sweeps, which are linear, by what they carry."""
    q, k, v = (leaf(1, 2, 5, 4) for _ in range(3))
    out, lse = ops.attention(q, k, v, 0.5, None, True)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
    for ours, expected in zip(*(torch.autograd.grad((y**3).sum(), (q, k, v)) for y in (out, theirs)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    fixed = [x.detach() for x in (q, k, v, out, lse)]
    t, d = [leaf(2, 1, 2, 5, 4) for _ in range(3)], leaf(2, 1, 2, 5, 4)
    moved, back = ops.attention_jvp(*fixed, *t, 0.5, None, True), ops.attention_vjp(d, *fixed, 0.5, None, True)
    g, h = randn(2, 1, 2, 5, 4), [randn(2, 1, 2, 5, 4) for _ in range(3)]
    found = torch.autograd.grad((moved * g).sum(), t)
    for ours, expected in zip(found, ops.attention_vjp(g, *fixed, 0.5, None, True), strict=True):
        assert torch.equal(ours, expected)
    (found,) = torch.autograd.grad(sum((a * b).sum() for a, b in zip(back, h, strict=True)), d)
    assert torch.equal(found, ops.attention_jvp(*fixed, *h, 0.5, None, True))


def test_derivatives_of_a_batch_norms_sweep():
    """⟨g, γ P(v)/s⟩ by v and γ, ⟨h, Σ r P(v)⟩ by both sides, P in plain torch."""
    x, v, r, w, g, h = randn(7, 4), leaf(2, 7, 4), leaf(2, 7, 4), leaf(4), randn(2, 7, 4), randn(4)
    mean, rstd = x.mean(0), (x.var(0, correction=0) + 1e-5).rsqrt()
    unit = (x - mean) * rstd
    out, sums = ops.batch_norm_project(v, x, mean, rstd, w)
    cross = ops.batch_norm_cross(v, r, sums.detach(), x, mean, rstd)
    pushed = v - v.mean(1, keepdim=True) - unit * (unit * v).mean(1, keepdim=True)
    for found, expected, leaves in (
        ((out * g).sum(), (w * pushed * rstd * g).sum(), (v, w)),
        ((cross * h).sum(), (r * pushed * h).sum(), (v, r)),
    ):
        ours, theirs = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (found, expected))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_has_no_derivative_says_so():
    one = torch.ones(3)
    with pytest.raises(NotImplementedError, match="v and γ alone"):
        ops.batch_norm_project(leaf(1, 2, 3), leaf(2, 3), one, one)[0].sum().backward()
    with pytest.raises(NotImplementedError, match="two sides alone"):
        ops.batch_norm_cross(leaf(1, 2, 3), leaf(1, 2, 3), leaf(1, 2, 3), randn(2, 3), one, one).sum().backward()
    x, statistics = leaf(2, 3), torch.ones(2, 2, 1)
    with pytest.raises(NotImplementedError, match="sums of a norm"):
        ops.group_norm_vjp(leaf(1, 2, 3), x, statistics, 1, None, True)[1].sum().backward()
    with pytest.raises(NotImplementedError, match="curvature"):
        ops.group_norm_curvature(leaf(1, 2, 3), leaf(1, 2, 3), x, statistics, 1).sum().backward()
    with pytest.raises(NotImplementedError, match="slope of an activation"):
        ops.linear_activation(leaf(1, 2, 3), leaf(4, 3), None, Activation.SILU)[1].sum().backward()
    with pytest.raises(NotImplementedError, match="curvature of an activation"):
        ops.activation_curvature(leaf(1, 2, 3), randn(1, 2, 3), randn(2, 3), Activation.SILU).sum().backward()
    q, k, v = (leaf(1, 1, 3, 2) for _ in range(3))
    with pytest.raises(NotImplementedError, match="its mask"):
        ops.attention(q, k, v, 1.0, leaf(1, 1, 3, 3))[0].sum().backward()
    out, lse = ops.attention(q.detach(), k.detach(), v.detach(), 1.0)
    with pytest.raises(NotImplementedError, match="what it carries"):
        ops.attention_jvp(q, k, v, out, lse, None, None, leaf(1, 1, 1, 3, 2), 1.0).sum().backward()
    with pytest.raises(NotImplementedError, match="what it carries"):
        ops.attention_vjp(leaf(1, 1, 1, 3, 2), q, k, v, out, lse, 1.0)[0].sum().backward()
    z, t = leaf(2, 3), leaf(2, 3)
    with pytest.raises(NotImplementedError, match="logits"):
        ops.hessian_product(z, t).sum().backward()
    x, d, w = leaf(2, 3), leaf(2, 4), randn(4, 3)
    geometry = ([1, 1], [0, 0], [1, 1])
    with pytest.raises(NotImplementedError, match="push"):
        ops.weight_gradient([x], [d], [1.0], [False], [False], [], w, *geometry, push=randn(2, 3))[0].sum().backward()


class Told:
    """An operator that says which of its two ways was taken."""

    _init_fn = staticmethod(lambda x: "function")

    def __call__(self, x):
        return "operator"


def test_the_sweeps_go_past_the_dispatcher_unless_something_looks():
    call, x = straight.straight(Told()), randn(2, 3)
    assert call(x) == "operator"  # autograd would
    with torch.no_grad():
        assert call(x) == call([x, x]) == "function"
        assert call(torch.nn.Parameter(x)) == "operator"
        with FakeTensorMode() as mode:
            assert call(x) == "operator"
            fake = mode.from_tensor(x)
        assert call(fake) == "operator"
        ways = []
        torch.func.vmap(lambda row: ways.append(call(x)) or row)(x)
        with torch.profiler.profile():
            ways.append(call(x))
        torch.compile(lambda row: ways.append(call(row)) or row, backend="eager", fullgraph=True)(x)
        assert ways == ["operator"] * 3
        assert call(x) == "function"


def test_each_operator_can_be_called_past_the_dispatcher():
    for name in NAMES:
        assert getattr(straight, name).__closure__
    with torch.no_grad():
        x, w, b, *rest = samples()["linear"]
        assert torch.equal(straight.linear(x, w, b, *rest), ops.linear(x, w, b, *rest))


def test_fullgraph_compilation_knows_the_operators():
    def f(x, w):
        return ops.linear(ops.relu(x), w).sum()

    x, w = randn(1, 3, 5), randn(4, 5)
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, w), f(x, w))
