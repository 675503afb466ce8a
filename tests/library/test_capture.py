"""CapturedStep without CUDA is the same training loop."""

import copy

import pytest
import torch
from torch import nn

import ibp_triton as ibp
from ibp_triton.capture import CapturedStep


def setting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return model, torch.randn(5, 3, 6), torch.randint(4, (5, 3)), torch.randn(5, 2, 3, 6)


@pytest.mark.parametrize("method", [ibp.LossIBP(0.1), ibp.TangentBP(0.1)])
def test_steps_are_those_of_a_plain_loop(method):
    model, xs, ys, taus = setting()
    twin = copy.deepcopy(model)
    count = 2 if method.needs_tangents else 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = CapturedStep(ibp.Network(model), method, optimizer, (3, 6), tangents=count)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    network = ibp.Network(twin)
    for x, y, tau in zip(xs, ys, taus, strict=True):
        tau = tau if count else None
        found = step(x, y, tau)
        plain.zero_grad()
        expected = method(network, x, y, tau)
        expected.backward()
        plain.step()
        assert torch.equal(found, expected.detach())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert step.captures == 0


def test_a_smaller_last_batch_and_a_changed_beta():
    model, xs, ys, _ = setting()
    step = CapturedStep(ibp.Network(model), ibp.LossIBP(0.1), torch.optim.SGD(model.parameters(), lr=0.1), (3, 6))
    step(xs[0][:2], ys[0][:2])
    before = step._numbers()
    step.method = ibp.LossIBP(0.05)
    assert step._numbers() != before


def test_tangents_are_asked_for():
    model, *_ = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="needs the number"):
        CapturedStep(ibp.Network(model), ibp.TangentBP(0.1), optimizer, (3, 6))
    with pytest.raises(ValueError, match="takes no tangent"):
        CapturedStep(ibp.Network(model), ibp.BP(), optimizer, (3, 6), tangents=2)
