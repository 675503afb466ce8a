"""Networks with norms on kernels: the gradients of torch's rules, and what is left to those rules."""

import pytest
import torch
from torch import nn

import ibp_triton as ibp
from ibp_triton.kernels.launcher import recording
from ibp_triton.kernels.norms import LARGEST
from tests.kernels.test_batching import METHODS as PAIRS
from tests.kernels.test_methods import TOLERANCE, errors


def mlp(norm):
    """A block as in a transformer, without attention, over sequences of three."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first, self.second = norm(), nn.Linear(10, 12), nn.Linear(12, 10)

        def forward(self, x):
            return x + self.second(torch.relu(self.first(self.norm(x))))

    return nn.Sequential(nn.Linear(5, 10), Block(), norm(), nn.Flatten(), nn.Linear(30, 10)), (3, 5)


def convolutional(norm):
    """A convolution with a norm, channels last, and one whose images come from a flat vector, channels first."""
    middle = [nn.Flatten(), nn.Linear(36, 48), nn.Unflatten(1, (3, 4, 4)), nn.GroupNorm(1, 3)]
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm(), nn.ReLU(), *middle, nn.Flatten(), nn.Linear(48, 10)), (2, 5, 5)


NETWORKS = {
    "layer norm": lambda: mlp(lambda: nn.LayerNorm(10)),
    "RMS norm": lambda: mlp(lambda: nn.RMSNorm(10)),
    "layer norm of two axes, without parameters": lambda: mlp(lambda: nn.LayerNorm((3, 10), elementwise_affine=False)),
    "group norm": lambda: convolutional(lambda: nn.GroupNorm(2, 4)),
    "instance norm": lambda: convolutional(lambda: nn.InstanceNorm2d(4, affine=True)),
}
METHODS = (ibp.BP(), ibp.LossIBP(0.3), ibp.TangentBP(0.3), ibp.LossIBP(0.3, semantics="exact"))
MORE = (*METHODS, ibp.TangentBP(0.3, semantics="exact"), ibp.PredictionIBP(0.3, semantics="exact"))
CASES = [
    *[(name, method) for name in ("layer norm", "group norm") for method in MORE],
    *[("RMS norm", method) for method in METHODS],
    *[(name, METHODS[-1]) for name in ("layer norm of two axes, without parameters", "instance norm")],
]


def setting(build):
    torch.manual_seed(5)
    model, shape = build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, torch.randn(3, *shape), torch.tensor([1, 7, 0]), torch.randn(5, 3, *shape)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_networks_have_the_gradients_of_torchs_rules(name, method):
    model, x, labels, tangents = setting(NETWORKS[name])
    tau = tangents if method.needs_tangents else None
    networks = [ibp.Network(model, backend=backend) for backend in ("triton", "torch")]
    (value, found), (expected_value, expected) = (method.gradients(n, x, labels, tau) for n in networks)
    assert errors(found, expected) < TOLERANCE
    torch.testing.assert_close(value, expected_value)


def rules(model, shape):
    """The rules of a model's layers by its summary."""
    lines = ibp.Network(model, backend="triton").summary(shape).splitlines()[1:-2]
    return [line.split()[-6] for line in lines]


def test_the_summary_names_them():
    kinds = {"layer norm": "TritonLayerNorm", "RMS norm": "TritonRMSNorm", "group norm": "TritonGroupNorm"}
    for name, kind in kinds.items():
        model, x, *_ = setting(NETWORKS[name])
        assert rules(model, x.shape).count(kind) == 2


def test_a_sweep_is_one_launch_and_gives_the_sums_too():
    """Loss IBP: forward, reverse with γ's and b's sums, linear sweep with γ's term, for each of two layer norms."""
    model, x, labels, _ = setting(NETWORKS["layer norm"])
    with recording() as launches:
        ibp.LossIBP(0.3).gradients(ibp.Network(model, backend="triton"), x, labels)
    assert [sum(one.name == name for one in launches) for name in ("normalise", "project", "bend")] == [2, 4, 0]
    with recording() as launches:
        ibp.BP().gradients(ibp.Network(model, backend="triton"), x, labels)
    assert [sum(one.name == name for one in launches) for name in ("normalise", "project", "bend")] == [2, 2, 0]


def test_beta_zero_is_bp_bit_for_bit():
    model, x, labels, tangents = setting(NETWORKS["group norm"])
    network = ibp.Network(model, backend="triton")
    _, plain = ibp.BP().gradients(network, x, labels)
    for method, tau in ((ibp.LossIBP(0.0), None), (ibp.TangentBP(0.0), tangents)):
        _, found = method.gradients(network, x, labels, tau)
        assert all(torch.equal(found[n], plain[n]) for n in plain)


@pytest.mark.parametrize("name", ["layer norm", "RMS norm", "group norm"])
def test_bfloat16_is_no_further_from_float64_than_torchs_rules(name):
    model, x, labels, _ = setting(NETWORKS[name])
    method, found = ibp.LossIBP(0.3, norm=2), {}
    for backend in ("triton", "torch"):
        network = ibp.Network(model, backend=backend, dtype=torch.bfloat16)
        _, found[backend] = method.gradients(network, x, labels)
    _, expected = method.gradients(ibp.Network(model.double(), backend="torch"), x.double(), labels)
    off = {backend: errors(gradients, expected) for backend, gradients in found.items()}
    assert all(g.dtype == torch.float32 for g in found["triton"].values())
    assert off["triton"] < max(1.5 * off["torch"], 0.02)


def test_what_is_left_to_torchs_rules():
    """Rows that are too long, running statistics, float64."""
    wide = nn.Sequential(nn.Flatten(), nn.LayerNorm(LARGEST + 1), nn.Linear(LARGEST + 1, 10))
    assert rules(wide, (2, 1, LARGEST + 1)) == ["Reshape", "LayerNorm", "TritonLinear"]
    tracked = nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten())
    assert "InstanceNorm" in rules(nn.Sequential(*tracked, nn.Linear(16, 10)), (2, 2, 4, 4))
    model, x, labels, _ = setting(NETWORKS["layer norm"])
    with recording() as launches:
        ibp.LossIBP(0.3).gradients(ibp.Network(model.double(), backend="triton"), x.double(), labels)
    assert launches == []


@pytest.mark.parametrize("method", [ibp.LossIBP(0.3, semantics="exact"), ibp.TangentBP(0.3)], ids=repr)
def test_rows_over_a_tile_and_inputs_with_gaps(method):
    """A group of 2 × 65 × 65 numbers, whose curvature is torch's; a permuted input is copied once."""

    class Permuted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer, self.last = nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.Linear(2, 10)

        def forward(self, x):
            x = self.norm(x.transpose(2, 3)).permute(0, 2, 3, 1)
            return self.last(self.layer(x).mean((1, 2)))

    torch.manual_seed(1)
    model, x, tangents = Permuted(), torch.randn(2, 2, 65, 65), torch.randn(2, 2, 2, 65, 65)
    tau, labels = tangents if method.needs_tangents else None, torch.tensor([3, 4])
    _, found = method.gradients(ibp.Network(model, backend="triton"), x, labels, tau)
    _, expected = method.gradients(ibp.Network(model.double(), backend="torch"), x.double(), labels,
                                   None if tau is None else tau.double())  # fmt: skip
    assert errors(found, expected) < 1e-3  # layer norms of two numbers lose digits


def test_frozen_parameters():
    model, x, labels, _ = setting(NETWORKS["layer norm"])
    model[1].norm.weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    networks = [ibp.Network(model, backend=backend) for backend in ("triton", "torch")]
    (_, found), (_, expected) = (ibp.LossIBP(0.3).gradients(n, x, labels) for n in networks)
    assert errors(found, expected) < TOLERANCE


@pytest.mark.parametrize("key", ["loss_ibp", "fast_tbp"])
def test_replicas_are_what_each_is_alone(key, monkeypatch):
    """The step holds both ways against one another, and warns, which is an error here, where they differ."""
    from ibp_triton import replicated_step

    monkeypatch.setattr(replicated_step, "CHECKED", 1)
    methods = PAIRS[key]
    models = [setting(NETWORKS[name])[0] for name in ["group norm"] * 2]
    replicas = ibp.ReplicatedNetwork(models, seeds=[0, 1], backend="triton")
    step = ibp.ReplicatedStep(replicas, methods, [torch.optim.SGD(m.parameters(), lr=0.1) for m in models])
    _, x, labels, tangents = setting(NETWORKS["group norm"])
    for _ in range(2):
        step(x, labels, tangents[:2] if methods[0].needs_tangents else None)
    assert [trial.count for trial in step._trials.values() if trial] == [1]
