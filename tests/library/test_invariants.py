"""What the theory says must hold, without an oracle; float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ibp_triton as ibp
from ibp_triton.head import cross_entropy, penalty, psi
from ibp_triton.sweeps import Linear, Reverse, Term, linear_sweep, reverse, weight_gradients
from tests.library.comparing import error, minus
from tests.library.networks import build

CHAINS = ["paper_mnist", "paper_cifar10", "sigmoid_mlp"]


def swept(name):
    """A network after its first two passes."""
    model, x, labels, tau = build(name)
    network = ibp.Network(model)
    trace = network.forward(x, {})
    _, c, p = cross_entropy(trace.logits, labels)
    return network, trace, reverse(trace, c, to_input=True), c, p, tau


def layers_of(trace):
    return [(node, trace.layers[node.index]) for node in trace.graph.nodes if node.kind == "active" and node.rule]


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("norm", [1, 2, 1.5])
@pytest.mark.parametrize("make", [ibp.LossIBP, ibp.PredictionIBP, ibp.TangentBP])
def test_each_linear_layers_weights_times_penalty_gradient_is_one_number(name, norm, make):
    model, x, labels, tau = build(name)
    network, method = ibp.Network(model), make(2.0, norm)
    batch = (x, labels, tau if method.needs_tangents else None)
    value, found = method.gradients(network, *batch)
    less_value, less = method.at(beta=1.0).gradients(network, *batch)
    extra, parameters = minus(found, less), dict(model.named_parameters())
    expected = float(value - less_value) * norm  # mean ‖d_0‖_r^r, or mean ‖t_K‖_r^r summed over tangents
    products = [float((parameters[k].detach() * extra[k]).sum()) for k in extra if k.endswith("weight")]
    assert len(products) >= 3
    assert products == pytest.approx([expected] * len(products), rel=1e-9)
    assert all(not extra[k].any() for k in extra if k.endswith("bias"))


@pytest.mark.parametrize("name", [*CHAINS, "residual_train", "gelu_layer_norm", "attention", "squeeze_excitation"])
def test_vjp_and_jvp_are_adjoint_layer_by_layer(name):
    _, trace, _, _, _, _ = swept(name)
    checked = 0
    for node, layer in layers_of(trace):
        names = [n for n, i in node.operands.items() if trace.graph.nodes[i].kind == "active"]
        values = {n: trace.values[node.operands[n]] for n in names}
        if not all(isinstance(v, torch.Tensor) for v in [*values.values(), trace.values[node.index]]):
            continue
        for lead in ((), (3,)):  # alone, and with an axis of tangents
            t = {n: torch.randn(*lead, *v.shape, dtype=v.dtype) for n, v in values.items()}
            d = torch.randn(*lead, *trace.values[node.index].shape, dtype=torch.float64)
            pushed, pulled = layer.jvp(t), layer.vjp(d, names)
            assert pushed.shape == d.shape, node.label
            assert all(pulled[n].shape == t[n].shape for n in names), node.label
            right = sum(float((t[n] * pulled[n]).sum()) for n in names)
            assert float((pushed * d).sum()) == pytest.approx(right, rel=1e-10, abs=1e-12), node.label
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize("name", CHAINS)
def test_weight_gradient_is_adjoint_to_the_layers_dependence_on_its_weight(name):
    _, trace, _, _, _, _ = swept(name)
    for _node, layer in layers_of(trace):
        if hasattr(layer, "weight"):
            change = torch.randn_like(layer.weight)
            moved = {"linear": F.linear, "conv2d": F.conv2d}[layer.label]
            extra = {} if layer.label == "linear" else {"padding": layer.padding}
            d = torch.randn_like(moved(layer.input, change, None, **extra))
            left = float((moved(layer.input, change, None, **extra) * d).sum())
            right = float((change * layer.vjp(d, ["weight"])["weight"]).sum())
            assert left == pytest.approx(right, rel=1e-10)


@pytest.mark.parametrize("name", CHAINS)
def test_terms_merge_and_tangents_collapse(name):
    """g(a + βt, d) = g(a, d) + β g(t, d), and T tangents in one pass are T passes."""
    _, trace, d, _c, _, tau = swept(name)
    n = trace.input.shape[0]
    t = linear_sweep(trace, tau[0], to_output=True)
    both = weight_gradients([Term(1, trace, d), Term(0.3, trace, d, t)], n)
    alone = weight_gradients([Term(1, trace, d)], n), weight_gradients([Term(1, trace, d, t)], n)
    assert error(both, {k: alone[0][k] + 0.3 * alone[1][k] for k in both}) < 1e-13
    often = weight_gradients([3 * (0.5 * (2 * Term(1, trace, d)))], n)
    assert error(often, {k: 3 * part for k, part in alone[0].items()}) < 1e-13
    together = linear_sweep(trace, tau, to_output=True)
    seeds = psi(together[trace.graph.output], 2)
    e = reverse(trace, seeds, to_input=False)
    found = weight_gradients([Term(1, trace, e, together)], n)
    total = None
    for j in range(len(tau)):
        one = linear_sweep(trace, tau[j], to_output=True)
        back = reverse(trace, seeds[j], to_input=False)
        part = weight_gradients([Term(1, trace, back, one)], n)
        total = part if total is None else {k: total[k] + part[k] for k in part}
    assert error(found, total) < 1e-13


@pytest.mark.parametrize("name", [*CHAINS, "residual_train", "attention", "squeeze_excitation"])
def test_a_sweep_that_runs_along_with_the_gradient_gives_the_same(name):
    """In either order of nodes; afterwards it holds what it would have held, and may be used again."""
    _, trace, d, c, _, tau = swept(name)
    t, n = linear_sweep(trace, tau[0], to_output=False), trace.input.shape[0]
    expected = weight_gradients([Term(1, trace, d), Term(0.3, trace, d, t)], n)
    along = Linear(trace, tau[0], to_output=False)
    terms = [Term(1, trace, d), Term(0.3, trace, d, along)]
    assert error(weight_gradients(terms, n), expected) < 1e-13
    assert all(torch.equal(a, b) for a, b in zip(t, along, strict=True) if isinstance(a, torch.Tensor))
    assert error(weight_gradients(terms, n), expected) < 1e-13
    terms = [Term(1, trace, Reverse(trace, c, to_input=False)), Term(0.3, trace, Reverse(trace, c, to_input=False), t)]
    assert error(weight_gradients(terms, n), expected) < 1e-13
    assert error(weight_gradients(terms, n), expected) < 1e-13


class Solved(nn.Module):
    """[N, 5] → [N, 2], by a function of two operands that has no rule."""

    def __init__(self):
        super().__init__()
        self.matrix, self.side = nn.Linear(5, 4), nn.Linear(5, 2)

    def forward(self, x):
        a = self.matrix(x).unflatten(1, (2, 2)) + 3 * torch.eye(2, dtype=x.dtype)
        return torch.linalg.solve(a, self.side(x).unsqueeze(-1)).squeeze(-1)


def test_tangents_travel_together_through_a_function_without_a_rule_after_a_reverse_sweep():
    torch.manual_seed(0)
    model, x, tau = Solved().double(), torch.randn(3, 5).double(), torch.randn(4, 3, 5).double()
    trace = ibp.Network(model).forward(x, {})
    reverse(trace, torch.randn(3, 2).double(), to_input=True)
    together = linear_sweep(trace, tau, to_output=True).at_output
    expected = torch.stack([torch.func.jvp(model, (x,), (one,))[1] for one in tau])
    assert float((together - expected).detach().abs().max()) < 1e-12


class Opened:
    """Stands for the shards of a model: which parameters were asked for, in which order."""

    def __init__(self):
        self.names = []

    def open(self, names):
        if names:
            self.names.append(set(names))


def test_parameters_are_there_for_each_sweep_that_reads_them():
    """Also for the way back from a computed weight to what it is computed from, which comes last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)).double()
    trace = ibp.Network(model).forward(torch.randn(6, 5).double(), {})
    trace.shards = opened = Opened()
    first, last = {name for name, _ in model[0].named_parameters(prefix="0")}, {"2.weight", "2.bias"}
    d = reverse(trace, torch.randn(6, 3).double(), to_input=True)
    assert opened.names == [last, first]
    opened.names.clear()
    weight_gradients([Term(1, trace, d)], 6)
    assert opened.names == [last, first, first - {"0.bias"}]
    opened.names.clear()
    linear_sweep(trace, trace.input, to_output=True)
    assert opened.names == [first, last]


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("samples", [2, 9])
def test_a_frozen_parameter_gets_no_gradient(frozen, samples):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, c = torch.randn(samples, 5).double(), torch.randn(samples, 3).double()
    trace = ibp.Network(model).forward(x, {})
    expected = weight_gradients([Term(1, trace, reverse(trace, c, to_input=False))], samples)
    getattr(model[2], frozen).requires_grad_(False)
    trace = ibp.Network(model).forward(x, {})
    found = weight_gradients([Term(1, trace, reverse(trace, c, to_input=False))], samples)
    assert error(found, {name: d for name, d in expected.items() if name != f"2.{frozen}"}) < 1e-12
    assert f"2.{frozen}" not in found


def test_sweeps_change_nothing_that_an_earlier_one_saved():
    for name in ("paper_mnist", "residual_train", "gelu_layer_norm", "attention"):
        _, trace, d, _c, _, tau = swept(name)
        saved = [v for v in [*trace.values, *d] if isinstance(v, torch.Tensor)]
        before = [v.clone() for v in saved]
        t = linear_sweep(trace, tau, to_output=True)
        e = reverse(trace, psi(t[trace.graph.output], 1), to_input=True)
        weight_gradients([Term(1, trace, d), Term(0.5, trace, e, t)], 3)
        assert all(torch.equal(a, b) for a, b in zip(saved, before, strict=True))


def test_theorem_1_the_linear_sweep_is_the_forward_pass_without_bias():
    for layer, shape in (
        (nn.Linear(5, 4), (3, 5)),
        (nn.Conv2d(2, 3, 3, padding=1), (3, 2, 6, 6)),
        (nn.AvgPool2d(2), (3, 2, 6, 6)),
    ):
        model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(4)).double()
        x = torch.randn(shape, dtype=torch.float64)
        model(x)
        trace, t = ibp.Network(model).forward(x, {}), torch.randn(shape, dtype=torch.float64)
        without = layer(t) - layer(torch.zeros_like(t))
        sweep = linear_sweep(trace, t, to_output=True)
        node = next(node for node, _ in layers_of(trace))
        assert torch.allclose(sweep[node.index], without, rtol=0, atol=1e-12)


def test_theorem_2_a_symmetric_jacobian_makes_both_sweeps_equal():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Softplus(), nn.Tanh(), nn.ReLU(), nn.Linear(6, 3)).double()
    trace = ibp.Network(model).forward(torch.randn(4, 6, dtype=torch.float64), {})
    pointwise = [layer for node, layer in layers_of(trace) if layer.label != "linear"]
    assert len(pointwise) == 4
    for layer in pointwise:
        t = torch.randn(4, 6, dtype=torch.float64)
        assert torch.equal(layer.jvp({"input": t}), layer.vjp(t, ["input"])["input"])


def test_section_7_5_fast_tangent_bp_is_loss_ibp_of_the_directional_derivative():
    """With the one tangent τ = d_0 / ‖d_0‖ and norm 2, |⟨d_0, τ⟩|² / 2 = ‖d_0‖² / 2 and the seeds coincide."""
    model, x, labels, _ = build("paper_mnist")
    network = ibp.Network(model)
    trace = network.forward(x, {})
    d_0 = reverse(trace, cross_entropy(trace.logits, labels)[1], to_input=True)[trace.graph.input]
    unit = d_0 / d_0.flatten(1).norm(dim=1)[:, None, None, None]
    for semantics in ("paper", "exact"):
        value, found = ibp.FastTangentBP(0.5, 2, semantics).gradients(network, x, labels, unit[None])
        expected_value, expected = ibp.LossIBP(0.5, 2, semantics).gradients(network, x, labels)
        assert float(value) == pytest.approx(float(expected_value), rel=1e-12)
        assert error(found, expected) < 1e-12


def test_section_7_3_one_linear_layer_with_squared_loss_gets_weight_decay_times_the_squared_error():
    """L = (p − l)²/2, p = w·x: d_0 = (p − l) w, so g(ψ(d_0), c) = (p − l)² w for norm 2."""
    model = nn.Linear(5, 1).double()
    x, target = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 1, dtype=torch.float64)
    trace = ibp.Network(model).forward(x, {})
    c = trace.logits - target
    d = reverse(trace, c, to_input=True)
    t = linear_sweep(trace, psi(d[trace.graph.input], 2), to_output=False)
    found = weight_gradients([Term(1, trace, d, t)], 7)["weight"]
    assert torch.allclose(found, c.square().mean() * model.weight.detach(), rtol=1e-12, atol=0)


def test_section_7_4_noise_adds_half_the_trace_of_the_hessian():
    """L = −ln|p| on a linear neuron: tr ∇²_x L = ‖∇_x L‖², and E[L(x + μ)] − L(x) → σ²/2 of it."""
    w, x = torch.tensor([0.8, -0.5, 0.3], dtype=torch.float64), torch.tensor([1.0, 0.4, 2.0], dtype=torch.float64)

    def loss(x):
        return -torch.log((x @ w).abs())

    hessian = torch.func.hessian(loss)(x)
    gradient = torch.func.grad(loss)(x)
    assert float(hessian.trace()) == pytest.approx(2 * float(penalty(gradient, 2)), rel=1e-12)
    generator, sigma = torch.Generator().manual_seed(0), 0.02
    noise = sigma * torch.randn(400_000, 3, generator=generator, dtype=torch.float64)
    rise = float((torch.func.vmap(loss)(x + noise) + torch.func.vmap(loss)(x - noise)).mean() / 2 - loss(x))
    assert rise == pytest.approx(sigma**2 / 2 * float(hessian.trace()), rel=0.02)


def test_equation_11_exact_loss_ibp_is_fast_at_to_first_order():
    model, x, labels, _ = build("sigmoid_mlp")
    network = ibp.Network(model)
    plain = ibp.BP().gradients(network, x, labels)[1]
    term = minus(ibp.LossIBP(1.0, 1, "exact").gradients(network, x, labels)[1], plain)
    gaps = []
    for epsilon in (1e-4, 1e-5):
        moved = ibp.FastAdversarialTraining(epsilon).gradients(network, x, labels)[1]
        gaps.append(error({k: (moved[k] - plain[k]) / epsilon for k in plain}, term))
    assert gaps[1] < 1e-4
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.1)  # the remainder is of first order


def test_seeds_and_penalty_are_the_derivative_and_the_value():
    u = torch.tensor([-2.0, 0.0, 0.5], dtype=torch.float64)
    assert psi(u, 1).tolist() == [-1, 0, 1]
    assert torch.equal(psi(u, 2), u)
    assert psi(u, 1.5).tolist() == pytest.approx([-math.sqrt(2), 0, math.sqrt(0.5)])
    for norm in (1, 2, 1.5, 3):
        assert torch.allclose(torch.func.grad(lambda v, r=norm: penalty(v, r))(u), psi(u, norm))
