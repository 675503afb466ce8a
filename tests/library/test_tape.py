"""Methods without a tangent run as plain autograd, and agree with the sweeps that they run as elsewhere."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ibp_triton as ibp
from ibp_triton.errors import MethodError
from ibp_triton.steady import Steady
from ibp_triton.sweeps import Term, g
from ibp_triton.tape import Backward, Tape
from tests.library.comparing import error, example, oracle, ours
from tests.library.networks import build

PLAIN = ["bp", "at", "fast_at", "pgd_training", "trades"]


def by_sweeps(model):
    network = ibp.Network(model)
    network.reentrant = True  # as a model is that autograd can't take
    return network


@pytest.mark.parametrize("key", PLAIN)
@pytest.mark.parametrize("name", ["paper_mnist", "residual_train", "gelu_layer_norm", "attention", "vgg_train"])
def test_both_ways_agree_with_each_other_and_with_the_oracle(name, key):
    model, x, labels, _ = build(name)
    method = example(key)
    plain, swept = ibp.Network(model), by_sweeps(model)
    loss, found = ours(method, plain, x, labels)
    other_loss, other = ours(method, swept, x, labels)
    assert plain.graph() is None
    assert swept.graph() is not None
    assert float(loss) == pytest.approx(float(other_loss), rel=1e-12)
    assert error(found, other) < 1e-10
    assert error(other, oracle(method, model, x, labels)[1]) < 1e-10


@pytest.mark.parametrize("function", [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_draws_alike_in_every_layout(p, function):
    axes = int(function.__name__[-2]) if function is not F.dropout else 2
    x = 1 + torch.rand(6, 5, *[4] * axes)
    masks = []
    for layout in (x, x.transpose(1, -1).contiguous().transpose(1, -1)):
        torch.manual_seed(3)
        with Steady():
            masks.append(function(layout, p) / x)
    torch.testing.assert_close(*masks)
    torch.manual_seed(3)
    torch.testing.assert_close(masks[0], function(x, p) / x)


def test_bp_is_the_plain_loop_to_the_bit():
    torch.manual_seed(0)
    model, x, labels = (
        nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)),
        torch.randn(8, 6),
        torch.arange(8) % 4,
    )
    log_p = torch.log_softmax(model(x), 1)
    seed = (log_p.exp() - F.one_hot(labels, 4)) / 8
    expected = torch.autograd.grad(model(x), list(model.parameters()), seed)
    found = ibp.BP().gradients(model, x, labels)[1]
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))


@pytest.mark.parametrize("coefficient", [0.5, torch.tensor(0.5).double()], ids=type)
def test_a_sweep_that_has_run_joins_those_that_run_with_the_gradient(coefficient):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(6, 4).double()
    x.requires_grad_()
    own, (d, e) = dict(model.named_parameters()), torch.randn(2, 6, 3).double()
    expected = torch.autograd.grad(model(x), list(own.values()), (d + 0.5 * e) / 6)
    tape = Tape(model(x), x, own, divisor=6, runs=2)
    before = Backward(tape, e)
    assert before.at_input.shape == x.shape
    found = tape.gradients([Term(1, tape, Backward(tape, d)), Term(coefficient, tape, before)])
    assert error(found, dict(zip(own, expected, strict=True))) < 1e-12


@pytest.mark.parametrize("key", ["at", "trades"])
def test_a_criterion_that_weighs_samples(key):
    model, x, labels, _ = build("residual_train")
    weight = torch.rand(10, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    method = ibp.AdversarialTraining(0.1, criterion=nn.CrossEntropyLoss(weight=weight)) if key == "at" else example(key)
    assert error(ours(method, ibp.Network(model), x, labels)[1], oracle(method, model, x, labels)[1]) < 1e-10


def test_nothing_outlives_a_step():
    kept = []

    class Watched(nn.Module):
        def forward(self, x):
            y = torch.tanh(x)
            kept.append(weakref.ref(y))
            return y

    model = nn.Sequential(nn.Linear(6, 6), Watched(), nn.Linear(6, 3))
    for key in PLAIN:
        example(key).gradients(model, torch.randn(4, 6), torch.arange(4) % 3)
    gc.collect()
    assert len(kept) >= 8
    assert all(one() is None for one in kept)


def test_nothing_outlives_a_step_by_second_derivatives():
    kept = []

    class Watched(Recurrent):
        def forward(self, x):
            y = super().forward(x)
            kept.append(weakref.ref(y))
            return y

    network = ibp.Network(Watched())
    for _ in range(3):
        ibp.LossIBP(0.1, semantics="exact").gradients(network, torch.randn(4, 7, 6), torch.arange(4))
    gc.collect()
    assert network.bends_by_autograd()
    assert len(kept) == 3
    assert all(one() is None for one in kept)


def test_a_models_own_writes_leave_x_alone():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            return self.out(x.mul_(2))

    model, x = Writes(), torch.randn(4, 6)
    before = x.clone()
    for key in PLAIN:
        example(key).gradients(model, x, torch.arange(4) % 3)
    assert torch.equal(x, before)


class Fickle(ibp.BP):
    """Another recipe than that which its cost was read from, on one sample of one number."""

    def recipe(self, s):
        a = s.forward()
        d = a.reverse(a.c)
        yield s.objective(a, (1, a.losses))
        yield from [g(a, d)] if s.x.numel() == 1 else self.more(a, d)


def _twice(self, a, d):
    return g(a, d), 2 * g(a, d), 3 * g(a, a.reverse(a.c.flip(0)))


def test_terms_that_share_a_sweep_or_a_pass():
    model, x, labels, _ = build("paper_mnist")
    method = type("Own", (Fickle,), {"more": _twice})()
    found, expected = (method.gradients(n, x, labels)[1] for n in (ibp.Network(model), by_sweeps(model)))
    assert error(found, expected) < 1e-12
    assert error(found, ibp.BP().gradients(model, x, labels)[1]) > 0.1


def test_the_order_of_terms_does_not_matter():
    """A merged product's bias has the coefficient of the term that brings it."""

    class Turned(ibp.LossIBP):
        def recipe(self, s):
            value, *terms = super().recipe(s)
            yield value
            yield from reversed(terms)

    model, x, labels, _ = build("paper_mnist")
    found, expected = (kind(0.3).gradients(model, x, labels)[1] for kind in (Turned, ibp.LossIBP))
    assert error(found, expected) < 1e-12


UNFORESEEN = {
    "a tangent": lambda self, a, d: [g(a.tangent(a.c), d)],
    "the input's derivative": lambda self, a, d: [g(a, d), d.at_input],
}


@pytest.mark.parametrize("more", UNFORESEEN.values(), ids=list(UNFORESEEN))
def test_a_recipe_that_changes_is_refused(more):
    model, x, labels, _ = build("paper_mnist")
    with pytest.raises(MethodError, match="than when it was read for its cost"):
        type("Own", (Fickle,), {"more": more})().gradients(model, x, labels)


def test_a_sweep_is_not_read_after_its_terms():
    passes = []

    class Kept(ibp.BP):
        def recipe(self, s):
            a = s.forward()
            passes.append(a)
            yield s.objective(a, (1, a.losses))
            yield g(a, a.reverse(a.c))

    model, x, labels, _ = build("paper_mnist")
    Kept().gradients(model, x, labels)
    a = passes[-1]
    a.trace.input.requires_grad_()
    with pytest.raises(MethodError, match="after it was used up"):
        a.reverse(a.c).at_input  # noqa: B018 - reading it is what is refused


def test_terms_of_a_pass_that_promised_none():
    class Two(ibp.BP):
        def recipe(self, s):
            a, b = s.forward(), s.forward()
            yield s.objective(a, (1, a.losses))
            yield g(*((a, a.reverse(a.c)) if s.x.numel() == 1 else (b, b.reverse(b.c))))

    model, x, labels, _ = build("paper_mnist")
    with pytest.raises(MethodError, match="gives other terms"):
        Two().gradients(model, x, labels)


def test_an_output_of_x_alone_has_gradients_of_zero():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(3, 3)

        def forward(self, x):
            return x * 2

    for key in PLAIN:
        _, found = example(key).gradients(Apart(), torch.rand(4, 3), torch.arange(4) % 3)
        assert not any(part.any() for part in found.values())


class Recurrent(nn.Module):
    """Most of its parameters lie in a layer that is taken whole."""

    def __init__(self):
        super().__init__()
        self.norm, self.cells = nn.BatchNorm1d(7), nn.GRU(6, 8, 2, batch_first=True, dropout=0.2)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.drop(self.cells(self.norm(x))[0][:, -1].tanh()))


STEEP = {
    "loss_ibp": ibp.LossIBP(0.4, 1, "exact"),
    "norm 2": ibp.LossIBP(0.4, 2, "exact"),
    "fast_tbp": ibp.FastTangentBP(0.4, 1.5, "exact"),
    "weighted": ibp.LossIBP(0.4, 1, "exact", criterion=nn.CrossEntropyLoss(weight=torch.rand(4, dtype=torch.float64))),
    "a tensor": ibp.LossIBP(torch.tensor(0.4, dtype=torch.float64), 2, "exact"),
    "jacobian": ibp.JacobianRegularisation(0.4, 2),
    "all of it": ibp.JacobianRegularisation(0.4, "all"),
    "weighted jacobian": ibp.JacobianRegularisation(
        0.4, criterion=nn.CrossEntropyLoss(weight=torch.rand(4, dtype=torch.float64))
    ),
}


@pytest.mark.parametrize("name", STEEP)
def test_exact_penalties_of_layers_taken_whole_are_autograds(name):
    torch.manual_seed(0)
    model, method = Recurrent().double(), STEEP[name]
    x, labels = torch.randn(5, 7, 6, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    tau = torch.randn(2, *x.shape, dtype=torch.float64) if method.needs_tangents else None
    network, start = ibp.Network(model), {k: b.clone() for k, b in model.named_buffers()}
    value, found = ours(method, network, x, labels, tau)
    moved = {k: b.clone() for k, b in model.named_buffers()}
    state = torch.get_rng_state()
    for k, b in model.named_buffers():
        b.data.copy_(start[k])
    again, other = ours(method, network, x, labels, tau)  # the first step recorded the model, by sweeps
    assert float(again) == pytest.approx(float(value), rel=1e-12)
    assert error(other, found) < 1e-10
    assert all(torch.equal(b, moved[k]) for k, b in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    for k, b in model.named_buffers():
        b.data.copy_(start[k])
    expected_value, expected = oracle(method, model, x, labels, tau)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-12)
    assert error(found, expected) < 1e-10
    swept = by_sweeps(model)
    assert error(ours(method, swept, x, labels, tau)[1], expected) < 1e-10
    assert network.bends_by_autograd()
    assert "autograd's second derivatives" in network.summary()


def test_without_second_derivatives_of_torchs_the_sweeps_take_over():
    class Hard(Recurrent):
        def forward(self, x):
            return super().forward(F.hardsigmoid(x))

    torch.manual_seed(0)
    model, method = Hard().float(), ibp.LossIBP(0.4, 2, "exact")
    x, labels = torch.randn(5, 7, 6), torch.tensor([0, 3, 1, 1, 2])
    network, start = ibp.Network(model), {k: b.clone() for k, b in model.named_buffers()}
    expected = ours(method, network, x, labels)[1]
    assert network.bends_by_autograd()
    for k, b in model.named_buffers():
        b.data.copy_(start[k])
    found = ours(method, network, x, labels)[1]
    assert not network.bends_by_autograd()
    assert all(torch.equal(found[k], expected[k]) for k in found)
    moved = {k: b.clone() for k, b in model.named_buffers()}
    for k, b in model.named_buffers():
        b.data.copy_(start[k])
    expected = ours(method, by_sweeps(model), x, labels)[1]
    assert all(torch.equal(found[k], expected[k]) for k in found)
    assert all(torch.equal(b, moved[k]) for k, b in model.named_buffers())


@pytest.mark.parametrize(
    "method", [ibp.LossIBP(0.4, 2, "exact"), ibp.FastTangentBP(0.4, 2, "exact"), ibp.JacobianRegularisation(0.4, 3)]
)
@pytest.mark.parametrize("name", ["attention", "encoder"])
def test_with_attention_second_derivatives_are_autograds_and_sweeps_agree(name, method):
    if name == "attention":
        model, x, labels, tau = build("attention")
    else:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.1)
        model = nn.Sequential(
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(24, 4)
        )
        model, x, labels = model.double(), torch.randn(5, 4, 6).double(), torch.tensor([0, 3, 1, 1, 2])
        tau = torch.randn(2, *x.shape).double()
    tau = tau if method.needs_tangents else None
    network = ibp.Network(model)
    for _ in range(2):  # the first step records, the others need not
        value, found = ours(method, network, x, labels, tau)
        expected_value, expected = oracle(method, model, x, labels, tau)
        assert float(value) == pytest.approx(float(expected_value), rel=1e-12)
        assert error(found, expected) < 1e-10
    assert network.bends_by_autograd()
    assert "autograd's second derivatives" in network.summary()
    assert error(ours(method, by_sweeps(model), x, labels, tau)[1], expected) < 1e-10


@pytest.mark.parametrize("name", ["attention", "perceptron"])
def test_a_step_runs_the_model_once_also_by_second_derivatives(name):
    """So that what a model counts by itself, and computes from it, is what a training loop would see."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.out, self.calls = nn.Linear(6, 6), nn.Linear(6, 3), 0

        def forward(self, x):
            self.calls += 1
            x = self.body(x)
            if name == "attention":
                x = F.scaled_dot_product_attention(x, x, x)
            return self.out(x.tanh() * self.calls).mean(1)

    torch.manual_seed(0)
    model, method = Counts().double(), ibp.LossIBP(0.4, 2, "exact")
    network, x, labels = ibp.Network(model), torch.randn(5, 4, 6).double(), torch.tensor([0, 2, 1, 1, 2])
    for number in range(3):
        found = ours(method, network, x, labels)[1]
        assert model.calls == number + 1
        model.calls, leaf = number, x.clone().requires_grad_()
        losses = F.cross_entropy(model(leaf), labels, reduction="none")
        slope = torch.autograd.grad(losses.sum(), leaf, create_graph=True)[0].flatten(1)
        loss = (losses + 0.4 * slope.square().sum(1) / 2).mean()
        by_hand = dict(zip(found, torch.autograd.grad(loss, [*model.parameters()]), strict=True))
        assert error(found, by_hand) < 1e-12
    assert network.bends_by_autograd() == (name == "attention")


@pytest.mark.parametrize("method", [ibp.BP(), ibp.LossIBP(0.4), ibp.LossIBP(0.4, semantics="exact")])
@pytest.mark.parametrize("kind", ["writes to x", "checkpoint"])
def test_a_pass_that_is_begun_again_is_counted_once(kind, method):
    """A model whose way through the step shows half-way: attributes of its modules are put back as buffers are."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.calls, self.state = nn.Linear(6, 3), 0, None

        def forward(self, x):
            assert (self.state is None) == (not hasattr(self, "late")) == (self.calls == 0)
            self.calls, self.late = self.calls + 1, ()
            self.state = x.detach().sum() if self.state is None else self.state + 1
            y = self.out(x.mul_(2) if kind == "writes to x" else x)
            return checkpoint(torch.sin, y, use_reentrant=True) if kind == "checkpoint" else y

    network, x, labels = ibp.Network(Counts()), torch.randn(5, 6), torch.tensor([0, 2, 1, 1, 2])
    for number in range(3):
        method.gradients(network, x, labels)
        assert network.model.calls == number + 1
    network.summary()
    assert network.model.calls == 3


class Last(nn.Module):
    def forward(self, found):
        return found[0][:, -1]


def test_backward_hooks_are_called_once_a_pass_and_keep_a_network_to_sweeps():
    model, seen = nn.Sequential(nn.LSTM(6, 6, batch_first=True), Last(), nn.Tanh(), nn.Linear(6, 3)), []
    model[2].register_full_backward_hook(lambda module, given, got: seen.append(module))
    network, method = ibp.Network(model), ibp.LossIBP(0.4, semantics="exact")
    for number in range(3):
        method.gradients(network, torch.randn(5, 4, 6), torch.tensor([0, 2, 1, 1, 2]))
        assert len(seen) == number + 1
    assert not network.bends_by_autograd()


def test_of_a_curved_pass_one_reverse_sweep_is_read():
    class Two(ibp.LossIBP):
        def recipe(self, s):
            a = s.forward()
            first, second = a.reverse(a.c), a.reverse(2 * a.c)
            penalty = (first.at_input * second.at_input).sum()
            yield s.objective(a, (1, a.losses), penalty=(self.beta, penalty))
            yield a.data(first)
            if a.curved:
                yield self.beta * a.change(second.at_input)
            else:
                yield self.beta * g(a.tangent(second.at_input), first)

    network, x, labels = ibp.Network(Recurrent()), torch.randn(4, 7, 6), torch.arange(4)
    ibp.LossIBP(0.1).gradients(network, x, labels)
    with pytest.raises(MethodError, match="one reverse sweep can be read"):
        Two(0.1, semantics="exact").gradients(network, x, labels)


@pytest.mark.parametrize("method", [ibp.TangentBP(0.4, 2, "exact"), ibp.JacobianRegularisation(0.4)])
def test_backward_hooks_see_the_losss_derivative_alone(method):
    """A sweep that carried the penalty's besides would show them both."""
    torch.manual_seed(0)
    model, seen = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double(), []
    x, labels = torch.randn(5, 6).double(), torch.tensor([0, 2, 1, 1, 2])
    tau = torch.randn(2, 5, 6).double() if method.needs_tangents else None
    expected = oracle(method, model, x, labels, tau)[1]
    model[1].register_full_backward_hook(lambda module, given, got: seen.append(got[0].clone()))
    assert error(ours(method, ibp.Network(model), x, labels, tau)[1], expected) < 1e-10
    ibp.BP().gradients(ibp.Network(model), x, labels)
    with_penalty, alone = seen
    assert float((with_penalty - len(x) * alone).abs().max()) < 1e-12  # per sample, and of the mean


def test_networks_of_layers_with_rules_keep_to_sweeps():
    model, x, labels, _ = build("residual_train")
    network = ibp.Network(model)
    ibp.LossIBP(0.3, 1, "exact").gradients(network, x, labels)
    assert not network.bends_by_autograd()


GROUP_NORM = """
import torch, ibp_triton as ibp
from torch import nn
from torch.utils.checkpoint import checkpoint
first = nn.GroupNorm(2, 8)
frozen = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False), nn.GroupNorm(2, 8))
x, y = torch.randn(3, 8, 8, 8).contiguous(memory_format=torch.channels_last), torch.tensor([0, 1, 2])
for body in (first, frozen):
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(8 * 64, 4)).to(memory_format=torch.channels_last)
    weighted = nn.CrossEntropyLoss(weight=torch.rand(4))
    for method in (ibp.BP(), ibp.AdversarialTraining(0.1), ibp.LossIBP(0.0, criterion=weighted), ibp.LossIBP(0.1)):
        method.gradients(model, x, y)
"""


def test_a_group_norm_whose_input_has_no_derivative():
    """In a process of its own: torch dies of a segmentation fault there."""
    run = subprocess.run([sys.executable, "-c", GROUP_NORM], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.runs = nn.Linear(6, 5), nn.Linear(5, 3), []

    def forward(self, x):
        self.runs.append(len(x))
        return self.last(checkpoint(torch.tanh, self.first(x), use_reentrant=True))


def test_methods_take_turns_on_a_model_with_a_reentrant_checkpoint():
    model, x, labels = Reentrant().double(), torch.rand(4, 6, dtype=torch.float64), torch.arange(4) % 3
    methods = [ibp.LossIBP(0.1), ibp.LossIBP(0.1, semantics="exact"), ibp.BP(), ibp.AdversarialTraining(0.1)]
    alone = [ours(method, ibp.Network(model), x, labels)[1] for method in methods]
    for order in ((0, 2, 1, 3), (1, 3, 0, 2), (3, 0, 2, 1)):
        network = ibp.Network(model)
        for i in order:
            assert error(ours(methods[i], network, x, labels)[1], alone[i]) < 1e-12


def test_a_model_with_a_reentrant_checkpoint_goes_by_sweeps_from_its_first_step_on():
    model = Reentrant().double()
    network, x, labels = ibp.Network(model), torch.rand(4, 6, dtype=torch.float64), torch.arange(4) % 3
    for runs in (2, 1):  # the first step begins again
        model.runs.clear()
        found = ours(ibp.BP(), network, x, labels)[1]
        assert len(model.runs) == runs
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        assert error(found, {name: p.grad for name, p in model.named_parameters()}) < 1e-12
