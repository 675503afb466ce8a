"""Every method, semantics and norm against the autograd oracle, in float64."""

from dataclasses import replace

import pytest
import torch

import ibp_triton as ibp
from tests.library.comparing import error, largest, minus, oracle, ours, variants
from tests.library.networks import NETWORKS, build


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_agree_with_autograd(name):
    model, x, labels, tau = build(name)
    network = ibp.Network(model)
    plain, plain_expected = ours(ibp.BP(), network, x, labels)[1], oracle(ibp.BP(), model, x, labels)[1]
    for method in variants():
        batch = (x, labels, tau if method.needs_tangents else None)
        loss, found = ours(method, network, *batch)
        expected_loss, expected = oracle(method, model, *batch)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12), method
        assert error(found, expected) < 1e-10, method
        if method.parameter == "beta":
            strong = replace(method, beta=method.beta * largest(plain) / largest(minus(expected, plain_expected)))
            penalty = minus(ours(strong, network, *batch)[1], plain)
            assert error(penalty, minus(oracle(strong, model, *batch)[1], plain_expected)) < 1e-9, strong


@pytest.mark.parametrize("name", ["paper_mnist", "residual_train", "gelu_layer_norm", "attention", "vgg_train"])
def test_without_strength_every_method_is_bp_bit_for_bit(name):
    model, x, labels, tau = build(name)
    network = ibp.Network(model)
    methods = [ibp.AdversarialTraining(0.0), ibp.FastAdversarialTraining(0.0)]
    if not any(isinstance(m, torch.nn.Dropout) and m.training for m in model.modules()):  # masks come after own numbers
        methods += [ibp.PGDTraining(0.0, 0.1, 2), ibp.TRADES(0.0, 0.1, 0.05, 2), ibp.JacobianRegularisation(0.0)]
    for kind in (ibp.LossIBP, ibp.PredictionIBP, ibp.TangentBP, ibp.FastTangentBP):
        methods += [kind(0.0, norm, semantics) for norm in (1, 2) for semantics in ("paper", "exact")]
    loss, expected = ours(ibp.BP(), network, x, labels)
    for method in methods:
        value, found = ours(method, network, x, labels, tau if method.needs_tangents else None)
        assert torch.equal(value, loss), method
        assert all(torch.equal(found[key], expected[key]) for key in expected), method


def test_loss_backward_fills_grad_with_the_same_numbers():
    model, x, labels, _ = build("paper_mnist")
    network, method = ibp.Network(model), ibp.LossIBP(0.1)
    value, expected = method.gradients(network, x, labels)
    loss = method(network, x, labels)
    loss.backward()
    assert torch.equal(loss.detach(), value)
    assert all(torch.equal(p.grad, expected[key]) for key, p in model.named_parameters())


@pytest.mark.parametrize("name", ["residual_train", "gelu_layer_norm"])
def test_exact_gradients_are_those_of_the_stated_objective(name):
    """Finite differences of the objective itself, in one random direction of all parameters, norm 2."""
    model, x, labels, tau = build(name)
    model.drop = torch.nn.Identity()
    network = ibp.Network(model)
    generator = torch.Generator().manual_seed(3)
    direction = {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in model.named_parameters()}
    start, step = {k: p.detach().clone() for k, p in model.named_parameters()}, 1e-6
    for kind in (ibp.LossIBP, ibp.PredictionIBP, ibp.TangentBP, ibp.FastTangentBP):
        method = kind(0.7, 2, "exact")
        batch = (x, labels, tau if method.needs_tangents else None)
        sides = [
            method.gradients(network, *batch, parameters={k: start[k] + s * step * direction[k] for k in start})[0]
            for s in (1, -1)
        ]
        slope = sum(float((g * direction[k]).sum()) for k, g in method.gradients(network, *batch)[1].items())
        assert float(sides[0] - sides[1]) / (2 * step) == pytest.approx(slope, rel=1e-6), method
