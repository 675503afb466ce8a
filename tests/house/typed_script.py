"""A user's script, for mypy --strict: every public name, called as the documentation says, and what it returns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ibp_triton as ibp


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    network = ibp.Network(model, dtype=torch.bfloat16, x=0, output="logits")
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    method: ibp.Method = ibp.LossIBP(beta=0.03, norm=1, semantics="exact", criterion=criterion)
    rivals: list[ibp.Method] = [
        ibp.BP(criterion=lambda z, y: (z - y).square().sum(1)),
        ibp.PredictionIBP(torch.tensor(0.03)),
        ibp.AdversarialTraining(0.05),
        ibp.FastAdversarialTraining(0.05),
        ibp.TangentBP(0.01),
        ibp.FastTangentBP(0.01),
        ibp.JacobianRegularisation(0.01, projections="all"),
        ibp.PGDTraining(0.1, 0.02, 10, random_start=False),
        ibp.TRADES(6.0, 0.1, 0.02, 10),
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps: list[ibp.EagerStep] = [
        ibp.EagerStep(network, method, optimizer, accumulate=2, reduce=lambda gradients: gradients),
        ibp.CompiledStep(model, method.at(beta=0.01), optimizer, clip_norm=1.0),
        ibp.CapturedStep(network, rivals[0], optimizer),
    ]
    replicas = ibp.ReplicatedNetwork([model, nn.Linear(3, 2)], seeds=[0, 1])
    replicas.seed(range(2))
    rates = [torch.optim.SGD(own.model.parameters(), lr=0.1) for own in replicas.networks]
    together = ibp.ReplicatedStep(replicas, rivals[:2], rates, clip_norm=2.0, reduce=lambda gradients: gradients)
    together.methods = [method.at(beta=0.1), method]
    total = 0.0
    for x, y in batches:
        total += float(together(x, y, each=True).loss.sum())
        loss: Tensor = method(network, x, y, tangents=ibp.lie_tangents(x), extra={"mask": x})
        parts: ibp.Parts = method.parts(model, x, y)
        penalty: Tensor | None = parts.penalty
        value, gradients = method.gradients(network, x, y)
        step: ibp.Parts = steps[0](x, [0, 1])
        total += float(loss) + float(value) + float(step.loss) + sum(float(g.norm()) for g in gradients.values())
        total += 0.0 if penalty is None else float(penalty)
    kept: bool = ibp.keep_freed_memory()
    ratio: float = method.predicted_ratio(network, [32, 1, 28, 28])
    oracle: tuple[Tensor, dict[str, Tensor]] = ibp.reference.gradients(model, method, *batches[0])
    return total + kept + ratio + float(oracle[0]) + len(network.summary())


def measure(model: nn.Module, x: Tensor, y: Tensor) -> str:
    def own(classifier: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
        return ibp.random_signs(ibp.gaussian_noise(pixels, 0.1), 0.1) + 0 * ibp.fgsm(classifier, pixels, labels, 0.1)

    attacks: dict[str, list[float] | dict[float, ibp.attacks.Attack]] = {"pgd": [0.1], "own": {0.1: own}}
    found: ibp.Robustness = ibp.robustness({"a": model}, (x, y), attacks, mean=[0.5], std=0.25, norm="l2")
    star: Tensor = ibp.pgd(model, x, y, 0.1, generator=torch.Generator())
    try:
        rate: float = found.error("pgd", 0.1) + float(star.mean())
    except ibp.IBPError as error:
        return str(error)
    first, second = found.rows[0].interval
    return found.to_markdown() + found.to_csv("a.csv") + str(rate + first + second + len(ibp.METHODS["bp"].key))
