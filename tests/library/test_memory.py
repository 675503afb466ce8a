"""What steps of Loss IBP and Adversarial Training hold at their peak, and what sweeps let go of and make anew."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ibp_triton as ibp
from ibp_triton import sweeps
from ibp_triton.bench import by_hand, candidates, measure
from ibp_triton.layer import Bilinear, compact
from ibp_triton.sweeps import Linear, Reverse, g, weight_gradients
from tests.library.comparing import error, oracle, ours, variants

PEAKS = {"vit": 1.5, "mixer": 1.55, "text_transformer": 1.6, "densenet_bc": 1.6, "convnext": 1.55, "mobilenet_v2": 1.4}


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_loss_ibp_is_at_most_1_6_of_bps(name):
    case = candidates.Case(name, 16, "fp32")
    ours, plain = candidates.ours(case, "loss_ibp"), by_hand.autograd(case, "bp")
    assert measure.peak_memory(ours) < PEAKS[name] * measure.peak_memory(plain)


@pytest.mark.parametrize(("name", "times"), [("mlp", 1.25), ("resnet18", 1.0)])
def test_adversarial_training_holds_two_gradients_and_no_third(name, times):
    case = candidates.Case(name, 16, "fp32")
    ours, plain = candidates.ours(case, "at"), by_hand.autograd(case, "at")
    assert measure.peak_memory(ours) < times * measure.peak_memory(plain)


class Block(nn.Module):
    """Linear layers and attention behind norms, GELU between, views between some of them."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.attend, self.down = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(5, 5)
        self.wide, self.narrow, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)
        self.twice = nn.Linear(8, 8)

    def forward(self, x):
        y = self.norms[0](x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        x = x + self.down(self.norms[1](x).transpose(1, 2)).transpose(1, 2)
        z = self.norms[2](x)
        z = F.gelu(self.wide(z), approximate="tanh") + F.gelu(self.wide(z))
        return self.head(x + self.twice(F.gelu(self.narrow(F.gelu(z)))).flatten(1).view(x.shape)).mean(1)


def test_gradients_from_numbers_made_anew_are_the_oracles():
    torch.manual_seed(0)
    model, x, labels = Block().double(), torch.randn(3, 5, 8, dtype=torch.float64), torch.arange(3)
    network = ibp.Network(model)
    for method in (ibp.LossIBP(0.3), ibp.LossIBP(0.3, 2), ibp.PredictionIBP(0.3), ibp.JacobianRegularisation(0.3)):
        expected = oracle(method, model, x, labels)[1]
        assert error(ours(method, network, x, labels)[1], expected) < 1e-12, method


@pytest.mark.parametrize("lean", [False, True])
def test_a_reverse_sweep_lets_go_of_what_can_be_made_anew(lean):
    torch.manual_seed(0)
    model, x = Block(), torch.randn(3, 5, 8)
    network = ibp.Network(model)
    whole, trace = (network.forward(x, {}, frugal=frugal, keep=False) for frugal in (False, True))
    trace.lean, kept = lean, [getattr(layer, "input", None) for layer in whole.layers]
    d = Reverse(trace, torch.ones_like(trace.logits), to_input=True).run()
    spared = {
        node.where: layer.input
        for node, layer in zip(trace.graph.nodes, trace.layers, strict=True)
        if isinstance(layer, Bilinear) and layer.source is not None
    }
    assert set(spared) == {"down"} | ({"narrow", "twice"} if lean else set())  # `wide` shares its input with another
    assert all(input.untyped_storage().nbytes() == 4 for input in spared.values())
    for layer, input in zip(trace.layers, kept, strict=True):
        if isinstance(layer, Bilinear):
            torch.testing.assert_close(layer.left, input)
    other = Reverse(whole, torch.ones_like(trace.logits), to_input=True).run()
    expected = weight_gradients([g(Linear(whole, x, to_output=False), other)], 3)
    assert error(weight_gradients([g(Linear(trace, x, to_output=False), d)], 3), expected) < 1e-5


class Normed(nn.Module):
    """Convolutions behind batch norms and ReLUs, one of them through a view, one with a second reader, one in place."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(6, affine=i != 1) for i in range(5))
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(4))
        self.first, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 36, 4)

    def forward(self, x):
        x = self.first(x)
        x = x + self.convs[0](F.relu(self.norms[0](x)))
        x = x + self.convs[1](F.relu(self.norms[1](x), inplace=True).relu())
        y = F.relu(self.norms[2](x))
        x = y + self.convs[2](y)
        x = self.convs[3](self.norms[3](x))
        return self.head(F.relu(self.norms[4](x)).flatten(1))


@pytest.mark.parametrize("method", variants((2,)), ids=str)
def test_large_maps_behind_batch_norms_are_made_anew_and_gradients_keep_their_bits(method, monkeypatch):
    torch.manual_seed(0)
    model, x, labels = Normed().double(), torch.randn(5, 3, 6, 6, dtype=torch.float64), torch.arange(5) % 4
    tangents = torch.randn(2, *x.shape, dtype=x.dtype) if method.needs_tangents else None
    found = []
    for large in (1 << 30, 0):
        monkeypatch.setattr(sweeps, "LARGE", large)
        own = copy.deepcopy(model)
        parts = method.gradients(ibp.Network(own), x, labels, tangents)
        found.append((parts[1], dict(own.named_buffers())))
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_batch_norms_make_anew_is_let_go_of(monkeypatch):
    case = candidates.Case("wide_resnet", 4, "fp32")
    peaks = []
    for large in (1 << 30, 0):
        monkeypatch.setattr(sweeps, "LARGE", large)
        peaks.append(measure.peak_memory(candidates.ours(case, "loss_ibp")))
    plain = measure.peak_memory(by_hand.autograd(case, "bp"))
    assert peaks[1] < 0.9 * peaks[0], [peak / plain for peak in peaks]


def test_a_small_part_of_much_memory_is_copied():
    x = torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last)
    few, many = x[:, :2], x[:, :4]
    assert compact(many) is many
    assert torch.equal(compact(few), few)
    assert compact(few).untyped_storage().nbytes() == 4 * few.numel()
    assert compact(few).is_contiguous(memory_format=torch.channels_last)
    some = torch.zeros(()).expand(3, 3)
    assert compact(some) is some
