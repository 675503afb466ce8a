"""Sums of gradients over processes begin while others are made, in one order whatever each process computed."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import ibp_triton as ibp
from ibp_triton import world
from ibp_triton.backends.torch.dense import Dense
from ibp_triton.backends.torch.sync_batch_norm import Synchronised
from ibp_triton.tape import Tape
from tests.library.comparing import error, example
from tests.library.processes import of_two

WIDTHS = (5, 6, 7, 4, 3)


class Alone(world.World):
    """A process that has nobody to add up with, and writes down when it would."""

    def __init__(self, events):
        super().__init__(None)
        object.__setattr__(self, "events", events)

    def total(self, count, weights, device):
        return count, weights

    def sum(self, value):
        return value

    def begin(self, value):
        self.events.append(("sent", value.numel()))
        return self

    def wait(self):
        self.events.append(("waited",))


def perceptron():
    torch.manual_seed(0)
    layers = [part for i, o in pairwise(WIDTHS) for part in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def batch(count=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 5, generator=generator).double(), torch.arange(count) % 3


METHODS = [
    ibp.BP(),
    ibp.AdversarialTraining(0.1),
    ibp.FastAdversarialTraining(0.1),
    ibp.LossIBP(0.1),
    ibp.LossIBP(0.1, semantics="exact"),
    ibp.PredictionIBP(0.1),
    ibp.PredictionIBP(0.1, semantics="exact"),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_sum_begins_before_the_last_weight_gradient_is_made(method, monkeypatch):
    monkeypatch.setattr(world, "SMALLEST", 50)
    events, made, told = [], Dense.param_vjp, Tape._told
    network = ibp.Network(perceptron())
    network.world = Alone(events)
    network._synchronised = Synchronised(network.world, False)
    x, y = batch()
    expected = method.gradients(perceptron(), x, y)[1]
    method.gradients(network, x, y)  # a first step may be taken back, and sends nothing early

    def watched(self, left, d, wanted, scale=1):
        if "weight" in wanted:
            events.append(("made", tuple(self.weight.shape)))
        return made(self, left, d, wanted, scale)

    monkeypatch.setattr(Dense, "param_vjp", watched)

    def taken(take):
        def kept(name, d):
            if name.endswith("weight"):
                events.append(("made", tuple(d.shape)))
            take(name, d)

        return kept

    # where autograd makes them
    monkeypatch.setattr(Tape, "_told", lambda self, take, *more: told(self, take and taken(take), *more))
    events.clear()
    found = method.gradients(network, x, y)[1]
    assert error(found, expected) < 1e-12
    kinds = [event[0] for event in events]
    last_made = len(kinds) - 1 - kinds[::-1].index("made")
    assert kinds.index("sent") < last_made, events
    assert [event for event in events if event[0] == "waited"] == [("waited",)] * kinds.count("sent")
    assert kinds.index("waited") > last_made
    sizes = [p.numel() for p in network.model.parameters()]
    assert sum(event[1] for event in events if event[0] == "sent") == sum(sizes)


@pytest.mark.parametrize("normalised", [True, False])
def test_sums_wait_for_the_end_where_batch_norms_add_up_in_between(monkeypatch, normalised):
    monkeypatch.setattr(world, "SMALLEST", 50)
    events, (x, y) = [], batch()
    model = nn.Sequential(nn.Linear(5, 20), nn.BatchNorm1d(20).train(normalised), nn.Linear(20, 3)).double()
    network = ibp.Network(model)
    alone = network.world = Alone(events)
    network._synchronised = Synchronised(alone, True)
    network.interface = replace(network.interface, within=network._synchronised)
    ibp.LossIBP(0.1).gradients(network, x, y)
    events.clear()
    monkeypatch.setattr(Alone, "sum", lambda self, value: (events.append(("summed",)), value)[1])
    ibp.LossIBP(0.1).gradients(network, x, y)
    kinds = [event[0] for event in events]
    first, last = kinds.index("sent"), len(kinds) - 1 - kinds[::-1].index("sent")
    assert "summed" not in kinds[first:last]
    assert normalised == ("summed" in kinds[:first])
    assert kinds[last + 1 :] == ["waited"] * kinds.count("sent") + ["summed"]


class Branching(nn.Module):
    """Its way depends on the data, and so do the parameters that a process uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.never = nn.Linear(2, 2)
        self.below, self.positive, self.negative, self.above = (nn.Linear(5, 5) for _ in range(4))
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        a = self.below(x).tanh()
        if x.sum() > 0:
            return self.out(self.above(self.positive(a).tanh()).tanh())
        return self.out(self.negative(a).tanh())


class Tied(nn.Module):
    """Its first weights are its last ones, and others are computed from parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        a = self.two(self.one(x).tanh()).tanh()
        a = nn.functional.linear(a, self.one.weight + self.two.weight.square()).tanh()
        return self.out(a)


class Checkpointed(nn.Module):
    """Refused by torch.autograd.grad half-way, after the last layer's gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(checkpoint(self._inner, x.requires_grad_(), use_reentrant=True))

    def _inner(self, x):
        return self.one(x).tanh()


MODELS = (Branching, Tied, Checkpointed)
STEPS = ((6, 0), (3, 3), (0, 6), (2, 4))


def shard(split, rank):
    """A batch of which each process sees its part: process 0 numbers of one sign, process 1 of the other."""
    x, y = batch()
    x = x.abs()
    x[split[0] :] *= -1
    part = slice(0, split[0]) if rank == 0 else slice(split[0], None)
    return x[part], y[part]


def kinds():
    return [*METHODS, example("tbp").at(semantics="exact")]


def given(method, x):
    return x.flip(-1)[None].repeat(2, 1, 1) if method.needs_tangents else None


def _gradients(rank):
    found = []
    for model in MODELS:
        for method in kinds():
            network = ibp.Network(model().double(), process_group=dist.group.WORLD)
            for split in STEPS:
                x, y = shard(split, rank)
                found.append(method.gradients(network, x, y, given(method, x))[1])
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return [iter(found) for found in of_two(_gradients, tmp_path_factory.mktemp("buckets"), smallest=12)]


def expected(model, method, split):
    """Σ of the processes' own means, each as often as it has samples."""
    network, total = ibp.Network(model), {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for rank, count in enumerate(split):
        if count:
            x, y = shard(split, rank)
            for name, d in method.gradients(network, x, y, given(method, x))[1].items():
                total[name] += d * count / sum(split)
    return total


def test_processes_may_use_other_parameters_and_have_no_samples(results):
    for model in MODELS:
        for method in kinds():
            for split in STEPS:
                whole = expected(model().double(), method, split)
                assert all(error(next(found), whole) < 1e-12 for found in results), (model, method, split)
