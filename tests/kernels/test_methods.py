"""The seven methods through backend="triton" against the autograd oracle in float64, on both paper networks."""

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ibp_triton as ibp
from ibp_triton.backends.triton.kernel_head import KernelHead
from ibp_triton.kernels.launcher import recording
from ibp_triton.methods.passes import Pass

# float32 sweeps over a dozen layers, relative to the largest entry of the gradient
TOLERANCE = 2e-5
STRENGTH = 0.3

CASES = [("bp", {})]
CASES += [(key, {"epsilon": STRENGTH}) for key in ("at", "fast_at")]
CASES += [
    (key, {"beta": STRENGTH, "semantics": semantics})
    for key in ("loss_ibp", "prediction_ibp", "tbp", "fast_tbp")
    for semantics in ("paper", "exact")
]
CASES += [("loss_ibp", {"beta": STRENGTH, "norm": 2}), ("fast_tbp", {"beta": STRENGTH, "norm": 1.5})]


def block(channels, width, kernel, padding, margin):
    """Convolution, max-pool 3/2 rounding up, ReLU; `margin` as the paper's networks round odd maps up."""
    pad = [nn.ConstantPad2d((0, 1, 0, 1), -torch.inf)] if margin else []
    convolution = nn.Conv2d(channels, width, kernel, padding=padding)
    return [convolution, *pad, nn.MaxPool2d(3, 2, ceil_mode=True), nn.ReLU()]


def mnist(pixels=12):
    """The paper's first network, narrow, on 12×12 pixels (8×8 where the size of the maps does not matter)."""
    head = [nn.Flatten(), nn.Linear(6 * (pixels // 4) ** 2, 12), nn.ReLU(), nn.Linear(12, 10)]
    return nn.Sequential(*block(1, 4, 4, 0, True), *block(4, 6, 5, 2, True), *head), (1, pixels, pixels)


def cifar10():
    """The paper's second network, narrow, on 12×12 pixels of three channels."""
    convolutions = [*block(3, 4, 5, 0, False), *block(4, 5, 5, 2, False), *block(5, 6, 5, 2, False)]
    head = [nn.Flatten(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 10)]
    return nn.Sequential(*convolutions, *head), (3, 12, 12)


def residual():
    """A ReLU read twice, one behind a sum, a convolution of two groups, mean-pool, a stride: what does not fuse."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.third, self.head = nn.Conv2d(4, 5, 3, stride=2), nn.Linear(5, 10)

        def forward(self, x):
            u = torch.relu(self.first(x))
            u = torch.relu(u + self.second(u))
            u = torch.relu(self.third(u))
            return self.head(nn.functional.avg_pool2d(u, 2).flatten(1))

    return Residual(), (2, 6, 6)


def setting(build):
    torch.manual_seed(3)
    model, shape = build()
    x, labels, tangents = torch.randn(2, *shape), torch.tensor([1, 7]), torch.randn(5, 2, *shape)
    return model, x, labels, tangents


class Operators(TorchDispatchMode):
    """Collects the operators on numbers that are neither ours nor views nor allocations."""

    def __init__(self):
        super().__init__()
        self.others = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        view = func.is_view or func.namespace == "ibp_triton" or "empty" in str(func)
        if not view and any(isinstance(a, torch.Tensor) and a.is_floating_point() for a in args):
            self.others.add(str(func))
        return out


def errors(found, expected):
    largest = max(g.abs().max() for g in expected.values())
    assert set(found) == set(expected)
    assert largest > 0
    return max(float((found[n].double() - expected[n]).abs().max() / largest) for n in expected)


@cache
def plainly(build):
    """Gradients of BP on kernels and of the oracle, without a penalty: once for all methods."""
    model, x, labels, _ = setting(build)
    _, found = ibp.BP().gradients(ibp.Network(model, backend="triton"), x, labels)
    _, expected = ibp.reference.gradients(copy.deepcopy(model).double(), ibp.BP(), x.double(), labels)
    return found, expected


@pytest.mark.parametrize("build", [mnist, cifar10, residual])
@pytest.mark.parametrize(("key", "options"), CASES)
def test_against_the_oracle(key, options, build):
    model, x, labels, tangents = setting(build)
    method = ibp.METHODS[key](**options)
    tau = tangents if method.needs_tangents else None
    value, found = method.gradients(ibp.Network(model, backend="triton"), x, labels, tau)
    oracle = copy.deepcopy(model).double()
    tau = None if tau is None else tau.double()
    expected_value, expected = ibp.reference.gradients(oracle, method, x.double(), labels, tau)
    assert errors(found, expected) < TOLERANCE
    assert float(value) == pytest.approx(float(expected_value), rel=TOLERANCE)
    if method.parameter == "beta":  # the penalty's gradient alone
        plain, exact = plainly(build)
        penalty = {n: expected[n] - exact[n] for n in exact}
        share = max(g.abs().max() for g in penalty.values()) / max(g.abs().max() for g in expected.values())
        cancelled = 4 * torch.finfo(torch.float32).eps / float(share)  # what the subtraction leaves of a small penalty
        assert errors({n: found[n] - plain[n] for n in found}, penalty) < TOLERANCE + cancelled


class Tied(nn.Module):
    """A layer applied twice, and others beside it, whose weight gradients are split."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(6, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)

    def forward(self, x):
        return self.last(torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.first(x)))))))


@pytest.mark.parametrize("semantics", ["paper", "exact"])
def test_split_gradients_are_summed_together_unless_somebody_reads_one(semantics):
    torch.manual_seed(0)
    model, x, labels = Tied(), torch.randn(600, 6), torch.randint(2, (600,))
    method, network = ibp.LossIBP(0.1, semantics=semantics), ibp.Network(model, backend="triton")
    with recording() as launches:
        _, found = method.gradients(network, x, labels)
    _, expected = ibp.reference.gradients(copy.deepcopy(model).double(), method, x.double(), labels)
    assert errors(found, expected) < TOLERANCE
    names = [launch.name for launch in launches]
    assert names.count("combine_several") == 2  # where the tied weight's two are added, and at the end
    with Operators(), recording() as seen:  # whoever looks at operators gets each one's whole result
        _, looked_at = method.gradients(network, x, labels)
    assert "combine_several" not in [launch.name for launch in seen]
    assert errors(looked_at, expected) < TOLERANCE


@pytest.mark.parametrize("key", ["loss_ibp", "fast_at"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_small_penalty(key, dtype):
    """The penalty at the paper's β, from float32 gradients: within the rounding of the sweeps, not rounded away."""
    model, x, labels, _ = setting(mnist)
    network = ibp.Network(model, backend="triton", dtype=dtype)
    _, plain = ibp.BP().gradients(network, x, labels)
    assert all(g.dtype == torch.float32 for g in plain.values())
    if key == "fast_at":
        _, moved = ibp.FastAdversarialTraining(epsilon=0.0).gradients(network, x, labels)
        assert all(torch.equal(moved[n], plain[n]) for n in plain)
        return
    beta = 0.003
    _, found = ibp.LossIBP(beta).gradients(network, x, labels)
    oracle = copy.deepcopy(model).double()
    _, strong = ibp.reference.gradients(oracle, ibp.LossIBP(beta), x.double(), labels)
    _, none = ibp.reference.gradients(oracle, ibp.BP(), x.double(), labels)
    found = torch.cat([(found[n] - plain[n]).flatten() for n in found]).double()
    exact = torch.cat([(strong[n] - none[n]).flatten() for n in none])
    assert (found - exact).norm() / exact.norm() < 0.1  # signs of tiny derivatives flip in half precision


@pytest.mark.parametrize("key", ["loss_ibp", "at", "fast_tbp"])
def test_signs_of_small_derivatives_survive_float16(key, monkeypatch):
    """Samples of a loss around 1e-6: most of their derivatives are below what float16 can hold."""
    model, x, _, tangents = setting(lambda: mnist(8))
    with torch.no_grad():
        model[-1].bias[3] = 16
    labels, method = torch.tensor([3, 3]), ibp.METHODS[key](0.1)
    leaf, seeds = x.half().double().requires_grad_(), []
    losses = nn.functional.cross_entropy(copy.deepcopy(model).half().double()(leaf), labels, reduction="none")
    (exact,) = torch.autograd.grad(losses.sum(), leaf)
    fgsm, tangent = KernelHead.fgsm_step, Pass.tangent
    monkeypatch.setattr(KernelHead, "fgsm_step", lambda self, x, d, e: seeds.append(d) or fgsm(self, x, d, e))
    monkeypatch.setattr(Pass, "tangent", lambda self, seed: seeds.append(seed.tensor) or tangent(self, seed))
    network = ibp.Network(model, backend="triton", dtype=torch.float16)
    monkeypatch.setattr(network, "keeps_to_autograd", lambda own: False)
    method.gradients(network, x, labels, tangents if method.needs_tangents else None)
    if method.needs_tangents:
        slopes = torch.linalg.vecdot(tangents.half().double().flatten(2), exact.flatten(1))
        exact = (slopes.sign()[..., None, None, None] * tangents).sum(0)
    assert (seeds[0].double().sign() != exact.sign()).double().mean() < 0.02


def test_beta_zero_is_bp_bit_for_bit():
    model, x, labels, tangents = setting(lambda: mnist(8))
    network = ibp.Network(model, backend="triton")
    _, plain = ibp.BP().gradients(network, x, labels)
    for method in (ibp.LossIBP(0.0), ibp.PredictionIBP(0.0), ibp.TangentBP(0.0), ibp.FastTangentBP(0.0)):
        _, found = method.gradients(network, x, labels, tangents if method.needs_tangents else None)
        assert all(torch.equal(found[n], plain[n]) for n in plain), method


@pytest.mark.parametrize(
    "method",
    [
        ibp.LossIBP(STRENGTH),
        ibp.PredictionIBP(STRENGTH, semantics="exact"),
        ibp.FastAdversarialTraining(STRENGTH),
        ibp.FastTangentBP(STRENGTH),
    ],
)
def test_a_strength_on_the_device_is_read_by_the_kernels_alone(method, monkeypatch):
    model, x, labels, tangents = setting(lambda: mnist(8))
    network, tau = ibp.Network(model, backend="triton"), tangents if method.needs_tangents else None
    value, expected = method.gradients(network, x, labels, tau)
    with recording() as launches:
        method.gradients(network, x, labels, tau)
    on_device = method.at(**{method.parameter: torch.tensor(STRENGTH)})

    def read(*_):
        raise AssertionError("the CPU waits for a number of the device")

    monkeypatch.setattr(torch.Tensor, "__float__", read)
    monkeypatch.setattr(torch.Tensor, "item", read)
    with recording() as more:
        found_value, found = on_device.gradients(network, x, labels, tau)
    monkeypatch.undo()
    assert len(more) == len(launches)
    assert torch.equal(found_value, value)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_the_summary_names_the_rules():
    model, x, _, _ = setting(residual)
    summary = ibp.Network(model, backend="triton").summary(x.shape)
    rules = [line.split()[-6] for line in summary.splitlines()[1:-2]]
    assert rules.count("TritonConv2d") == 2
    assert rules.count("Conv2d") == 1  # two groups
    assert {"TritonReLU", "TritonAvgPool2d", "TritonLinear", "Add", "Reshape"} <= set(rules)


def test_the_paper_networks_run_on_kernels_alone():
    """Loss IBP is 21 launches before splits, and nothing but views between them."""
    model, x, labels, _ = setting(mnist)
    network = ibp.Network(model, backend="triton")
    ibp.LossIBP(0.1).gradients(network, x, labels)
    with recording() as launches, Operators() as operators:
        ibp.LossIBP(0.1).gradients(network, x, labels)
    assert len(launches) == 21
    assert operators.others == set()


def test_float64_and_odd_calls_keep_torch_rules():
    model, x, labels, _ = setting(mnist)
    network = ibp.Network(model.double(), backend="triton")
    assert not network.native
    with recording() as launches:
        ibp.BP().gradients(network, x.double(), labels)
    assert launches == []
    assert not ibp.Network(model.float()).native  # "auto", on a CPU


@pytest.mark.parametrize("key", ["loss_ibp", "tbp"])
def test_a_batch_of_one(key):
    """One sample has no stride to the next: torch gives it any, and none of them is read."""
    model, x, labels, tangents = setting(cifar10)
    x, labels, tangents = x[:1], labels[:1], tangents[:, :1]
    model, method = model.to(memory_format=torch.channels_last), ibp.METHODS[key](0.3)
    tau = tangents if method.needs_tangents else None
    _, found = method.gradients(ibp.Network(model, backend="triton"), x, labels, tau)
    _, expected = method.gradients(ibp.Network(model, backend="torch"), x, labels, tau)
    assert errors(found, expected) < TOLERANCE


@pytest.mark.parametrize("training", [True, False])
def test_dropouts_that_are_off_leave_the_kernels_in_place(training):
    """Such a call gives its argument back and is no node, in the lowered recording as in the plain one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.0 if training else 0.5), nn.ReLU(), nn.Linear(7, 10))
    x, labels = torch.randn(3, 5), torch.tensor([0, 4, 9])
    network = ibp.Network(model.train(training), backend="triton")
    for _ in range(2):
        with recording() as launches:
            _, found = ibp.LossIBP(0.3).gradients(network, x, labels)
        assert [launch.name for launch in launches].count("contract") == 5  # two layers there and back, one tangent
        _, expected = ibp.LossIBP(0.3).gradients(ibp.Network(model, backend="torch"), x, labels)
        assert errors(found, expected) < TOLERANCE
    model.train()[1].p = 0.5  # now it takes part
    torch.manual_seed(1)
    _, found = ibp.LossIBP(0.3).gradients(network, x, labels)
    torch.manual_seed(1)
    _, expected = ibp.LossIBP(0.3).gradients(ibp.Network(model, backend="torch"), x, labels)
    assert errors(found, expected) < TOLERANCE


def test_frozen_weights_and_missing_biases():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 10))
    model[2].weight.requires_grad_(False)
    x, labels = torch.randn(3, 5), torch.tensor([0, 4, 9])
    _, found = ibp.LossIBP(0.3).gradients(ibp.Network(model, backend="triton"), x, labels)
    _, expected = ibp.LossIBP(0.3).gradients(ibp.Network(model, backend="torch"), x, labels)
    assert errors(found, expected) < TOLERANCE


def test_sequences_of_features():
    """A linear layer over [N, S, F], with a batch over what one program adds up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Flatten(), nn.Linear(21, 10))
    x, labels = torch.randn(4, 3, 5), torch.tensor([0, 4, 9, 1])
    for method in (ibp.LossIBP(0.3), ibp.PredictionIBP(0.3), ibp.LossIBP(0.3, norm=3)):
        value, found = method.gradients(ibp.Network(model, backend="triton"), x, labels)
        expected_value, expected = method.gradients(ibp.Network(model, backend="torch"), x, labels)
        assert errors(found, expected) < TOLERANCE
        torch.testing.assert_close(value, expected_value)


def test_a_penalty_too_large_for_one_program(monkeypatch):
    from ibp_triton.backends.triton import kernel_head

    model, x, labels, _ = setting(mnist)
    network = ibp.Network(model, backend="triton")
    value, found = ibp.LossIBP(0.3).gradients(network, x, labels)
    monkeypatch.setattr(kernel_head, "ONE_PROGRAM", 1)
    other, again = ibp.LossIBP(0.3).gradients(network, x, labels)
    torch.testing.assert_close(value, other)
    assert all(torch.equal(found[n], again[n]) for n in found)


def test_training_through_backward():
    model, x, labels, _ = setting(mnist)
    twin = copy.deepcopy(model)
    for network in (ibp.Network(model, backend="triton"), ibp.Network(twin, backend="torch")):
        ibp.LossIBP(0.1)(network, x, labels).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [1, 2])
def test_a_step_by_parts(norm):
    """Loss and penalty on their own, as the trainer logs them: of a small batch the penalty is d_0 itself."""
    model, x, labels, _ = setting(mnist)
    twin, method = copy.deepcopy(model), ibp.LossIBP(0.1, norm=norm)
    found, expected = (
        ibp.EagerStep(network, method, torch.optim.SGD(network.model.parameters(), lr=0.1))(x, labels)
        for network in (ibp.Network(model, backend="triton"), ibp.Network(twin, backend="torch"))
    )
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.penalty, expected.penalty, rtol=1e-4, atol=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
