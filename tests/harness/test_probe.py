from __future__ import annotations

import pytest
import torch

import ibp_triton as ibp
from ibp_triton.harness import models
from ibp_triton.harness.batches import Batch
from ibp_triton.harness.probe import semantics_gap


def batch() -> Batch:
    draw = torch.Generator().manual_seed(0)
    tangents = torch.rand(2, 8, 1, 16, 16, generator=draw)
    return Batch(torch.rand(8, 1, 16, 16, generator=draw), torch.arange(8) % 4, tangents, 8)


def network() -> torch.nn.Sequential:
    draw = torch.Generator().manual_seed(1)
    return models.paper_mnist((1, 16, 16), 4, widths=[4, 4], hidden=8, init="uniform", generator=draw)


def test_semantics_coincide_for_tangent_propagation_through_relu_networks() -> None:
    found = semantics_gap(network(), ibp.TangentBP(0.1), batch())
    assert found == pytest.approx({"cosine": 1.0, "norm_ratio": 1.0}, abs=1e-3)


def test_gap_of_loss_ibp_is_the_oracles() -> None:
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    x, labels = batch().x, batch().labels

    def flat(method: object) -> torch.Tensor:
        gradients = ibp.reference.gradients(model, method, x, labels)[1]
        return torch.cat([gradient.flatten() for gradient in gradients.values()])

    plain = flat(ibp.BP())
    paper, exact = (flat(ibp.LossIBP(1.0, semantics=semantics)) - plain for semantics in ("paper", "exact"))
    found = semantics_gap(model, ibp.LossIBP(0.1), batch())
    assert found["cosine"] == pytest.approx(float(paper @ exact / (paper.norm() * exact.norm())), abs=1e-4)
    assert found["norm_ratio"] == pytest.approx(float(paper.norm() / exact.norm()), rel=1e-3)
    assert found["cosine"] < 0.999
