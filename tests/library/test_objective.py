"""The loss as PyTorch users know losses: backward, hooks, accumulation, wrappers, and errors that name the cure."""

import os

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import nn

import ibp_triton as ibp
from tests.library.comparing import example
from tests.library.networks import build, resnet18

METHOD = ibp.LossIBP(0.1)


@pytest.fixture
def case():
    model, x, labels, tau = build("paper_mnist")
    network = ibp.Network(model)
    return model, network, x, labels, tau, METHOD.gradients(network, x, labels)[1]


def same(model, expected, factor=1.0):
    return all(torch.allclose(p.grad, factor * expected[k], rtol=1e-12, atol=0) for k, p in model.named_parameters())


def test_scaling_and_accumulation(case):
    model, network, x, labels, _, expected = case
    (METHOD(network, x, labels) * 0.5).backward()
    assert same(model, expected, 0.5)
    METHOD(network, x, labels).backward()
    assert same(model, expected, 1.5)


def test_sum_with_another_loss(case):
    model, network, x, labels, _, expected = case
    weight = model[9].weight
    (METHOD(network, x, labels) + weight.square().sum()).backward()
    assert torch.allclose(weight.grad, expected["9.weight"] + 2 * weight.detach())


def test_autograd_grad_for_some_parameters(case):
    model, network, x, labels, _, expected = case
    found = torch.autograd.grad(METHOD(network, x, labels), [model[0].weight, model[9].bias])
    assert torch.equal(found[0], expected["0.weight"])
    assert torch.equal(found[1], expected["9.bias"])
    assert model[0].weight.grad is None


def test_hooks_fire_once_and_clipping_works(case):
    model, network, x, labels, _, expected = case
    seen = []
    model[0].weight.register_hook(lambda g: seen.append(g.clone()))
    METHOD(network, x, labels).backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], expected["0.weight"])
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_optimizers_reduce_the_objective(case, make):
    model, network, x, labels, *_ = case
    optimizer, losses = make(model.parameters(), lr=1e-3), []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(METHOD(network, x, labels))
        losses[-1].backward()
        optimizer.step()
    assert float(losses[-1].detach()) < float(losses[0].detach())


@pytest.mark.parametrize("name", ["resnet18", "vgg", "dense_block", "squeeze_excitation", "attention"])
@pytest.mark.parametrize("key", ibp.METHODS)
def test_well_known_networks_train_with_every_method(name, key):
    torch.manual_seed(0)
    model = resnet18() if name == "resnet18" else build({"vgg": "vgg_train"}.get(name, name))[0].float()
    shape = (8, 1, 32, 32) if name == "resnet18" else (8, 1, 6, 6)
    labels = torch.arange(8)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * (labels[:, None, None, None] + 1) / 8
    network, method = ibp.Network(model.train()), example(key, 0.01)
    tangents = ibp.lie_tangents(x)[:2] if method.needs_tangents else None
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.05), []
    for _ in range(8):
        optimizer.zero_grad()
        torch.manual_seed(1)  # the same dropout mask, so that losses compare
        losses.append(method(network, x, labels, tangents))
        losses[-1].backward()
        optimizer.step()
    assert float(losses[-1].detach()) < 0.9 * float(losses[0].detach())


def test_without_grad_only_the_value(case):
    _, network, x, labels, _, _ = case
    expected = METHOD(network, x, labels)
    with torch.no_grad():
        value = METHOD(network, x, labels)
    assert not value.requires_grad
    assert torch.equal(value, expected.detach())


@pytest.mark.parametrize("key", ibp.METHODS)
def test_values_without_gradient_are_the_same(key):
    model, x, labels, tau = build("residual_eval")
    network, method = ibp.Network(model), example(key, 0.3)
    batch = (x, labels, tau if method.needs_tangents else None)
    found = []
    for value in (lambda: method.value(network, *batch), lambda: method.gradients(network, *batch)[0]):
        torch.manual_seed(0)
        found.append(float(value()))
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_a_frozen_model_gives_a_value(case):
    model, network, x, labels, *_ = case
    model.requires_grad_(False)
    assert not METHOD(network, x, labels).requires_grad


def test_unused_parameters_keep_their_grad():
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_parameter("spare", nn.Parameter(torch.ones(2)))
    network, x, labels = ibp.Network(model), torch.rand(2, 4), torch.tensor([0, 2])
    METHOD(network, x, labels).backward()
    assert model.spare.grad is None
    assert not METHOD.gradients(network, x, labels)[1]["spare"].any()


def test_parameters_given_instead_of_the_models_own(case):
    model, network, x, labels, _, _ = case
    given = {name: p.detach() * 1.1 for name, p in model.named_parameters() if name.startswith("9")}
    found = METHOD.gradients(network, x, labels, parameters=given)[1]
    with torch.no_grad():
        for name, value in given.items():
            model.get_parameter(name).copy_(value)
    expected = METHOD.gradients(network, x, labels)[1]
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_second_derivative_is_refused(case):
    _, network, x, labels, *_ = case
    with pytest.raises(RuntimeError, match=r"no second derivative.*create_graph"):
        (METHOD(network, x, labels) ** 2).backward(create_graph=True)


def test_transforms_of_the_loss_are_refused_with_the_function_that_has_a_gradient(case):
    model, _, x, labels, *_ = case
    with pytest.raises(ValueError, match=r"torch.func's transforms .* method\.gradients"):
        torch.func.vmap(lambda x, y: METHOD(model, x, y))(x[:, None], labels[:, None])


def test_second_backward_is_refused(case):
    _, network, x, labels, *_ = case
    loss = METHOD(network, x, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second time.*compute the loss again"):
        loss.backward()


def test_autocast_is_refused_with_the_cure(case):
    _, network, x, labels, *_ = case
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match=r"Network\(model, dtype=torch.bfloat16\)"),
    ):
        METHOD(network, x, labels)


WRONG = {
    "labels too large": (lambda x, y: (x, y + 9), ValueError, r"0 … 9 for 10 logits"),
    "labels negative": (lambda x, y: (x, y - 10), ValueError, r"0 … 9"),
    "labels of another batch": (lambda x, y: (x, y[:2]), ValueError, r"labels must have shape \[3\]"),
    "labels as floats": (lambda x, y: (x, y.double()), TypeError, r"labels\.long\(\)"),
    "x of another dtype": (
        lambda x, y: (x.float(), y),
        TypeError,
        r"x is torch.float32, the parameters are torch.float64",
    ),
    "x of integers": (lambda x, y: (x.long(), y), TypeError, r"floating point"),
    "x that wants a gradient": (lambda x, y: (x.requires_grad_(), y), ValueError, r"x\.detach\(\)"),
    "an empty batch": (lambda x, y: (x[:0], y[:0]), ValueError, r"N >= 1"),
    "tangents for another method": (lambda x, y: (x, y, x[None]), ValueError, r"takes no tangents"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_batches_are_refused(case, name):
    change, expected, message = WRONG[name]
    _, network, x, labels, *_ = case
    with pytest.raises(expected, match=message):
        METHOD(network, *change(x, labels))


def test_wrong_tangents_are_refused(case):
    _, network, x, labels, tau, _ = case
    method = ibp.TangentBP(0.1)
    with pytest.raises(ValueError, match=r"needs tangents.*lie_tangents"):
        method(network, x, labels)
    with pytest.raises(ValueError, match=r"\[T, 3, 1, 28, 28\]"):
        method(network, x, labels, tau[:, :2])
    with pytest.raises(TypeError, match="floating point"):
        method(network, x, labels, tau.long())


HYPERPARAMETERS = [
    (lambda: ibp.LossIBP(-0.1), ValueError, "beta must be finite and at least 0"),
    (lambda: ibp.LossIBP(float("nan")), ValueError, "beta must be finite"),
    (lambda: ibp.LossIBP("0.1"), TypeError, "beta must be a number, not '0.1'"),
    (lambda: ibp.LossIBP(0.1, norm=0.5), ValueError, "norm must be finite and at least 1"),
    (lambda: ibp.TangentBP(0.1, semantics="true"), ValueError, "'paper'.*'exact'.*not 'true'"),
    (lambda: ibp.FastAdversarialTraining(-1), ValueError, "epsilon must be finite and at least 0"),
    (
        lambda: ibp.LossIBP(torch.full((6,), 0.1)),
        TypeError,
        r"beta must be a number or a 0-d tensor, not of shape \[6\]",
    ),
    (lambda: ibp.LossIBP(nn.Parameter(torch.tensor(0.1))), ValueError, r"no derivative by its beta.*beta\.detach\(\)"),
    (lambda: ibp.Network(nn.Linear(2, 2), dtype="bf16"), ValueError, "dtype must be a floating-point dtype.*'bf16'"),
]


@pytest.mark.parametrize(("make", "expected", "message"), HYPERPARAMETERS)
def test_wrong_hyperparameters_are_refused(make, expected, message):
    with pytest.raises(expected, match=message):
        make()


def test_repr_shows_the_parameters():
    assert repr(ibp.LossIBP(0.03)) == "LossIBP(beta=0.03, norm=1, semantics='paper')"
    assert repr(ibp.BP()) == "BP()"
    assert repr(ibp.FastAdversarialTraining(0.1)) == "FastAdversarialTraining(epsilon=0.1)"


class WithLoss(nn.Module):
    """What the error for wrapped models tells a user to write."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.network = ibp.Network(model)

    def forward(self, x, labels):
        return METHOD(self.network, x, labels)


def _worker(rank, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, x, labels, _ = build("paper_mnist", batch=4)
    wrapped = nn.parallel.DistributedDataParallel(WithLoss(model))
    wrapped(x[2 * rank : 2 * rank + 2], labels[2 * rank : 2 * rank + 2]).backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{results}.{rank}")
    torch.distributed.barrier()  # neither rank leaves while the other still reads from it
    # Not through the interpreter's shutdown: DistributedDataParallel keeps its process group alive past
    # destroy_process_group, and a gloo thread that releases the last all-reduce then aborts the process.
    os._exit(0)


@pytest.mark.skipif(os.name != "posix", reason="gloo with a file store")
def test_distributed_data_parallel_around_the_loss_synchronises(tmp_path):
    model, x, labels, _ = build("paper_mnist", batch=4)
    expected = METHOD.gradients(ibp.Network(model), x, labels)[1]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(rank, tmp_path / "store", tmp_path / "grads")) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    for rank in (0, 1):
        found = torch.load(tmp_path / f"grads.{rank}")
        assert all(torch.allclose(found[k], expected[k], rtol=1e-10, atol=1e-14) for k in expected)
