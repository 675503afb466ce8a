"""Networks with GELU and SiLU behind linear layers: the gradients of torch's rules, and what is left to those rules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ibp_triton as ibp
from ibp_triton.backends.triton.activation_rules import TritonActivation
from ibp_triton.errors import MethodError
from ibp_triton.harness.step_counts import Operators
from ibp_triton.kernels.launcher import recording
from tests.kernels.test_batching import METHODS as PAIRS
from tests.kernels.test_methods import TOLERANCE, errors

ACTIVATIONS = {"gelu": nn.GELU, "tanh": lambda: nn.GELU("tanh"), "silu": nn.SiLU}


class Block(nn.Module):
    """An MLP block of a transformer, over sequences; ``behind`` stands between activation and second layer."""

    def __init__(self, activation, behind=nn.Identity):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(10), nn.Linear(10, 13), nn.Linear(13, 10)
        self.activation, self.behind = activation(), behind()

    def forward(self, x):
        return x + self.second(self.behind(self.activation(self.first(self.norm(x)))))


def transformer(activation, behind=nn.Identity):
    return nn.Sequential(nn.Linear(5, 10), Block(activation, behind), nn.Flatten(), nn.Linear(30, 10)), (3, 5)


def mlp(activation):
    """Two hidden layers, the second without a bias, and one behind a ReLU."""
    layers = [nn.Linear(7, 12), activation(), nn.Linear(12, 9, bias=False), activation(), nn.Linear(9, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 10)), (7,)


METHODS = (
    ibp.BP(),
    ibp.LossIBP(0.3),
    ibp.LossIBP(0.3, 2),
    ibp.TangentBP(0.3),
    ibp.PredictionIBP(0.3),
    ibp.FastAdversarialTraining(0.1),
    ibp.LossIBP(0.3, 2, "exact"),
    ibp.TangentBP(0.3, 2, "exact"),
)


def setting(build, samples=2, tangents=5):
    torch.manual_seed(5)
    model, shape = build()
    labels = torch.tensor([1, 7, 0, 3])[:samples]
    return model, torch.randn(samples, *shape), labels, torch.randn(tangents, samples, *shape)


def agrees(model, method, x, labels, tangents):
    """The value and the gradients are those of torch's rules; the launches."""
    tau = tangents if method.needs_tangents else None
    with recording() as launches:
        value, found = method.gradients(ibp.Network(model, backend="triton"), x, labels, tau)
    expected_value, expected = method.gradients(ibp.Network(model, backend="torch"), x, labels, tau)
    assert errors(found, expected) < TOLERANCE
    torch.testing.assert_close(value, expected_value)
    return launches


def fused(launches):
    """How many launches store slopes, and how many multiply by them."""
    asked = [launch.arguments for launch in launches if launch.name in ("contract", "combine")]
    return sum(a["ACTIVATION"] > 0 for a in asked), sum(a["FACTOR"] for a in asked)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_networks_have_the_gradients_of_torchs_rules(name, method):
    """Each activation twice in an MLP; with curvature, which is a launch each, sweeps run by torch's rules."""
    launches = agrees(*(s := setting(lambda: mlp(ACTIVATIONS[name])))[:1], method, *s[1:])
    exact = getattr(method, "semantics", "paper") == "exact"
    stores, multiplies = fused(launches)
    assert sum(launch.name == "curve" for launch in launches) == 2 * exact
    assert (stores == 0) == exact
    assert (multiplies == 0) == exact


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("method", [METHODS[1], METHODS[3]], ids=repr)
def test_blocks_of_one_sample_and_of_odd_sizes(method, samples):
    for tangents in (1, 5):
        model, *rest = setting(lambda: transformer(nn.GELU), samples, tangents)
        launches = agrees(model, method, *rest)
        assert fused(launches) == (1, 2 if method is METHODS[1] else 3)


def test_nothing_runs_between_the_kernels_of_an_mlp():
    """As many launches as with ReLUs, and no operator of torch's."""
    counts = []
    for activation in (nn.GELU, nn.ReLU):
        model, x, labels, _ = setting(lambda activation=activation: mlp(activation))
        network = ibp.Network(model, backend="triton")
        METHODS[1].gradients(network, x, labels)
        with recording() as launches, Operators() as others:
            METHODS[1].gradients(network, x, labels)
        assert others.names == []
        counts.append(len(launches))
    assert counts[0] == counts[1]


class Custom(nn.Module):
    """``way`` goes from x to logits through two layers."""

    def __init__(self, way, hidden=9):
        super().__init__()
        self.way, self.first, self.second = way, nn.Linear(7, hidden), nn.Linear(9, 10)
        self.seen = []

    def forward(self, x):
        return self.way(self, x)


def twice_read(self, x):
    z = self.first(x)
    return self.second(F.gelu(z) + 0.1 * z)


def looked_at(self, x):
    z = self.first(x)
    self.seen.append(z.detach().clone())
    return self.second(F.gelu(z))


def returned(self, x):
    z = self.first(x)
    self.seen.append(F.gelu(z))
    return z


def written_before(self, x):
    z = self.first(x)
    view = z[:, :4]
    view.mul_(2)
    return self.second(F.silu(z))


def written_through_a_view(self, x):
    z = self.first(x)
    first = z[:, :4]
    y = F.silu(z, inplace=True)
    return self.second(y) + first.sum(1, keepdim=True)


def turned(self, x):
    return self.second(F.gelu(self.first(x).unsqueeze(1).expand(-1, 2, -1).transpose(1, 2)).sum(2))


def other_curve(self, x):
    return self.second(F.mish(self.first(x)) + F.softplus(self.first(x)))


def by_hand(self, x):
    z = self.first(x)
    return self.second(z * torch.sigmoid(1.702 * z))


def without_a_layer(self, x):
    return self.second(self.first(F.gelu(x)))


LEFT = (
    twice_read, looked_at, returned, written_before, written_through_a_view, turned, other_curve, by_hand,
    without_a_layer,
)  # fmt: skip


@pytest.mark.parametrize("method", [METHODS[1], METHODS[3]], ids=repr)
@pytest.mark.parametrize("way", LEFT)
def test_what_is_left_to_torchs_rules(way, method):
    """Whatever else reads z, or shows it, or makes it another tensor; and other functions."""
    model, *rest = setting(lambda: (Custom(way, 10 if way is returned else 9), (7,)))
    if way is returned:
        model.second.requires_grad_(False)
    assert fused(agrees(model, method, *rest)) == (0, 0)
    for z in model.seen[-2:]:  # by kernels, and by torch's rules
        torch.testing.assert_close(z, F.gelu(model.first(rest[0])) if way is returned else model.first(rest[0]))


def in_place(self, x):
    return self.second(F.silu(self.first(x), inplace=True))


def two_readers(self, x):
    y = F.gelu(self.first(x))
    return self.second(y) + y.sum(1, keepdim=True)


def scaled(self, x):
    return self.second(3 * F.gelu(self.first(x)))


def written_behind(self, x):
    y = F.gelu(self.first(x))
    y.mul_(2)
    return self.second(y)


def at_the_end(self, x):
    return F.gelu(self.first(x))


# how many launches store slopes and multiply by them in a step of Loss IBP: where the reverse multiplies at the
# activation itself it is an operator of torch's, and nothing asks the last trainable layer for its tangent
PARTLY = {in_place: (1, 2), two_readers: (1, 1), scaled: (1, 1), written_behind: (1, 1), at_the_end: (1, 0)}


@pytest.mark.parametrize("way", PARTLY)
def test_slopes_where_others_read_the_activation(way):
    model, *rest = setting(lambda: (Custom(way, 10 if way is at_the_end else 9), (7,)))
    if way is at_the_end:
        model.second.requires_grad_(False)
    assert fused(agrees(model, METHODS[1], *rest)) == PARTLY[way]
    agrees(model, METHODS[3], *rest)


def test_curvature_of_inputs_that_lie_otherwise():
    """Channels last, behind a convolution: by torch's formulas."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(36, 10))
    launches = agrees(model, METHODS[6], torch.randn(2, 2, 5, 5), torch.tensor([1, 7]), None)
    assert all(launch.name != "curve" for launch in launches)


def test_float64_and_other_layers_keep_torchs_rules():
    model, x, labels, tangents = setting(lambda: mlp(nn.GELU))
    assert agrees(model.double(), METHODS[1], x.double(), labels, tangents) == []
    convolution = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(36, 10))
    assert fused(agrees(convolution, METHODS[1], torch.randn(2, 2, 5, 5), labels, None)) == (0, 0)


def test_hooks_see_the_layers_own_numbers():
    """A forward hook z, a backward hook the derivative of z: nothing is fused there."""
    found = []
    for backend in ("triton", "torch"):
        model, x, labels, _ = setting(lambda: (nn.Sequential(nn.Linear(7, 7), *mlp(nn.GELU)[0]), (7,)))
        seen = {}
        model[1].register_full_backward_hook(lambda _, __, d, seen=seen: seen.update(d=d[0].clone()))
        model[3].register_forward_hook(lambda _, __, z, seen=seen: seen.update(z=z.detach().clone()))
        with recording() as launches:
            METHODS[1].gradients(ibp.Network(model, backend=backend), x, labels)
        assert fused(launches) == (0, 0)
        found.append(seen)
    for name in ("d", "z"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
@pytest.mark.parametrize("late", [False, True])
def test_tensors_that_somebody_holds_are_the_layers_own(activation, late):
    """A hook that only keeps z, from the first step or from a later one: no function of torch's sees it."""
    model, x, labels, _ = setting(lambda: mlp(activation))
    network, held, counts = ibp.Network(model, backend="triton"), [], []
    for step in range(3):
        if step == late:
            model[2].register_forward_hook(lambda _, __, z: held.append(z))
        with recording() as launches:
            METHODS[1].gradients(network, x, labels)
        counts.append(fused(launches)[0])
    found = held[-1]  # what follows calls the hook again
    torch.testing.assert_close(found, model[2](activation()(model[0](x))), rtol=1e-5, atol=1e-6)
    assert found.min() < -0.2  # neither of the activations' values
    if activation is nn.GELU:
        assert counts[-1] == 1  # the other layer's


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_dropouts_behind_an_activation(p):
    """The layer behind it multiplies by the slope, since the mask's product commutes with it."""
    model, x, labels, tangents = setting(lambda: transformer(nn.GELU, lambda: nn.Dropout(p)))
    for method in (METHODS[1], METHODS[3]):
        gradients, tau = [], tangents if method.needs_tangents else None
        for backend in ("triton", "torch"):
            network = ibp.Network(model.train(), backend=backend)
            torch.manual_seed(3)
            with recording() as launches:
                gradients.append(method.gradients(network, x, labels, tau)[1])
            if backend == "triton":
                assert fused(launches) == (1, 2 if method is METHODS[1] else 3)
        assert errors(*gradients) < TOLERANCE


def test_passes_with_and_without_curvature_in_turn():
    model, x, labels, _ = setting(lambda: mlp(nn.SiLU))
    ours, theirs = (ibp.Network(model, backend=backend) for backend in ("triton", "torch"))
    for method, stores in ((METHODS[1], 2), (METHODS[6], 0), (METHODS[1], 2), (METHODS[0], 2), (METHODS[6], 0)):
        with recording() as launches:
            _, found = method.gradients(ours, x, labels)
        assert fused(launches)[0] == stores
        assert errors(found, method.gradients(theirs, x, labels)[1]) < TOLERANCE


def test_curvature_of_a_pass_without_it_is_refused():
    model, x, *_ = setting(lambda: mlp(nn.GELU))
    network = ibp.Network(model, backend="triton")
    for frugal in (True, False):
        layers = network.forward(x, {}, frugal=frugal).layers
        fusions = [layer for layer in layers if isinstance(layer, TritonActivation)]
        assert len(fusions) == (2 if frugal else 0)
        for layer in fusions:
            with pytest.raises(MethodError, match="recorded without it"):
                layer.curvature(x, {"input": x}, ("input",))


def test_frozen_layers():
    model, x, labels, tangents = setting(lambda: mlp(nn.GELU))
    for frozen in (0, 2):
        model.requires_grad_(True)
        model[frozen].requires_grad_(False)
        agrees(model, METHODS[1], x, labels, tangents)
        agrees(model, METHODS[3], x, labels, tangents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_float64_than_torchs_rules(dtype):
    model, x, labels, _ = setting(lambda: transformer(nn.GELU))
    method, found = ibp.LossIBP(0.3, norm=2), {}
    for backend in ("triton", "torch"):
        _, found[backend] = method.gradients(ibp.Network(model, backend=backend, dtype=dtype), x, labels)
    _, expected = method.gradients(ibp.Network(model.double(), backend="torch"), x.double(), labels)
    off = {backend: errors(gradients, expected) for backend, gradients in found.items()}
    assert all(g.dtype == torch.float32 for g in found["triton"].values())
    assert off["triton"] < max(1.5 * off["torch"], 0.02)


@pytest.mark.parametrize("key", ["loss_ibp", "one beta"])
def test_replicas_are_what_each_is_alone(key, monkeypatch):
    """The step holds both ways against one another, and warns, which is an error here, where they differ."""
    from ibp_triton import replicated_step

    monkeypatch.setattr(replicated_step, "CHECKED", 1)
    methods = PAIRS[key]
    models = [setting(lambda: mlp(nn.GELU))[0] for _ in range(2)]
    replicas = ibp.ReplicatedNetwork(models, seeds=[0, 1], backend="triton")
    step = ibp.ReplicatedStep(replicas, methods, [torch.optim.SGD(m.parameters(), lr=0.1) for m in models])
    _, x, labels, tangents = setting(lambda: mlp(nn.GELU))
    for _ in range(2):
        step(x, labels, tangents[:2] if methods[0].needs_tangents else None)
    assert [trial.count for trial in step._trials.values() if trial] == [1]
