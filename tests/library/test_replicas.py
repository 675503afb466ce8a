"""Replicas trained side by side are what each would be alone, together under vmap and one after another."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import ibp_triton as ibp
from ibp_triton import replicated_step, vmapped
from ibp_triton.alike import rounded
from tests.library.comparing import example
from tests.library.networks import NETWORKS, vgg

COUNT = 3
STRENGTHS = (0.01, 0.05, 0.3)


@pytest.fixture(params=["together", "one by one"])
def way(request, monkeypatch):
    """Which way is quicker is for the clock to say, and not for tests."""
    slower = request.param == "one by one"
    monkeypatch.setattr(replicated_step._Trial, "is_slower", property(lambda trial: slower and trial.count == 3))
    return request.param


@pytest.fixture
def together(monkeypatch):
    monkeypatch.setattr(replicated_step._Trial, "is_slower", False)


def made(build=vgg, count=COUNT, dtype=torch.float64):
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append(build().to(dtype))
    return models


def batches(method, shape=(1, 8, 8), steps=20, dtype=torch.float64, lead=()):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(*lead, 6, *shape, generator=generator, dtype=dtype)
        tangents = torch.randn(*lead, 2, 6, *shape, generator=generator, dtype=dtype)
        labels = torch.randint(10, (*lead, 6), generator=generator)
        yield x, labels, tangents if method.needs_tangents else None


def sgd(model, r=0):
    return torch.optim.SGD(model.parameters(), lr=0.02 * (r + 1), momentum=0.9)


def replicated(models, methods, optimizer=sgd, **options):
    network = ibp.ReplicatedNetwork(models, seeds=range(len(models)))
    return ibp.ReplicatedStep(network, methods, [optimizer(m, r) for r, m in enumerate(models)], **options)


def alone(model, r, method, data, optimizer=sgd, **options):
    """What the replica would be without the others: its step, and the losses."""
    torch.manual_seed(r)
    step = ibp.EagerStep(model, method, optimizer(model, r), **options)
    return step, [float(step(*batch).loss) for batch in data]


def apart(model, twin):
    """The largest difference of parameters and buffers, relative to the largest entry of each."""
    found, expected = model.state_dict(), twin.state_dict()
    return max(
        float((found[n].double() - a.double()).abs().max() / a.double().abs().max()) for n, a in expected.items()
    )


def used_vmap(step):
    """Whether every kind of batch was found equal on three of them, and so trained together from then on."""
    return bool(step._trials) and all(trial is not None and trial.count == 3 for trial in step._trials.values())


def own_parts(data, r, each):
    return [tuple(a if a is None or not each else a[r] for a in batch) for batch in data]


CASES = [
    *(("together", key, False) for key in ibp.METHODS),
    *(("together", key, True) for key in ("loss_ibp", "tbp", "trades")),
    *(("one by one", key, each) for key, each in (("loss_ibp", False), ("tbp", True))),
]


@pytest.mark.parametrize(("way", "key", "each"), CASES, indirect=["way"])
def test_twenty_steps_with_dropout_and_batch_norm_are_those_of_each_alone(key, each, way):
    models = made()
    twins, methods = copy.deepcopy(models), [example(key, strength) for strength in STRENGTHS]
    data = list(batches(methods[0], lead=(COUNT,) if each else ()))
    step = replicated(models, methods)
    outside = torch.get_rng_state()
    losses = [step(*batch, each=each).loss.tolist() for batch in data]
    assert torch.equal(torch.get_rng_state(), outside)
    assert used_vmap(step)
    for r, twin in enumerate(twins):
        single, expected = alone(twin, r, methods[r], own_parts(data, r, each))
        assert apart(models[r], twin) < 1e-10
        assert [loss[r] for loss in losses] == pytest.approx(expected, rel=1e-10)
        assert torch.equal(step.network.states[r].cpu, torch.get_rng_state())
        for p, q in zip(models[r].parameters(), twin.parameters(), strict=True):
            ours, own = step._alone[r].optimizer.state[p], single.optimizer.state[q]
            assert torch.allclose(ours["momentum_buffer"], own["momentum_buffer"], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("key", ["bp", "loss_ibp", "at", "tbp"])
def test_in_float32_too(key, together):
    models = made(dtype=torch.float32)
    twins, methods = copy.deepcopy(models), [example(key, strength) for strength in STRENGTHS]
    data, step = list(batches(methods[0], dtype=torch.float32)), replicated(models, methods)
    for batch in data:
        step(*batch)
    for r, twin in enumerate(twins):
        near = [a_last_bit_away(twin, seed) for seed in range(3)]
        for model in (twin, *near):
            alone(model, r, methods[r], data)
        assert apart(models[r], twin) < max(1e-3, 3 * max(apart(model, twin) for model in near))


def a_last_bit_away(model, seed):
    """Where 20 steps from its copy end tells how far rounding alone leads, which depends on the machine's kernels."""
    near, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in near.parameters():
            p.copy_(rounded(p, torch.finfo(p.dtype).eps, generator))
    return near


@pytest.mark.parametrize("name", [name for name in NETWORKS if "branching" not in name and name != "in_place_input"])
def test_networks_of_all_kinds(name, together):
    build, shape = NETWORKS[name]
    models = made(build, 2)
    twins, methods = copy.deepcopy(models), [ibp.LossIBP(0.1), ibp.LossIBP(0.3)]
    data, step = list(batches(methods[0], shape, 6)), replicated(models, methods)
    for batch in data:
        step(*batch)
    assert used_vmap(step)
    for r, twin in enumerate(twins):
        alone(twin, r, methods[r], data)
        assert apart(models[r], twin) < 1e-9


@pytest.mark.parametrize("semantics", ["paper", "exact"])
def test_a_replica_that_diverges_leaves_the_others_alone(semantics, way):
    models = made()
    twins, methods = copy.deepcopy(models), [ibp.LossIBP(s, semantics=semantics) for s in STRENGTHS]
    data = list(batches(methods[0], steps=12))

    def optimizer(model, r):
        return torch.optim.SGD(model.parameters(), lr=1e300 if r == 1 else 0.02)

    step = replicated(models, methods, optimizer)
    parts = [step(*batch) for batch in data]
    assert used_vmap(step)
    assert not math.isfinite(parts[-1].loss[1])
    for r in (0, 2):
        alone(twins[r], r, methods[r], data, optimizer)
        assert apart(models[r], twins[r]) < 1e-10


def test_one_optimizer_call_updates_all(monkeypatch, together):
    calls, original = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *rest: calls.append(self) or original(self, *rest))
    models = made()
    step = replicated(models, [ibp.BP()] * COUNT, lambda m, r: torch.optim.SGD(m.parameters(), lr=0.1 if r else 0.2))
    for batch in batches(ibp.BP(), steps=3):
        step(*batch)
    assert len(calls) == 3
    sizes = [len(group["params"]) for group in calls[-1].param_groups]
    each = len(list(models[0].parameters()))
    assert sizes == [each, 2 * each], "one group for all with the same options"


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Adafactor"])
def test_every_optimizer_has_its_own_state_rate_and_scheduler(name, together):
    build, shape = NETWORKS["gelu_layer_norm"]
    models, method = made(build), ibp.LossIBP(0.1)
    twins, data = copy.deepcopy(models), list(batches(method, shape, steps=9))

    def optimizer(model, r):
        return getattr(torch.optim, name)(model.parameters(), lr=0.001 * (r + 1))

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    step = replicated(models, [method] * COUNT, optimizer)
    owns = [own.optimizer for own in step._alone]
    schedulers = [scheduler(own) for own in owns]
    for number, batch in enumerate(data):
        step(*batch)
        if number == 4:  # a replica that is loaded from where it was: with other steps done than the others
            owns[1].load_state_dict(copy.deepcopy(owns[1].state_dict()))
        for one in schedulers:
            one.step()
    for r, twin in enumerate(twins):
        torch.manual_seed(r)
        single = ibp.EagerStep(twin, method, optimizer(twin, r))
        decay = scheduler(single.optimizer)
        for batch in data:
            single(*batch)
            decay.step()
        assert apart(models[r], twin) < 1e-10


def test_replicas_with_other_numbers_of_steps_done(together):
    models, method = made(), ibp.LossIBP(0.1)
    twins, data = copy.deepcopy(models), list(batches(method, steps=9))

    def adam(model, r):
        return torch.optim.Adam(model.parameters(), lr=0.01)

    early, _ = alone(models[1], 1, method, data[:4], adam)
    network = ibp.ReplicatedNetwork(models, seeds=range(COUNT))
    network.states[1] = type(network.states[1]).now()
    optimizers = [early.optimizer if r == 1 else adam(m, r) for r, m in enumerate(models)]
    step = ibp.ReplicatedStep(network, [method] * COUNT, optimizers)
    for batch in data[4:]:
        step(*batch)
    assert used_vmap(step)
    for r, twin in enumerate(twins):
        alone(twin, r, method, data if r == 1 else data[4:], adam)
        assert apart(models[r], twin) < 1e-10


def test_optimizers_that_are_not_torchs_are_called_one_by_one(together):
    class Normed(torch.optim.SGD):
        """Its updates hang together: all gradients divided by their norm."""

        def step(self, closure=None):
            nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.01)
            super().step(closure)

    models, method = made(), ibp.LossIBP(0.1)
    twins, data = copy.deepcopy(models), list(batches(method, steps=6))
    step = replicated(models, [method] * COUNT, lambda m, r: Normed(m.parameters(), lr=0.5))
    for batch in data:
        step(*batch)
    for r, twin in enumerate(twins):
        alone(twin, r, method, data, lambda m, r: Normed(m.parameters(), lr=0.5))
        assert apart(models[r], twin) < 1e-10


def test_clipping_and_reduction_are_each_replicas_own(way):
    models, method = made(), ibp.LossIBP(0.1)
    twins, data = copy.deepcopy(models), list(batches(method, steps=8))
    options = {"clip_norm": 0.1, "reduce": lambda gradients: {n: 2 * g for n, g in gradients.items()}}
    step = replicated(models, [method] * COUNT, **options)
    for batch in data:
        step(*batch)
    for r, twin in enumerate(twins):
        alone(twin, r, method, data, **options)
        assert apart(models[r], twin) < 1e-10


CHANGES = {
    "methods": lambda models, step: step and setattr(step, "methods", [ibp.LossIBP(0.2 + r) for r in range(COUNT)]),
    "one model's mode": lambda models, step: models[1].eval(),
    "one model's dropout": lambda models, step: setattr(models[2][9], "p", 0.1),
    "one model's weights": lambda models, step: models[1].load_state_dict(
        {n: a / 2 if a.is_floating_point() else a for n, a in models[1].state_dict().items()}
    ),
    "one model's tensors": lambda models, step: setattr(models[1][0].weight, "data", models[1][0].weight / 2),
    "one model's layer": lambda models, step: setattr(models[1][0], "weight", nn.Parameter(models[1][0].weight / 2)),
    "all models' layer frozen": lambda models, step: [m[0].weight.requires_grad_(False) for m in models],
    "a hook": lambda models, step: models[1][0].register_forward_hook(lambda module, args, out: 2 * out),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_two_steps_is_followed(name, together):
    models, methods = made(), [ibp.LossIBP(s) for s in STRENGTHS]
    twins, data = copy.deepcopy(models), list(batches(methods[0], steps=12))
    step, change = replicated(models, methods), CHANGES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some of it makes them differ
        for number, batch in enumerate(data):
            if number == 6:
                change(models, step)
            step(*batch)
    singles = []
    for r, twin in enumerate(twins):
        singles.append(alone(twin, r, methods[r], data[:6])[0])
        step.network.states[r] = type(step.network.states[r]).now()  # kept for the second half
    states = list(step.network.states)
    change(twins, None)
    for r, single in enumerate(singles):
        states[r].restore()
        single.method = step.methods[r]
        for batch in data[6:]:
            single(*batch)
        if name == "one model's layer" and r == 1:
            continue  # the optimizers still hold the layer that was
        assert apart(models[r], twins[r]) < 1e-10


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.one(x.flatten(1))
        return self.two(-x if x.sum() > 0 else x.tanh())


class Counting(nn.Module):
    """A buffer made anew in each forward pass."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(64, 10)
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x):
        x = x.flatten(1)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0) + self.one.bias.detach().sum()
        return self.one(x - self.mean)


@pytest.mark.parametrize(
    ("build", "methods", "reason"),
    [
        (Branching, [ibp.LossIBP(0.1)] * 2, "control flow"),
        (vgg, [ibp.LossIBP(0.1), ibp.BP()], "several kinds"),
        (vgg, [ibp.LossIBP(0.1), ibp.LossIBP(0.0)], "differ in beta: some are 0"),
        (vgg, [ibp.LossIBP(0.1), ibp.LossIBP(0.1, 2)], "differ in norm"),
    ],
)
def test_what_cannot_be_trained_together_is_trained_one_by_one(build, methods, reason):
    models = made(build, 2)
    twins, data = copy.deepcopy(models), list(batches(methods[0], steps=5))
    step = replicated(models, methods)
    with pytest.warns(UserWarning, match=f"one after another; .*{reason}") as told:
        parts = [step(*batch) for batch in data]
    assert len(told) == 1
    for r, twin in enumerate(twins):
        _, losses = alone(twin, r, methods[r], data)
        assert apart(models[r], twin) == 0
        assert [float(p.loss[r]) for p in parts] == losses


def test_a_buffer_made_anew_in_each_pass(together):
    models, method = made(Counting), ibp.LossIBP(0.1)
    twins, data = copy.deepcopy(models), list(batches(method, steps=8))
    step = replicated(models, [method] * COUNT)
    for batch in data:
        step(*batch)
    assert used_vmap(step)
    for r, twin in enumerate(twins):
        alone(twin, r, method, data)
        assert apart(models[r], twin) < 1e-10


def test_the_quicker_way_is_taken_and_said_to_nobody(monkeypatch):
    seconds = iter([1.0, 2.0] * 3 + [2.0, 1.0] * 3)
    monkeypatch.setattr(replicated_step._Clock, "seconds", lambda self: next(seconds))
    calls, original = [], vmapped.Vmapped.__call__
    monkeypatch.setattr(vmapped.Vmapped, "__call__", lambda self, *given: calls.append(1) or original(self, *given))
    for used in (9, 3):
        calls.clear()
        step = replicated(made(count=2), [ibp.BP()] * 2)
        for batch in batches(ibp.BP(), steps=10):
            step(*batch)
        assert len(calls) == used, "the first batch of a kind is trained one by one"


def test_parts_are_those_of_each(way):
    models, methods = made(), [ibp.LossIBP(s) for s in STRENGTHS]
    twins, step = copy.deepcopy(models), replicated(models, methods)
    data = list(batches(methods[0], steps=6))
    found = [step(*batch) for batch in data][-1]
    for r, twin in enumerate(twins):
        alone(twin, r, methods[r], data[:5])
        expected = methods[r].parts(twin, *data[5])
        for part, own in zip(found, expected, strict=True):
            assert torch.allclose(part[r], own.detach(), rtol=1e-9)


def test_a_parameter_without_part_in_the_model_keeps_no_gradient(together):
    class Unused(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(64, 10))
            self.idle = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self[1](self[0](x))

    models = made(Unused)
    step = replicated(models, [ibp.LossIBP(0.1)] * COUNT, lambda m, r: torch.optim.SGD(m.parameters(), 0.1, 0, 0, 0.1))
    for batch in batches(ibp.BP(), steps=6):
        step(*batch)
    assert used_vmap(step)
    assert all(m.idle.grad is None and m.idle.tolist() == [1, 1] for m in models)


def test_models_stay_their_own():
    models = made()
    network = ibp.ReplicatedNetwork(models)
    assert all(torch.equal(whole[1], models[1].state_dict()[name]) for name, whole in network.parameters.items())
    with torch.no_grad():
        models[1][0].weight.fill_(2)
    assert network.parameters["0.weight"][1].eq(2).all()
    assert not network.parameters["0.weight"][0].eq(2).any()
    assert len({tuple(state.cpu.tolist()) for state in network.states}) == COUNT
    last = models[0].to(memory_format=torch.channels_last)
    assert (
        ibp.ReplicatedNetwork([last, copy.deepcopy(last)])
        .parameters["4.weight"][1]
        .is_contiguous(memory_format=torch.channels_last)
    )


def shared():
    first = vgg()
    return [first, nn.Sequential(first[0], *vgg()[1:])]


@pytest.mark.parametrize(
    ("models", "told"),
    [
        (lambda: [], "at least one model"),
        (lambda: [nn.ReLU()], "and parameters in it"),
        (lambda: [nn.Linear(3, 2), nn.Linear(3, 4)], r"models\[1\] has 'weight' as \[4, 3\].* one structure"),
        (lambda: [nn.Linear(3, 2), nn.Linear(3, 2, bias=False)], r"models\[1\] has 'bias' as nothing"),
        (lambda: [nn.Linear(3, 2), nn.Linear(3, 2).double()], r"models\[1\] has 'weight' as \[2, 3\], torch.float64"),
        (lambda: [nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)], r"'running_mean' as nothing"),
        (shared, r"models\[0\] and models\[1\] share '0.weight'.*copy.deepcopy"),
        (lambda: [nn.Linear(3, 2)] * 2, "share 'weight'"),
    ],
)
def test_models_that_cannot_be_replicas_are_refused(models, told):
    with pytest.raises(TypeError, match=told):
        ibp.ReplicatedNetwork(models())


def test_wrong_numbers_of_things_are_refused():
    with pytest.raises(ValueError, match="3 replicas need as many seeds, not 2"):
        ibp.ReplicatedNetwork(made(), seeds=[0, 1])
    network = ibp.ReplicatedNetwork(made())
    with pytest.raises(ValueError, match="3 replicas need as many methods and optimizers, not 2 and 0"):
        ibp.ReplicatedStep(network, [ibp.BP()] * 2, [])
    step = replicated(made(), [ibp.BP()] * COUNT)
    x, labels, _ = next(batches(ibp.BP(), lead=(2,)))
    with pytest.raises(ValueError, match=r"each=True needs inputs \[3, ...\]"):
        step(x, labels, each=True)


def test_a_wrong_label_is_the_error_of_one_alone(together):
    step = replicated(made(), [ibp.LossIBP(0.1)] * COUNT)
    x, labels, _ = next(batches(ibp.BP()))
    for _ in range(5):
        step(x, labels)
    with pytest.raises(ValueError, match=r"labels must lie in 0 … 9"):
        step(x, labels + 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x, labels)
