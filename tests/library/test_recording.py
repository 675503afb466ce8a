"""What recording must get right: modes, in-place operations, direct parameters, tuples, hooks, code of any kind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ibp_triton as ibp
from ibp_triton.backends.torch import generic
from tests.library.comparing import error, oracle, ours, variants
from tests.library.networks import build, evaluating, partly_branching, vgg


def check(model, shape=(4, 6), classes=5, methods=None, network=None):
    """Every method agrees with autograd on this model."""
    model.double()
    x, labels = torch.rand(3, *shape, dtype=torch.float64), torch.tensor([0, classes - 1, 1])
    tau = torch.randn(2, *x.shape, dtype=torch.float64)
    network = network or ibp.Network(model)
    for method in methods or variants(norms=(2,)):
        batch = (x, labels, tau if method.needs_tangents else None)
        assert error(ours(method, network, *batch)[1], oracle(method, model, *batch)[1]) < 1e-10, method
    return network


class Body(nn.Module):
    """x [N, 4, 6] → logits [N, 5] through a function given by the test."""

    def __init__(self, function):
        super().__init__()
        self.one, self.two, self.function = nn.Linear(6, 6), nn.Linear(6, 5), function
        self.gain, self.matrix = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return self.two(self.function(self, self.one(x))).mean(1)


def test_train_and_eval_after_construction_are_followed():
    torch.manual_seed(0)
    model = evaluating(vgg()).double()
    network = ibp.Network(model)
    x, labels = torch.rand(4, 1, 6, 6, dtype=torch.float64), torch.tensor([1, 2, 3, 4])
    for mode in (False, True, False):
        model.train(mode)
        state = {name: b.clone() for name, b in model.named_buffers()}
        found = ours(ibp.LossIBP(0.2), network, x, labels)[1]
        model.load_state_dict(state, strict=False)
        assert error(found, oracle(ibp.LossIBP(0.2), model, x, labels)[1]) < 1e-10


def iadd(m, x):
    y = m.one(x)
    y += x * m.gain
    return y


def div(m, x):
    y = m.one(x)
    y.div_(2)
    return torch.tanh(y)


def unused(m, x):
    F.relu(x, inplace=True)
    return x


def seen_elsewhere(m, x):
    y = x
    y.mul_(3)
    return x + y


def through_a_view(m, x):
    y = m.one(x)
    y.view(-1).mul_(2)
    return y


def item_assignment(m, x):
    y = m.one(x)
    y[:, 0] = 0
    return y


IN_PLACE = [iadd, div, unused, seen_elsewhere, through_a_view, item_assignment]


@pytest.mark.parametrize("function", IN_PLACE, ids=lambda f: f.__name__)
def test_in_place_operations(function):
    check(Body(function))


def test_in_place_activation_modules():
    check(
        nn.Sequential(
            nn.Flatten(), nn.Linear(24, 6), nn.SiLU(inplace=True), nn.Hardswish(inplace=True), nn.Linear(6, 5)
        )
    )


def test_the_input_itself_is_not_written_to():
    model = Body(lambda m, x: x)
    model.one = nn.Identity()
    model.function = lambda m, x: x.div_(2)
    x, labels = torch.rand(3, 4, 6), torch.tensor([0, 1, 2])
    before = x.clone()
    ibp.LossIBP(0.1).gradients(ibp.Network(model), x, labels)
    assert torch.equal(x, before)


DIRECT = {
    "scale": lambda m, x: x * m.gain,
    "functional linear": lambda m, x: F.linear(x, m.matrix, m.gain),
    "transformed weight": lambda m, x: F.linear(torch.tanh(x), m.matrix.tanh() / 2),
    "matmul": lambda m, x: torch.sigmoid(x @ m.matrix),
    "shared weight": lambda m, x: F.linear(F.relu(F.linear(x, m.matrix)), m.matrix.t()),
    "module twice": lambda m, x: m.one(torch.tanh(m.one(x))),
    "token": lambda m, x: torch.cat([m.gain.expand(x.shape[0], 1, -1), x], 1),
    "parameter only": lambda m, x: x + m.matrix.softmax(0)[:4],
    "pieces of a parameter": lambda m, x: x * m.gain.chunk(2)[1].repeat(2),
}


@pytest.mark.parametrize("name", DIRECT)
def test_parameters_used_directly(name):
    model = Body(DIRECT[name])
    found = ours(
        ibp.BP(), ibp.Network(model.double()), torch.rand(3, 4, 6, dtype=torch.float64), torch.tensor([0, 1, 2])
    )[1]
    used = "matrix" if "matrix" in DIRECT[name].__code__.co_names else "gain"
    assert name == "module twice" or found[used].abs().max() > 0
    check(model)


def unpacked(m, x):
    a, b = x.split(3, dim=-1)
    return torch.cat([b.tanh(), a], -1)


SEVERAL = {
    "attention": lambda m, x: torch.softmax(x @ x.transpose(-2, -1), -1) @ x,
    "product": lambda m, x: x * torch.sigmoid(m.one(x)),
    "chunk": lambda m, x: torch.cat([x.chunk(3, -1)[2].tanh(), *(2 * x.chunk(3, -1)[i] for i in (0, 1))], -1),
    "unpacking": unpacked,
    "getitem": lambda m, x: x[:, 1:3] - 2 * x[:, [0, 2]],
    "division": lambda m, x: x / (1 + x.square().sum(-1, keepdim=True)),
    "reflected": lambda m, x: 1 - x,
    "subtraction": lambda m, x: torch.sub(x, m.one(x), alpha=0.5),
    "constant": lambda m, x: x * torch.arange(6.0, dtype=torch.float64),
    "pad": lambda m, x: F.pad(x, (0, 0, 1, 1)),
    "pad with ones": lambda m, x: F.pad(x, (0, 0, 1, 1), value=1.0),
    "permutation": lambda m, x: x.permute(0, 2, 1).flip(1).transpose(1, 2),
    "detached": lambda m, x: x + x.detach().tanh(),
    "maximum": lambda m, x: x.max(dim=-1, keepdim=True)[0] + x,
    "attention, fused": lambda m, x: F.scaled_dot_product_attention(x, x, x * m.gain),
    "interpolated": lambda m, x: F.interpolate(x, scale_factor=2.0, mode="linear")[..., ::2],
}


@pytest.mark.parametrize("name", SEVERAL)
def test_functions_of_activations(name):
    check(Body(SEVERAL[name]))


def test_weight_normalised_layers_and_hooks_train():
    model = nn.Sequential(
        nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(24, 6)), nn.ReLU(), nn.Linear(6, 5)
    )
    calls = []
    model[3].register_forward_hook(lambda *_: calls.append(1))
    network = check(model)
    assert calls
    assert "parametrizations" not in network.summary()  # of weights: no sweep passes there


def test_rules_do_not_match_subclasses_that_change_forward():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    check(nn.Sequential(nn.Flatten(), Doubled(24, 6), nn.ReLU(), nn.Linear(6, 5)))


def test_code_that_branches_on_data_keeps_its_layers_rules():
    model, x, labels, _ = build("partly_branching")
    network = ibp.Network(model)
    ibp.LossIBP(0.1).gradients(network, x, labels)
    rows = [line.split() for line in network.summary().splitlines()]
    assert [row[0] for row in rows if "linear" in row] == ["1", "3.one", "3.two", "4"]


def test_no_grad_and_random_numbers_inside_forward_are_followed():
    def stopped(m, x):
        with torch.no_grad():
            scale = x.abs().mean()
        return x / (1 + scale)

    def noisy(m, x):
        return x + 0.1 * torch.rand(4, 6, dtype=torch.float64)

    check(Body(stopped))
    network = check(Body(noisy))
    x, labels = torch.rand(3, 4, 6, dtype=torch.float64), torch.tensor([0, 1, 2])
    losses = {float(ibp.BP().gradients(network, x, labels)[0]) for _ in range(3)}
    assert len(losses) == 3


def test_a_module_that_writes_to_its_input_is_followed_where_the_input_is_used_again():
    class Spoiler(nn.Module):
        def forward(self, x):
            if x.sum() > 1e9:
                return x
            return x.mul_(2)

    model = Body(lambda m, x: x + m.spoiler(x))
    model.spoiler = Spoiler()
    check(model)


@pytest.mark.parametrize("what", ["a constant", "indices", "a buffer", "an integer view", "a parameter's numbers"])
def test_what_a_layer_has_taken_stays_when_the_model_writes_to_it_afterwards(what):
    """Plain autograd refuses most of these, or is wrong: the gradient is that of the model which does not write."""

    def function(m, x):
        values, places = x.max(1, keepdim=True)
        c, z = torch.full((6,), 2.0, dtype=x.dtype), x.tanh()
        y = z.square() * c + values * F.linear(x, m.matrix) + x.gather(1, places) * m.scale
        if m.writes:
            with torch.no_grad():
                written = {
                    "a constant": lambda: c.zero_(),
                    "indices": lambda: places.zero_(),
                    "a buffer": lambda: m.scale.mul_(3),
                    "an integer view": lambda: z.view(torch.int64).zero_(),
                    "a parameter's numbers": lambda: m.matrix.data.mul_(2),
                }
                written[what]()
        return y

    model = Body(function).double()
    model.register_buffer("scale", torch.rand(6, dtype=torch.float64))
    start, network = {name: v.clone() for name, v in model.state_dict().items()}, ibp.Network(model)
    x, labels, tau = torch.rand(3, 4, 6).double(), torch.tensor([0, 4, 1]), torch.randn(2, 3, 4, 6).double()
    on_tape = (ibp.BP, ibp.AdversarialTraining, ibp.FastAdversarialTraining)
    for method in (method for method in variants(norms=(2,)) if not isinstance(method, on_tape)):
        found = []
        for model.writes in (False, True):
            model.load_state_dict(start)
            found.append(method.gradients(network, x, labels, tau if method.needs_tangents else None)[1])
        assert error(*found) < 1e-12, method


def test_batch_statistics_and_masks_belong_to_the_step():
    model, x, labels, tau = build("vgg_train")
    network = ibp.Network(model)
    start = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(0)
    model(x)
    expected, after = {name: b.clone() for name, b in model.named_buffers()}, torch.get_rng_state()
    for method in variants(norms=(1,)):
        model.load_state_dict(start, strict=False)
        torch.manual_seed(0)
        method.gradients(network, x, labels, tau if method.needs_tangents else None)
        assert all(torch.equal(b, expected[name]) for name, b in model.named_buffers()), method
        assert torch.equal(torch.get_rng_state(), after), method  # one mask a step


@pytest.mark.parametrize("change", ["writes to x", "asks for a graph"])
def test_a_recording_begun_again_at_a_later_step_moves_statistics_and_generator_once(change):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.last, self.changed = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3), False

        def forward(self, x):
            h = self.norm(self.drop(x))
            if self.changed and change == "writes to x":
                h = h + x.mul_(2)
            elif self.changed:
                h = h + torch.autograd.grad(h.square().sum(), h, create_graph=True)[0]
            return self.last(h)

    model = Changing().double()
    network, x, labels = ibp.Network(model), torch.rand(8, 4, dtype=torch.float64), torch.arange(8) % 3
    for model.changed in (False, True, False):
        torch.manual_seed(0)
        loss, before = ibp.LossIBP(1).parts(network, x, labels).data_loss, model.norm.running_mean.clone()
        assert int(model.norm.num_batches_tracked) == 1
        model.norm.reset_running_stats()
        torch.manual_seed(0)
        assert torch.allclose(F.cross_entropy(model(x.clone()), labels), loss, rtol=1e-12)
        assert torch.allclose(model.norm.running_mean, before, rtol=1e-12)
        model.norm.reset_running_stats()


def test_frozen_parameters_get_no_gradient_and_cost_none():
    model, x, labels, _ = build("paper_mnist")
    network, shape = ibp.Network(model), [3, 1, 28, 28]
    full = network.multiply_adds(shape)
    expected = ibp.LossIBP(0.3).gradients(network, x, labels)[1]
    for p in list(model.parameters())[:4]:
        p.requires_grad_(False)
    found = ibp.LossIBP(0.3).gradients(network, x, labels)[1]
    assert set(found) == {"7.weight", "7.bias", "9.weight", "9.bias"}
    assert all(torch.equal(found[k], expected[k]) for k in found)
    less = network.multiply_adds(shape)
    convolutions = 3 * (25 * 25 * 4 * 16 + 12 * 12 * 8 * 4 * 25)
    assert full.weights - less.weights == convolutions
    assert less.vjp_inner == 3 * 16 * 10  # only the last layer passes its derivative on


def test_lstm_and_transformer_encoder_layers_are_taken_whole():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = (
                nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.1),
                nn.Linear(6, 5),
            )

        def forward(self, x):
            return self.head(self.encoder(x).mean(1))

    check(Sequence(), methods=[ibp.BP(), ibp.LossIBP(0.3, 2), ibp.LossIBP(0.3, 2, "exact"), ibp.TangentBP(0.3, 2)])


WRONG = {
    "two inputs": (
        type("Two", (nn.Module,), {"forward": lambda self, x, y: x + y}),
        r"missing a required argument: 'y'; pass its other inputs as extra",
    ),
    "two tensors": (
        type("Pair", (nn.Module,), {"forward": lambda self, x: (x, x)}),
        r"one tensor of logits.*output=….*one of 0, 1",
    ),
    "a dictionary of others": (
        type("Dict", (nn.Module,), {"forward": lambda self, x: {"a": x, "n": 3}}),
        r"output=….*one of 'a'",
    ),
    "nothing to differentiate": (
        type("Still", (nn.Module,), {"forward": lambda self, x: x.detach()}),
        r"neither on x nor on a parameter",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_models_with_another_interface_are_refused(name):
    kind, message = WRONG[name]
    model = kind()
    model.p = nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match=message):
        ibp.BP().gradients(ibp.Network(model), torch.rand(2, 3), torch.tensor([0, 1]))


def test_what_network_refuses_names_the_cure():
    model = partly_branching()
    with pytest.raises(TypeError, match=r"wrapper.*forward\(x, labels\)"):
        ibp.Network(nn.DataParallel(model))
    with pytest.raises(TypeError, match=r"torch.compile"):
        ibp.Network(torch.compile(model))
    with pytest.raises(TypeError, match=r"nn.Module, not function"):
        ibp.Network(build)
    with pytest.raises(ValueError, match="'auto', 'torch' or 'triton'"):
        ibp.Network(model, backend="cuda")
    with pytest.raises(ValueError, match="floating-point"):
        ibp.Network(model, dtype=torch.int8)


class Branching(nn.Module):
    """One of two branches, by torch's operator for it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.cond(x.sum() > 0, lambda u: self.first(u).tanh(), lambda u: self.first(u).sin(), (x,)))


def test_control_flow_by_operators_is_refused_where_layers_are_followed():
    model, x, labels = Branching(), torch.rand(2, 3), torch.tensor([0, 1])
    ibp.BP().gradients(model, x, labels)
    with pytest.raises(TypeError, match=r"write them in Python \(if, while, for\)"):
        ibp.LossIBP(0.1).gradients(model, x, labels)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


def test_a_layer_taken_whole_gives_tangent_and_gradient_by_one_walk(monkeypatch):
    """Of a recurrent layer each walk with a graph costs more than all of backpropagation."""
    torch.manual_seed(0)
    model, x, labels = Recurrent().double(), torch.randn(3, 7, 6, dtype=torch.float64), torch.tensor([0, 3, 1])
    network, method, walks = ibp.Network(model), ibp.LossIBP(0.3, 2), []
    plain = generic._grad

    def counted(*args, create_graph=False):
        walks.append(create_graph)
        return plain(*args, create_graph=create_graph)

    expected = oracle(method, model, x, labels)[1]
    monkeypatch.setattr(generic, "_grad", counted)
    for _ in range(2):
        walks.clear()
        assert error(method.gradients(network, x, labels)[1], expected) < 1e-10
    assert walks == [False, True]  # the reverse sweep's; torch's second derivative was checked at the first step
