"""Jacobian regularisation, PGD training and TRADES; and recipes that are wrong, which must not give numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ibp_triton as ibp
from ibp_triton.errors import MethodError
from ibp_triton.methods.base import Method
from ibp_triton.sweeps import Reverse, g
from tests.library.comparing import error, oracle, ours
from tests.library.networks import build

METHODS = [
    *(ibp.JacobianRegularisation(0.3, n, semantics) for n in (1, 3, "all") for semantics in ("paper", "exact")),
    *(ibp.PGDTraining(0.1, 0.04, 3), ibp.PGDTraining(0.1, 0.04, 2, random_start=False), ibp.TRADES(3.0, 0.1, 0.04, 3)),
]
NETWORKS = ["paper_mnist", "sigmoid_mlp", "residual_train", "attention", "vgg_train", "squeeze_excitation"]


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_agree_with_autograd(name, method):
    model, x, labels, _ = build(name)
    network = ibp.Network(model)
    for _ in range(2):
        start = {key: b.clone() for key, b in model.named_buffers()}
        value, found = ours(method, network, x, labels)
        model.load_state_dict(start, strict=False)
        expected_value, expected = oracle(method, model, x, labels)
        assert value.item() == pytest.approx(expected_value.item(), rel=1e-12)
        assert error(found, expected) < 1e-9


def test_the_projected_penalty_is_the_jacobians_norm():
    model, x, labels, _ = build("sigmoid_mlp")
    network, plain = ibp.Network(model), ibp.BP().value(ibp.Network(model), x, labels)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda u: model(u[None])[0]))(x)
    expected = float(jacobian.detach().square().sum() / 2 / len(x))
    whole = ibp.JacobianRegularisation(1.0, "all").value(network, x, labels) - plain
    assert float(whole) == pytest.approx(expected, rel=1e-12)
    torch.manual_seed(0)
    drawn = ibp.JacobianRegularisation(1.0, 2000).value(network, x, labels) - plain
    assert float(drawn) == pytest.approx(expected, rel=0.05)


def test_pgd_stays_in_its_box_and_raises_the_loss():
    model, x, labels, _ = build("paper_mnist")
    network, losses = ibp.Network(model), []
    for steps in (1, 4):
        torch.manual_seed(0)
        losses.append(float(ibp.PGDTraining(0.1, 0.05, steps).value(network, x, labels)))
    plain = float(F.cross_entropy(model(x), labels).detach())
    assert plain < losses[0] < losses[1]
    once = ibp.PGDTraining(0.1, 0.1, 1, random_start=False).value(network, x, labels)
    assert float(once) == pytest.approx(float(ibp.FastAdversarialTraining(0.1).value(network, x, labels)), rel=1e-12)


def test_hyper_parameters_are_checked():
    for wrong, message in (
        (lambda: ibp.TRADES(-1, 0.1, 0.1, 3), "lam must be finite and at least 0"),
        (lambda: ibp.PGDTraining(0.1, 0.1, 0), "steps must be at least 1"),
        (lambda: ibp.PGDTraining(0.1, 0.1, 2.0), "steps must be a whole number"),
        (lambda: ibp.JacobianRegularisation(0.1, "some"), "projections must be a whole number"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            wrong()


class Weighed(Method):
    key, title = "weighed", "a data term of any weight beside the penalty's"

    def __init__(self, weight):
        self.weight = weight

    def recipe(self, s):
        a = s.forward()
        d = a.reverse(a.c)
        seed, penalty = a.input_seed(d, 2)
        yield s.objective(a, (self.weight, a.losses), (0.7, penalty))
        yield self.weight * g(a, d)
        yield 0.7 * g(a.tangent(seed), d)


@pytest.mark.parametrize("name", ["paper_mnist", "attention"])
def test_terms_whose_first_has_no_weight_do_not_merge_by_a_quotient(name):
    model, x, labels, _ = build(name)
    network = ibp.Network(model)
    whole, data = (method.gradients(network, x, labels)[1] for method in (ibp.LossIBP(0.7, 2), ibp.BP()))
    penalty = {key: whole[key] - data[key] for key in whole}
    for weight in (0, 0.0, torch.tensor(0.0, dtype=torch.float64)):
        assert error(Weighed(weight).gradients(network, x, labels)[1], penalty) < 1e-10
    assert error(Weighed(torch.tensor(1.0, dtype=torch.float64)).gradients(network, x, labels)[1], whole) < 1e-12


# ---------------------------------------------------------------------------------------------- wrong recipes


class ScaledSeed(Method):
    key, title = "scaled", "half the seed"

    def recipe(self, s):
        a = s.forward()
        d = a.reverse(a.c)
        seed, penalty = a.input_seed(d, 1)
        yield s.objective(a, (1, a.losses), (0.1, penalty))
        yield g(a, d)
        yield 0.1 * g(a.tangent(0.5 * seed), d)


class Clash(Method):
    key, title = "clash", "two lazy sweeps"

    def recipe(self, s):
        a = s.forward()
        d, e = a.reverse(a.c), a.reverse(a.c)
        yield s.objective(a, (1, a.losses))
        yield g(a, d)
        yield g(a.tangent(e.at_input), d)


class Late(Method):
    key, title = "late", "the input's derivative after the terms"

    def recipe(self, s):
        a = s.forward()
        d = a.reverse(a.c)
        yield s.objective(a, (1, a.losses))
        d.run()
        yield g(a, d)
        yield g(a.tangent(d.at_input), d)


class Drawn(Method):
    key, title = "drawn", "numbers of its own too late"

    def recipe(self, s):
        a = s.forward()
        yield s.objective(a, (s.normal(1)[0], a.losses))
        yield g(a, a.reverse(a.c))


WRONG = {
    ScaledSeed: "a seed is no number",
    Clash: "can't run in one order",
    Late: "ran without it",
    Drawn: "before its first forward pass",
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_recipe_is_an_error(kind, backend):
    if backend == "triton":
        pytest.importorskip("triton")
        if kind is not ScaledSeed and not torch.cuda.is_available():
            pytest.skip("runs kernels; the others are refused by the sweeps, which know no backend")
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x, labels = torch.rand(3, 6), torch.tensor([0, 1, 2])
    with pytest.raises(MethodError, match=WRONG[kind]):
        kind().gradients(ibp.Network(model, backend=backend), x, labels)


def test_what_a_sweep_let_go_of_is_not_zero():
    model, x, *_ = build("paper_mnist")
    trace = ibp.Network(model).forward(x, {}, frugal=True, keep=False)
    d = Reverse(trace, torch.ones_like(trace.logits), to_input=False).run()
    with pytest.raises(MethodError, match="a sweep at 1 after it was used up"):
        d.at(next(n.index for n in trace.graph.nodes if n.where == "1"))
    with pytest.raises(MethodError, match="ran without it"):
        _ = d.at_input
