"""Eager, compiled and captured steps train alike, whatever changes between two of them."""

import copy
import itertools
import shutil
import warnings

import pytest
import torch
from torch import nn

import ibp_triton as ibp
from ibp_triton import captured_step, compiled_step
from tests.captures import Recording, stand_in

METHODS = {
    "bp": ibp.BP(),
    "loss_ibp": ibp.LossIBP(0.3),
    "loss_ibp exact": ibp.LossIBP(0.3, semantics="exact"),
    "prediction_ibp": ibp.PredictionIBP(0.3),
    "at": ibp.AdversarialTraining(0.1),
    "fast_at": ibp.FastAdversarialTraining(0.1),
    "tbp": ibp.TangentBP(0.1),
    "fast_tbp": ibp.FastTangentBP(0.1),
    "criterion": ibp.LossIBP(0.3, criterion=nn.CrossEntropyLoss(label_smoothing=0.1)),
}


@pytest.fixture
def graphs(monkeypatch):
    """Steps on the CPU are captured too."""
    stand_in(monkeypatch)


@pytest.fixture
def recorded(monkeypatch):
    """The recorded operations run as they are: all of a compiled step but inductor's part and its compile time."""
    monkeypatch.setattr(compiled_step, "compiled", lambda graph: graph)


def network(normed=False):
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)] if normed else [nn.Conv2d(1, 4, 3)]
    return nn.Sequential(*body, nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(method, counts=(6, 6, 6, 6, 6, 6, 2, 6)):
    generator = torch.Generator().manual_seed(1)
    for count in counts:
        x = torch.randn(count, 1, 8, 8, generator=generator)
        tangents = torch.randn(2, *x.shape, generator=generator) if method.needs_tangents else None
        yield x, torch.randint(3, (count,), generator=generator), tangents


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def trained(kind, method, model, change=lambda step, number: None, data=None, **options):
    step = kind(model, method, sgd(model), **options)
    parts = []
    for number, batch in enumerate(data or batches(method)):
        change(step, number)
        parts.append(step(*batch))
    return step, parts


def same(a, b, tolerance=1e-5):
    found, expected = a.state_dict(), b.state_dict()
    assert all(torch.allclose(found[n].double(), v.double(), rtol=0, atol=tolerance) for n, v in expected.items())


def plain_loop(method, model, data=None):
    optimizer, losses = sgd(model), []
    for x, y, tangents in data or batches(method):
        optimizer.zero_grad()
        loss = method(model, x, y, tangents)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("kind", [ibp.EagerStep, ibp.CompiledStep, ibp.CapturedStep])
def test_every_step_is_that_of_a_plain_loop(kind, key, normed, recorded, graphs):
    model = network(normed)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing falls back
        step, parts = trained(kind, METHODS[key], model)
    expected = plain_loop(METHODS[key], twin)
    assert all(torch.allclose(p.loss, loss, atol=1e-5) for p, loss in zip(parts, expected, strict=True))
    same(model, twin)
    if kind is ibp.CapturedStep:
        assert step.captures == 1
    if kind is ibp.CompiledStep:
        assert [found.checked for found in step._made.values()] == [3]


CHANGES = {
    "beta": lambda step, n: setattr(step, "method", ibp.LossIBP(0.3 if n < 5 else 0.05)),
    "another method": lambda step, n: setattr(step, "method", ibp.LossIBP(0.3) if n < 5 else ibp.BP()),
    "norm": lambda step, n: setattr(step, "method", ibp.LossIBP(0.3, 1 if n < 5 else 2)),
    "learning rate": lambda step, n: step.optimizer.param_groups[0].update(lr=0.1 / (n + 1)),
    "mode": lambda step, n: step.network.model.train(n < 5),
    "a frozen layer": lambda step, n: step.network.model[0].weight.requires_grad_(n < 5),
    "an attribute": lambda step, n: setattr(step.network.model[1], "eps", 1e-5 if n < 5 else 0.5),
    "moved numbers": lambda step, n: (
        n == 5 and setattr(step.network.model[0].weight, "data", torch.full((4, 1, 3, 3), 0.1))
    ),
    "an optimizer's state": lambda step, n: n == 5 and step.optimizer.load_state_dict(step.optimizer.state_dict()),
    "gradients": lambda step, n: step.optimizer.zero_grad(set_to_none=n % 2 == 0),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", [ibp.CompiledStep, ibp.CapturedStep])
def test_what_changes_takes_effect_at_once(kind, name, recorded, graphs):
    model, change = network(True), CHANGES[name]
    twin, counts = copy.deepcopy(model), [6] * 9
    trained(kind, ibp.LossIBP(0.3), model, change, list(batches(ibp.BP(), counts)))
    trained(ibp.EagerStep, ibp.LossIBP(0.3), twin, change, list(batches(ibp.BP(), counts)))
    same(model, twin)


@pytest.mark.parametrize(
    "method", [ibp.LossIBP(0.3), ibp.FastAdversarialTraining(0.3), ibp.PGDTraining(0.3, 0.1, 2, random_start=False)]
)
def test_a_schedule_of_the_strength_captures_once(method, graphs):
    model = network(True).double()
    twin = copy.deepcopy(model)
    strength = method.parameter

    def change(step, number):
        step.method = method.at(**{strength: 0.3 / (1 + number)})

    def data():
        return [(x.double(), y, tangents) for x, y, tangents in batches(method, [6] * 9)]

    captured, parts = trained(ibp.CapturedStep, method, model, change, data())
    _, expected = trained(ibp.EagerStep, method, twin, change, data())
    same(model, twin, 1e-12)
    assert all(torch.allclose(p.loss, q.loss, rtol=1e-12, atol=0) for p, q in zip(parts, expected, strict=True))
    assert captured.captures == 1
    captured.method = method.at(**{strength: 0.0})
    captured(*data()[0])
    assert captured.captures == 2


def test_gradients_stay_behind_whatever_kind_of_step_came_before(graphs):
    model = network()
    step, method = ibp.CapturedStep(model, ibp.BP(), sgd(model)), ibp.BP()
    for x, y, _ in batches(method, (6, 6, 6, 6, 6, 2, 6)):
        expected = method.gradients(model, x, y)[1]
        step(x, y)
        assert all(torch.allclose(p.grad, expected[n], atol=1e-6) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", [ibp.EagerStep, ibp.CompiledStep])
def test_accumulation_clipping_and_reduction(kind, recorded):
    model, seen = network(), []
    twin, method = copy.deepcopy(model), ibp.LossIBP(0.3)

    def halved(gradients):
        seen.append({n: g.clone() for n, g in gradients.items()})
        return {n: g / 2 for n, g in gradients.items()}

    trained(kind, method, model, data=list(batches(method, [6] * 12)), accumulate=2, clip_norm=0.5, reduce=halved)
    optimizer = sgd(twin)
    data = list(batches(method, [6] * 12))
    for first, second in zip(data[::2], data[1::2], strict=True):
        optimizer.zero_grad()
        ((method(twin, *first) + method(twin, *second)) / 4).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
    same(model, twin)
    assert len(seen) == 6


@pytest.mark.parametrize("kind", [ibp.EagerStep, ibp.CompiledStep, ibp.CapturedStep])
def test_parts_are_those_of_the_method(kind, recorded, graphs):
    model = network()
    method = ibp.LossIBP(0.3)
    step = kind(model, method, torch.optim.SGD(model.parameters(), lr=0.0))
    x, y, _ = next(batches(method))
    for _ in range(6):
        found, expected = step(x, y), method.parts(model, x, y)
        assert all(torch.allclose(a, b.detach(), atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_what_cannot_be_compiled_runs_eagerly_and_says_why(recorded):
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x if float(x.mean().detach()) > -9 else -x)

    model, method = Looks(), ibp.BP()
    twin = copy.deepcopy(model)
    data = [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), None) for _ in range(4)]
    with pytest.warns(UserWarning, match="trained by the eager step"):
        trained(ibp.CompiledStep, method, model, data=data)
    plain_loop(method, twin, data)
    same(model, twin, 0)


def test_a_gradient_that_is_off_is_not_used(monkeypatch):
    def wrong(graph):
        return lambda *batch: (lambda found: (found[0], {n: 2 * g for n, g in found[1].items()}))(graph(*batch))

    monkeypatch.setattr(compiled_step, "compiled", wrong)
    model, method = network(), ibp.LossIBP(0.3)
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"off by 1 of the largest entry"):
        trained(ibp.CompiledStep, method, model)
    plain_loop(method, twin)
    same(model, twin, 0)


def at_a_kink():
    """A model and a batch of which one sample lies where ReLUs turn, so that rounding moves its share of a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
    x = torch.tensor([[0.3, 0.3], *[[0.5 + 0.1 * i, 0.1] for i in range(11)]])
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]] * 4))
    return model, x, torch.tensor([0, 1] * 6)


@pytest.mark.parametrize("method", [ibp.BP(), ibp.LossIBP(0.3)])
@pytest.mark.parametrize("wrong", [1.0, 2.0])
def test_a_gradient_may_be_off_as_far_as_rounding_moves_the_eager_one(wrong, method, monkeypatch):
    def rounded(graph):
        def run(parameters, *batch):
            moved = parameters["0.weight"] + torch.tensor([1e-6, 0.0])
            parts, gradients = graph({**parameters, "0.weight": moved}, *batch)
            return parts, {n: wrong * g for n, g in gradients.items()}

        return run

    monkeypatch.setattr(compiled_step, "compiled", rounded)
    model, x, y = at_a_kink()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert ibp.CompiledStep(model, method, sgd(model)).prepare(x, y) is (wrong == 1.0)
    assert bool(said) is (wrong != 1.0)


def test_a_loss_that_is_off_is_not_used_however_rough_the_gradient_is(monkeypatch):
    def wrong(graph):
        def run(*batch):
            (loss, data_loss, *rest), gradients = graph(*batch)
            return (loss, 1.01 * data_loss, *rest), gradients

        return run

    monkeypatch.setattr(compiled_step, "compiled", wrong)
    model, x, y = at_a_kink()
    with pytest.warns(UserWarning, match="its forward pass is off by 0.01"):
        assert not ibp.CompiledStep(model, ibp.BP(), sgd(model)).prepare(x, y)


@pytest.mark.parametrize("fades", [True, False])
def test_where_rounding_turns_relus_the_means_of_some_steps_count(fades, monkeypatch):
    signs = itertools.cycle([1, -1] if fades else [1])

    def off(graph):
        def run(*batch):
            parts, gradients = graph(*batch)
            return parts, {n: (1 + 0.7 * sign) * g for sign in [next(signs)] for n, g in gradients.items()}

        return run

    monkeypatch.setattr(compiled_step, "compiled", off)
    model, x, y = at_a_kink()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert ibp.CompiledStep(model, ibp.LossIBP(0.3), sgd(model)).prepare(x, y) is fades
    assert bool(said) is not fades


def test_a_loss_that_is_off_is_seen_beside_running_statistics(monkeypatch):
    def wrong(graph):
        def run(*batch):
            (loss, data_loss, *rest), gradients = graph(*batch)
            return (loss, 1.001 * data_loss, *rest), gradients

        return run

    monkeypatch.setattr(compiled_step, "compiled", wrong)
    model, x, y = at_a_kink()
    model.append(nn.BatchNorm1d(2))
    with pytest.warns(UserWarning, match="its forward pass is off by 0.001"):
        assert not ibp.CompiledStep(model, ibp.BP(), sgd(model)).prepare(x, y)
    assert model[-1].num_batches_tracked == 0


def test_preparing_trains_nothing(recorded):
    model, method = network(True), ibp.LossIBP(0.3)
    before = copy.deepcopy(model.state_dict())
    step = ibp.CompiledStep(model, method, sgd(model))
    x, y, _ = next(batches(method))
    assert step.prepare(x, y)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    twin = copy.deepcopy(model)
    step(x, y)
    plain_loop(method, twin, [(x, y, None)])
    same(model, twin)


def test_preparing_again_compiles_nothing_until_the_method_is_another(monkeypatch):
    made, model = [], network()
    monkeypatch.setattr(compiled_step, "compiled", lambda graph: made.append(graph) or graph)
    step = ibp.CompiledStep(model, ibp.LossIBP(0.3), sgd(model))
    x, y, _ = next(batches(step.method))
    for method, count in ((step.method, 1), (ibp.LossIBP(0.1), 1), (ibp.LossIBP(0.1, norm=2), 2)):
        step.method = method
        assert step.prepare(x, y)
        assert len(made) == count


def test_a_compiled_step_looks_at_its_labels(recorded):
    model, method = network(), ibp.LossIBP(0.3)
    step, *_ = trained(ibp.CompiledStep, method, model, data=list(batches(method, [6] * 6)))
    x, y, _ = next(batches(method))
    with pytest.raises(ValueError, match="labels must lie in"):
        step(x, y + 3)
    with pytest.raises(ValueError, match="labels must have shape"):
        step(x, y[:, None])
    assert torch.isfinite(step(x, y.tolist()).loss)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_a_step():
    """About 20 s: inductor's C++ compiler runs for the gradient of Loss IBP."""
    model, method = network(True), ibp.LossIBP(0.3)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="CompiledStep")
        trained(ibp.CompiledStep, method, model)
    plain_loop(method, twin)
    same(model, twin)


def test_a_failed_capture_leaves_nothing_behind(graphs, monkeypatch):
    model, method = network(), ibp.BP()
    step = ibp.CapturedStep(model, method, sgd(model))
    data = list(batches(method, [6] * 6))
    for batch in data[:3]:
        step(*batch)
    monkeypatch.setattr(captured_step, "_capturing", lambda graph: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        step(*data[3])
    assert not step._made
    monkeypatch.setattr(captured_step, "_capturing", Recording)
    step(*data[4])
    assert step.captures == 1


def test_another_precision_is_captured_anew(graphs):
    """Set by torch's new names, which leave the old ones unreadable."""
    model, method = network(), ibp.BP()
    step = ibp.CapturedStep(model, method, sgd(model))
    data = list(batches(method, [6] * 6))
    for setting in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        before = setting.fp32_precision
        try:
            for value in ("ieee", "tf32"):
                setting.fp32_precision, captures = value, step.captures
                for batch in data:
                    step(*batch)
                assert step.captures == captures + 1
        finally:
            setting.fp32_precision = before


def test_what_cannot_be_captured_is_refused(graphs):
    model = network()
    with pytest.raises(ValueError, match="accumulate=1"):
        ibp.CapturedStep(model, ibp.BP(), sgd(model), accumulate=2)
    with pytest.raises(ValueError, match="clip_norm positive"):
        ibp.EagerStep(model, ibp.BP(), sgd(model), clip_norm=0.0)
    step = ibp.CapturedStep(model, ibp.TangentBP(0.1), sgd(model))
    x, y, tangents = next(batches(ibp.TangentBP(0.1)))
    for _ in range(5):
        step(x, y, tangents)
    with pytest.raises(ValueError, match="needs tangents"):
        step(x, y)
    with pytest.raises(ValueError, match="tangents must have shape"):
        step(x, y, tangents[:, :1])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("key", ["bp", "loss_ibp exact", "tbp", "criterion"])
def test_inside_a_compiled_function_the_loss_is_one_operator(key, normed):
    method, model = METHODS[key], network(normed)
    wrapped, twin = ibp.Network(model), copy.deepcopy(model)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def loss(x, y, tangents):
        return 2 * method(wrapped, x + 0, y, tangents)

    for x, y, tangents in batches(method, (6, 6)):
        found, expected = loss(x, y, tangents), 2 * method(twin, x, y, tangents)
        assert torch.equal(found, expected)
        for one, m in ((found, model), (expected, twin)):
            m.zero_grad()
            one.backward()
    assert sum("ibp_triton.loss" in target for target in seen) == 1
    same(model, twin, 0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)


def test_a_copy_is_another_object_to_the_operator():
    method, wrapped = ibp.LossIBP(0.3), ibp.Network(network())
    assert copy.deepcopy(method).number != method.number
    assert method.at(beta=0.1).number != method.number
    assert copy.deepcopy(wrapped).number != wrapped.number


def test_an_optimizer_of_another_model_is_refused():
    model = nn.Linear(3, 2)
    other = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)
    for kind in (ibp.EagerStep, ibp.CompiledStep):
        with pytest.raises(ValueError, match=f"{kind.__name__}: the optimizer has none of the model's parameters"):
            kind(model, ibp.BP(), other)
