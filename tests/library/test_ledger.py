"""What a step costs: multiply-adds of the paper's networks, counted by hand, and the ratios predicted from them."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ibp_triton as ibp
from tests.library.networks import build

CONV1, CONV2, FC1, FC2 = 25 * 25 * 4 * 16, 12 * 12 * 8 * 4 * 25, 8 * 36 * 16, 16 * 10
ALL = CONV1 + CONV2 + FC1 + FC2
SHAPE = [32, 1, 28, 28]


@pytest.fixture
def network():
    return ibp.Network(build("paper_mnist")[0])


def test_multiply_adds_of_the_paper_network(network):
    work = network.multiply_adds(SHAPE)
    assert work.forward == work.vjp == work.jvp == work.weights == 32 * ALL
    assert work.vjp_inner == 32 * (ALL - CONV1)
    assert work.jvp_inner == 32 * (ALL - FC2)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("settings", [{"padding": "same"}, {"padding": (2, 0), "stride": (1, 2), "dilation": (1, 2)}])
def test_multiply_adds_of_convolutions_are_torchs(settings):
    layer, x = torch.nn.Conv2d(4, 6, (4, 3), **settings), torch.zeros(2, 4, 7, 9)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    network = ibp.Network(torch.nn.Sequential(layer, torch.nn.Flatten()))
    assert 2 * network.multiply_adds(x.shape).forward == counter.get_total_flops()


def test_multiply_adds_of_what_has_no_rule_of_its_own():
    class Chain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)

        def forward(self, x):
            return torch.einsum("ni,ji,mj->nm", x, self.first.weight, self.second.weight)

    network = ibp.Network(Chain())
    assert network.multiply_adds([2, 4]).forward == 2 * 4 * 5 + 2 * 5 * 3
    assert "generic" in network.summary([2, 4])


def test_predicted_ratios_count_the_first_layer(network):
    bp = 3 * ALL - CONV1
    assert ibp.LossIBP(0.1).predicted_ratio(network, SHAPE) == pytest.approx((4 * ALL - FC2) / bp)
    assert ibp.FastAdversarialTraining(0.1).predicted_ratio(network, SHAPE) == pytest.approx((5 * ALL - CONV1) / bp)
    assert ibp.AdversarialTraining(0.1).predicted_ratio(network, SHAPE) == pytest.approx((6 * ALL - CONV1) / bp)
    assert ibp.TangentBP(0.1).predicted_ratio(network, SHAPE) == pytest.approx(6)
    assert ibp.FastTangentBP(0.1).predicted_ratio(network, SHAPE) == pytest.approx((4 * ALL - FC2) / bp)
    assert ibp.BP().predicted_ratio(network, SHAPE) == 1


@pytest.mark.parametrize(
    ("method", "sweeps"),
    [
        (ibp.BP(), 3),
        (ibp.LossIBP(0.1), 4),
        (ibp.PredictionIBP(0.1), 6),
        (ibp.AdversarialTraining(0.1), 6),
        (ibp.FastAdversarialTraining(0.1), 5),
        (ibp.TangentBP(0.1), 18),
        (ibp.FastTangentBP(0.1), 4),
        (ibp.LossIBP(0.1, semantics="exact"), 6),
    ],
)
def test_a_method_knows_its_cost_in_sweeps(method, sweeps):
    assert method.sweeps == sweeps


def test_summary_names_nodes_rules_and_costs(network):
    with pytest.raises(ValueError, match="no batch yet"):
        network.summary()
    text = network.summary(SHAPE)
    assert f"{32 * CONV2:,}" in text
    assert f"BP skips {32 * CONV1:,} of the vjp (first layer)" in text
    assert [line.split()[1] for line in text.splitlines()[1:4]] == ["conv2d", "max_pool2d", "relu"]
    assert "MaxPool2d" in text


def test_summary_leaves_the_model_as_it_was():
    model, x, labels, _ = build("vgg_train")
    network = ibp.Network(model)
    before = {name: b.clone() for name, b in model.named_buffers()}
    network.summary([4, 1, 6, 6])
    assert all((before[name] == b).all() for name, b in model.named_buffers())
    ibp.LossIBP(0.1).gradients(network, x, labels)
    assert "batch_norm" in network.summary()


def test_a_summary_that_fails_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(48, 4))
    network, x = ibp.Network(model), torch.randn(2, 3, 4, 4)
    text, mean, numbers = network.summary(x.shape), model[0].running_mean.clone(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shapes"):
        network.summary([2, 3, 5, 5])
    assert torch.equal(model[0].running_mean, mean)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert network.summary(x.shape) == text


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, d):
        return 2 * d


class Sequential(nn.Module):
    def __init__(self, cells):
        super().__init__()
        self.cells, self.head = cells, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(Twice.apply(self.cells(x)[0][:, -1]))


@pytest.mark.parametrize(
    ("cells", "weights"),
    [
        (nn.LSTM(6, 8, 2, batch_first=True), 4 * 8 * (6 + 8) + 4 * 8 * (8 + 8)),
        (nn.GRU(6, 4, bidirectional=True, batch_first=True), 2 * 3 * 4 * (6 + 4)),
    ],
)
def test_recurrent_layers_use_each_weight_at_each_step_and_unseen_functions_are_named(cells, weights):
    network = ibp.Network(Sequential(cells))
    assert network.multiply_adds([5, 7, 6]).forward == 5 * 7 * weights + 5 * 8 * 3
    summary = network.summary([5, 7, 6])
    assert "not counted, their work being unknown: Twice" in summary
    assert f"by torch's autograd at its price: {type(cells).__name__.lower()}, Twice" in summary
