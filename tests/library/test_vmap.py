"""``gradients`` is a pure function of tensors: a grid of networks and strengths in one call equals a loop."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ibp_triton as ibp
from ibp_triton.methods import PAPER
from tests.library.comparing import example
from tests.library.networks import build

NETWORKS = ["paper_mnist", "sigmoid_mlp", "residual_eval", "attention"]


def grid(model, count):
    generator = torch.Generator().manual_seed(4)
    return {
        name: p.detach() + 0.1 * torch.randn(count, *p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
    }


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("key", PAPER)
def test_ten_networks_with_ten_strengths_in_one_call(name, key):
    model, x, labels, tau = build(name, batch=2, tangents=2)
    network, kind, count = ibp.Network(model), ibp.METHODS[key], 10 if name == "sigmoid_mlp" else 3
    tangents = tau if kind.needs_tangents else None
    parameters, strengths = grid(model, count), torch.linspace(0.01, 0.4, count, dtype=torch.float64)

    def step(parameters, strength):
        method = example(key, strength)
        return method.gradients(network, x, labels, tangents, parameters)

    losses, gradients = torch.func.vmap(step)(parameters, strengths)
    for i in range(count):
        loss, expected = step({k: v[i] for k, v in parameters.items()}, float(strengths[i]))
        assert float(losses[i]) == pytest.approx(float(loss), rel=1e-12)
        for k in expected:
            assert torch.allclose(gradients[k][i], expected[k], rtol=1e-9, atol=1e-12), k


def test_exact_semantics_under_vmap():
    model, x, labels, _ = build("paper_mnist", batch=2)
    network, parameters = ibp.Network(model), grid(model, 3)

    def step(p):
        return ibp.PredictionIBP(0.1, 2, "exact").gradients(network, x, labels, parameters=p)[1]

    together = torch.func.vmap(step)(parameters)
    alone = step({k: v[1] for k, v in parameters.items()})
    assert all(torch.allclose(together[k][1], alone[k], rtol=1e-9, atol=1e-12) for k in alone)


def test_one_network_whose_images_are_channels_last_under_vmap():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).double()
    x = numbers(2, 3, 6, 6).to(memory_format=torch.channels_last)
    network, y = ibp.Network(model.to(memory_format=torch.channels_last)), torch.tensor([0, 1])
    parameters = {name: p.detach()[None] for name, p in model.named_parameters()}
    method = ibp.LossIBP(0.1)
    together = torch.func.vmap(lambda p: method.gradients(network, x, y, parameters=p)[1])(parameters)
    alone = method.gradients(network, x, y)[1]
    assert all(torch.allclose(together[k][0], alone[k], rtol=1e-9, atol=1e-12) for k in alone)


class NoRules(nn.Module):
    """Functions of one value and of two that have no rule."""

    def forward(self, x):
        variance, mean = torch.var_mean(x, -1, keepdim=True)
        return torch.logcumsumexp(x - mean, -1) * variance


@pytest.mark.parametrize("method", [ibp.LossIBP(0.3, 2, "exact"), ibp.TangentBP(0.3, 2, "exact")])
def test_functions_without_a_rule_under_vmap(method):
    model = nn.Sequential(nn.Linear(6, 5), NoRules(), nn.Linear(5, 3)).double()
    x, labels = numbers(4, 6), torch.tensor([0, 1, 2, 0])
    network, parameters = ibp.Network(model), grid(model, 3)
    tangents = numbers(2, 4, 6) if method.needs_tangents else None

    def step(p):
        return method.gradients(network, x, labels, tangents, p)[1]

    together = torch.func.vmap(step)(parameters)
    alone = step({k: v[1] for k, v in parameters.items()})
    assert all(torch.allclose(together[k][1], alone[k], rtol=1e-9, atol=1e-12) for k in alone)


def test_batches_of_data_under_vmap():
    model, x, labels, _ = build("paper_mnist", batch=4)
    network, method = ibp.Network(model), ibp.FastAdversarialTraining(0.1)
    together = torch.func.vmap(lambda x, y: method.gradients(network, x, y)[1])(
        x.view(2, 2, *x.shape[1:]), labels.view(2, 2)
    )
    alone = method.gradients(network, x[2:], labels[2:])[1]
    assert all(torch.allclose(together[k][1], alone[k], rtol=1e-9, atol=1e-12) for k in alone)


def test_dropout_under_vmap_follows_its_randomness():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    network, x, labels = ibp.Network(model), torch.rand(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    parameters = {name: p.detach().expand(5, *p.shape) for name, p in model.named_parameters()}

    def step(p):
        return ibp.LossIBP(0.1).gradients(network, x, labels, parameters=p)[0]

    assert len(set(torch.func.vmap(step, randomness="different")(parameters).tolist())) == 5
    assert len(set(torch.func.vmap(step, randomness="same")(parameters).tolist())) == 1


def test_fake_tensors_pass_through():
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
        x, labels = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)
        loss, gradients = ibp.LossIBP(0.1).gradients(ibp.Network(model), x, labels)
    assert loss.shape == ()
    assert gradients["0.weight"].shape == (4, 1, 3, 3)


@pytest.mark.parametrize("key", [key for key in ibp.METHODS if key not in PAPER])
def test_methods_that_draw_numbers_of_their_own_under_vmap(key):
    model, x, labels, _ = build("sigmoid_mlp", batch=2)
    network, parameters, strengths = (
        ibp.Network(model),
        grid(model, 3),
        torch.linspace(0.01, 0.4, 3, dtype=torch.float64),
    )

    def step(parameters, strength):
        return example(key, strength).gradients(network, x, labels, None, parameters)[1]

    torch.manual_seed(0)
    together = torch.func.vmap(step, randomness="same")(parameters, strengths)
    for i in range(3):
        torch.manual_seed(0)
        alone = step({k: v[i] for k, v in parameters.items()}, float(strengths[i]))
        assert all(torch.allclose(together[k][i], alone[k], rtol=1e-9, atol=1e-12) for k in alone)
