"""The strength of a penalty by Optuna: β on a logarithmic scale, judged on images that have not been trained on."""

from __future__ import annotations

import optuna
import torch
from torch import Tensor, nn

import ibp_triton as ibp


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two classes of noise, of which two numbers of twenty tell the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    x = torch.randn(count, 20, generator=generator)
    x[:, :2] += 1.2 * (2 * labels[:, None] - 1)
    return x, labels


def trained(beta: float, steps: int) -> nn.Module:
    """A network that could learn its 40 samples by heart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    step = ibp.EagerStep(model, ibp.LossIBP(beta, semantics="exact"), torch.optim.Adam(model.parameters(), lr=0.01))
    x, y = samples(40, 1)
    for _ in range(steps):
        step(x, y)
    return model


def main(trials: int = 12, steps: int = 100) -> tuple[float, float]:
    """Search; the best β and its loss on the other samples."""
    x, y = samples(400, 2)

    def judged(trial: optuna.Trial) -> float:
        model = trained(trial.suggest_float("beta", 1e-4, 1.0, log=True), steps)
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(x), y))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(judged, n_trials=trials)
    return study.best_params["beta"], study.best_value


if __name__ == "__main__":
    print(main())
