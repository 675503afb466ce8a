"""Half precision, memory formats, and the penalty's gradient where rounding could lose it."""

import copy

import pytest
import torch
from torch import nn

import ibp_triton as ibp
from ibp_triton.methods.passes import Pass
from tests.library.comparing import example, largest, minus
from tests.library.networks import build

MERGED = [ibp.LossIBP, ibp.FastTangentBP]  # where a and βt stand beside one right side


def in_dtype(name, dtype, compute=None, layout=torch.contiguous_format):
    model, x, labels, tau = build(name, batch=8)
    model = model.to(dtype=dtype, memory_format=layout)
    x = x.to(dtype).contiguous(memory_format=layout)
    return ibp.Network(model, dtype=compute), x, labels, tau.to(dtype)


def penalty_alone(network, method, x, labels, tau):
    batch = (x, labels, tau if method.needs_tangents else None)
    plain = ibp.BP().gradients(network, x, labels)[1]
    found = method.gradients(network, *batch)[1]
    return {k: v.double() for k, v in minus(found, plain).items()}


@pytest.mark.parametrize("make", MERGED)
@pytest.mark.parametrize("beta", [0.03, 0.003, 0.0003])
@pytest.mark.parametrize("name", ["paper_mnist", "paper_cifar10"])
def test_weak_penalties_survive_bfloat16(make, beta, name):
    """With a + βt rounded to bfloat16 the error would be 2 % at 0.03, 22 % at 0.003 and 90 % at 0.0003.

    What is compared is the weight gradient's sum alone: the same bfloat16 sweeps, their two terms taken apart.
    """
    network, x, labels, tau = in_dtype(name, torch.float32, torch.bfloat16)
    found = penalty_alone(network, make(beta, 1), x, labels, tau)
    strong = penalty_alone(network, make(100.0, 1), x, labels, tau)
    expected = {k: v * (beta / 100.0) for k, v in strong.items()}
    assert largest(minus(found, expected)) / largest(expected) < 0.015


@pytest.mark.parametrize("key", ibp.METHODS)
def test_bfloat16_with_master_weights_is_near_float64(key):
    network, x, labels, tau = in_dtype("paper_mnist", torch.float32, torch.bfloat16)
    fine, x64, _, tau64 = in_dtype("paper_mnist", torch.float64)
    method = example(key, 0.05)
    loss, found = method.gradients(network, x, labels, tau if method.needs_tangents else None)
    expected_loss, expected = method.gradients(fine, x64, labels, tau64 if method.needs_tangents else None)
    assert loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in found.values())
    assert float(loss) == pytest.approx(float(expected_loss), rel=0.02)
    overlap = sum(float((found[k].double() * expected[k]).sum()) for k in expected)
    sizes = [sum(float(g.double().square().sum()) for g in grads.values()) ** 0.5 for grads in (found, expected)]
    assert overlap / (sizes[0] * sizes[1]) > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("key", ibp.METHODS)
def test_gradients_come_in_the_parameters_dtype(key, dtype):
    network, x, labels, tau = in_dtype("residual_eval", dtype)
    method = example(key, 0.05)
    loss = method(network, x, labels, tau if method.needs_tangents else None)
    loss.backward()
    assert torch.isfinite(loss.detach())
    assert all(p.grad.dtype == dtype and torch.isfinite(p.grad).all() for p in network.model.parameters())


@pytest.mark.parametrize("key", ibp.METHODS)
@pytest.mark.parametrize("name", ["paper_mnist", "paper_cifar10", "squeeze_excitation", "residual_train", "vgg_eval"])
def test_channels_last_gives_the_same_numbers(name, key):
    method = example(key, 0.05)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        network, x, labels, tau = in_dtype(name, torch.float64, layout=layout)
        if layout is torch.channels_last:
            tau = tau.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, tau.shape[:2])
        torch.manual_seed(2)
        results.append(method.gradients(network, x, labels, tau if method.needs_tangents else None)[1])
    assert largest(minus(*results)) / largest(results[0]) < 1e-11


def test_a_channels_last_network_stays_channels_last():
    network, x, _, tau = in_dtype("paper_cifar10", torch.float32, layout=torch.channels_last)
    trace = network.forward(x, {})
    maps = [v for v in trace.values if isinstance(v, torch.Tensor) and v.dim() == 4]
    assert len(maps) >= 9
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in maps)
    tau = tau.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, tau.shape[:2])
    t = [v for v in ibp.sweeps.linear_sweep(trace, tau, to_output=True) if v is not None and v.dim() == 5]
    assert len(t) >= 9
    assert all(v.flatten(0, 1).is_contiguous(memory_format=torch.channels_last) for v in t)


@pytest.mark.parametrize(
    "method", [ibp.LossIBP(0.1), ibp.LossIBP(0.1, semantics="exact"), ibp.FastTangentBP(0.1)], ids=repr
)
def test_signs_of_small_derivatives_survive_float16(method, monkeypatch):
    model, x, y, tau, exact = sure_batch()
    seeds, tangent = [], Pass.tangent
    monkeypatch.setattr(Pass, "tangent", lambda self, seed: seeds.append(seed) or tangent(self, seed))
    _, found = method.gradients(ibp.Network(model), x, y, tau if method.needs_tangents else None)
    assert all(g.isfinite().all() for g in found.values())
    if method.needs_tangents:
        slopes = torch.linalg.vecdot(tau.double(), exact)
        exact = (slopes.sign()[..., None] * tau).sum(0)
    wrong = seeds[0].tensor.double().sign() != exact.sign()
    assert wrong.double().mean() < 0.01


@pytest.mark.parametrize("method", [ibp.FastAdversarialTraining(0.25), ibp.AdversarialTraining(0.25)], ids=repr)
def test_adversarial_steps_of_sure_samples_move_in_float16(method):
    model, x, y, _, exact = sure_batch()
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    _, found = method.gradients(ibp.Network(model), x, y)
    assert all(g.isfinite().all() for g in found.values())
    assert ((seen[-1] - x).double().sign() != exact.sign()).double().mean() < 0.01


def sure_batch():
    """Samples of a loss around 1e-6, whose derivatives are mostly below what float16 can hold."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.ReLU(), torch.nn.Linear(40, 10)).half()
    with torch.no_grad():
        model[2].bias[3] = 16
    x, y, tau = torch.randn(16, 50).half(), torch.full((16,), 3), torch.randn(3, 16, 50).half()
    leaf, fine = x.double().requires_grad_(), copy.deepcopy(model).double()
    losses = torch.nn.functional.cross_entropy(fine(leaf), y, reduction="none")
    assert losses.max() < 1e-5
    return model, x, y, tau, torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize("norm", [nn.LayerNorm(24), nn.GroupNorm(4, 24), nn.BatchNorm1d(24), nn.RMSNorm(24)])
def test_norm_layers_add_up_their_parameters_gradients_in_float32(norm):
    """torch's kernel of layer norms adds thousands of rows in bfloat16: 5 % off after 256 of them."""
    torch.manual_seed(0)
    x, labels = torch.randn(2048, 24).bfloat16(), torch.randint(0, 3, (2048,))
    model = nn.Sequential(norm, nn.Linear(24, 3))
    for method in (ibp.BP(), ibp.LossIBP(3.0, 2, "exact")):
        _, found = method.gradients(ibp.Network(model, dtype=torch.bfloat16), x, labels)
        _, expected = method.gradients(ibp.Network(copy.deepcopy(model).double()), x.double(), labels)
        for name in ("0.weight", "0.bias"):
            if name in expected:
                off = (found[name].double() - expected[name]).abs().max() / expected[name].abs().max()
                assert off < 0.01, (method, name)
