"""Robustness of a trained network: error against ε of FGSM and PGD and σ of noise, with every example's outcome."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import ibp_triton as ibp
from ibp_triton.errors import DamageError
from ibp_triton.harness import data, models, store
from ibp_triton.harness.config import Evaluate, Levels, Span
from ibp_triton.harness.grid import Run
from ibp_triton.harness.streams import stream

CLEAN = "clean"  # the curve of one level, without a perturbation
_EXAMPLES = "examples"
Perturb = Callable[[Tensor, Tensor, int], Iterator[Tensor]]


def values(levels: Levels) -> list[float]:
    """The numbers of a list or a span."""
    return levels.values() if isinstance(levels, Span) else list(levels)


def levels_of(choice: Evaluate, curve: str) -> list[float]:
    """The sizes a curve was measured at; [0.0] for CLEAN."""
    return values(getattr(choice, curve)) if curve in CURVES else [0.0]


def file_stem(choice: Evaluate) -> str:
    """Name of the two files of an evaluation: settings that change the outcome change the name."""
    text = choice.model_dump_json(exclude={"batch_size"})
    return f"evaluation-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def done(folder: Path, choice: Evaluate) -> bool:
    """Whether this evaluation of the run is stored, its summary readable and its outcomes whole."""
    return summary_of(folder, choice) is not None


def summary_of(folder: Path, choice: Evaluate) -> store.Record | None:
    """The stored summary of this evaluation; None if it was not done or one of its two files is damaged."""
    found = store.find_json(folder / f"{file_stem(choice)}.json")
    outcomes = folder / f"{file_stem(choice)}.safetensors"
    if found is None or not isinstance(found.get(CLEAN), dict) or not outcomes.is_file():
        return None
    seal = found.get(store.SEAL)
    return found if seal is None or seal == store.digest(outcomes) else None


def passes(choice: Evaluate) -> dict[str, float]:
    """Forward passes an example that each part of an evaluation costs, a gradient counted as two."""
    gradient, levels = 2.0, {name: len(levels_of(choice, name)) for name in CURVES}
    pgd = choice.pgd_steps * gradient + 1
    found = {
        CLEAN: 1.0,
        "adversarial": levels["adversarial"] + gradient,
        "gaussian": float(levels["gaussian"]),
        "pgd": levels["pgd"] * pgd,
        "masking": 2 + 2 * gradient + pgd,
    }
    absent = {name for name, count in levels.items() if not count} | ({"masking"} if choice.masking is None else set())
    return {name: cost for name, cost in found.items() if name not in absent}


class _Share:
    """Tells how much of an evaluation is done, from 0 to 1, part by part, in steps of a hundredth or more."""

    def __init__(self, choice: Evaluate, examples: int, tell: Callable[[float], None]) -> None:
        self._costs, self._examples, self._tell = passes(choice), examples, tell
        self._before, self._told = 0.0, 0.0

    def part(self, name: str) -> Callable[[int], None]:
        """Begin a part; to be called with the examples that are through it."""
        cost, before, total = self._costs[name], self._before, sum(self._costs.values())
        self._before += cost

        def at(examples: int) -> None:
            share = (before + cost * examples / self._examples) / total
            if share >= min(1.0, self._told + 0.01):
                self._told = share
                self._tell(share)

        return at


def evaluate(
    run: Run,
    folder: Path,
    choice: Evaluate,
    data_dir: str | None = None,
    tell: Callable[[float], None] = lambda share: None,
) -> store.Record:
    """Evaluate the stored checkpoint of `run`; the summary, also written beside every example's outcome.

    Computed on the run's training device; `tell` hears how much is done, from 0 to 1. Outcomes, bits (1: right)
    [levels, examples], are in evaluation-<hash>.safetensors; `outcomes_of` reads them.
    """
    device = torch.device(run.training.device)
    dataset = data.load(run.data.found_in(data_dir), run.seeds.subset).to(device)
    layout = torch.channels_last if run.training.channels_last else torch.contiguous_format
    model = load_model(run, folder, dataset).to(device).to(memory_format=layout)  # type: ignore[call-overload]
    x = (dataset.test.images - dataset.mean).contiguous(memory_format=layout)
    labels = dataset.test.labels
    if choice.examples is not None:
        x, labels = x[: choice.examples], labels[: choice.examples]
    share = _Share(choice, len(labels), tell)
    outcomes = {CLEAN: _outcomes(model, x, labels, choice, _clean, share.part(CLEAN))}
    for name, kind in CURVES.items():
        if levels := levels_of(choice, name):
            harm = kind.perturbation(model, levels, choice)
            outcomes[name] = _outcomes(model, x, labels, choice, harm, share.part(name))
    summary = {"run": run.name, "examples": len(labels), **_errors(outcomes, choice)}
    classes = labels.cpu()
    wrong, count = (torch.bincount(y, minlength=dataset.classes) for y in (classes[~outcomes[CLEAN][0]], classes))
    summary["by_class"] = {"wrong": wrong.tolist(), "count": count.tolist()}
    if choice.masking is not None:
        summary["masking"] = masking(model, x, labels, choice)
        share.part("masking")(len(labels))
    packed = {name: torch.from_numpy(np.packbits(right.numpy(), axis=1)) for name, right in outcomes.items()}
    packed[_EXAMPLES] = torch.tensor([len(labels)])  # the last byte of a row may hold bits of none
    outcomes_file = folder / f"{file_stem(choice)}.safetensors"
    store.write_tensors(outcomes_file, packed, last=False)
    summary[store.SEAL] = store.digest(outcomes_file)
    store.write_json(folder / f"{file_stem(choice)}.json", summary)
    return summary


def _errors(outcomes: dict[str, Tensor], choice: Evaluate) -> store.Record:
    return {
        name: {
            "levels": levels_of(choice, name),
            "error": [100.0 * float((~row).float().mean()) for row in right],
        }
        for name, right in outcomes.items()
    }


def load_model(run: Run, folder: Path, dataset: data.Dataset) -> nn.Module:
    """The trained network in evaluation mode; raises DamageError if there is no sound checkpoint that fits it."""
    path = folder / store.CHECKPOINT
    cure = f"delete {folder / store.RESULT}, and `ibp-triton run` trains the run anew"
    found, result = store.read_tensors(path), store.find_json(folder / store.RESULT) or {}
    seal = (result.get(store.SEAL) or {}).get(path.name)
    if found is None or (seal and seal != store.digest(path)):
        raise DamageError(f"{path}: missing or damaged; {cure}")
    model = models.build(run.network, dataset.shape, dataset.classes, run.seeds.weights)
    try:
        model.load_state_dict(found[0])
    except RuntimeError as error:
        raise DamageError(f"{path}: does not fit the run's network ({error}); {cure}") from error
    return model.eval()


def outcomes_of(folder: Path, choice: Evaluate) -> dict[str, Tensor] | None:
    """Stored outcomes: curve → booleans [levels, examples]; None if this evaluation was not done."""
    found = store.read_tensors(folder / f"{file_stem(choice)}.safetensors") if done(folder, choice) else None
    if found is None or _EXAMPLES not in found[0]:
        return None
    packed, _ = found
    count = int(packed.pop(_EXAMPLES))
    bits = {name: np.unpackbits(rows.numpy(), axis=1, count=count) for name, rows in packed.items()}
    return {name: torch.from_numpy(rows).bool() for name, rows in bits.items()}


def masking(model: nn.Module, x: Tensor, labels: Tensor, choice: Evaluate) -> store.Record:
    """Signs of gradient masking at one ε: random noise ≥ FGSM ≥ PGD in harm is suspicious, zero gradients too.

    Errors in per cent under random ±ε, FGSM and PGD; shares of zero entries and of all-zero input gradients.
    """
    assert choice.masking is not None
    at = [choice.masking]
    harms = {"random": _random_signs, "fgsm": _fgsm, "pgd": _pgd}
    errors = {
        f"{name}_error": 100.0 * float((~_outcomes(model, x, labels, choice, harm(model, at, choice))).float().mean())
        for name, harm in harms.items()
    }
    zero = [(_signs(model, part, y) == 0).flatten(1) for _, part, y in _batches(x, labels, choice.batch_size)]
    entries = torch.cat(zero)
    return {
        "epsilon": choice.masking,
        **errors,
        "zero_entries": float(entries.float().mean()),
        "zero_gradients": float(entries.all(1).float().mean()),
    }


def _outcomes(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    choice: Evaluate,
    perturb: Perturb,
    tell: Callable[[int], None] = lambda examples: None,
) -> Tensor:
    parts: list[Tensor] = []
    for number, part, y in _batches(x, labels, choice.batch_size):
        with torch.no_grad():
            parts.append(torch.stack([(model(moved).argmax(1) == y).cpu() for moved in perturb(part, y, number)]))
        tell(sum(found.shape[1] for found in parts))
    return torch.cat(parts, 1)


def _batches(x: Tensor, labels: Tensor, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    pairs = zip(torch.split(x, size), torch.split(labels, size), strict=True)
    return ((number, part, y) for number, (part, y) in enumerate(pairs))


def _clean(x: Tensor, labels: Tensor, number: int) -> Iterator[Tensor]:
    yield x


def _fgsm(model: nn.Module, levels: Sequence[float], choice: Evaluate) -> Perturb:
    def perturb(x: Tensor, labels: Tensor, number: int) -> Iterator[Tensor]:
        yield from ibp.fgsm(model, x, labels, list(levels))

    return perturb


def _noise(model: nn.Module, levels: Sequence[float], choice: Evaluate) -> Perturb:
    """The same standard normal numbers for every σ, method and seed of training."""

    def perturb(x: Tensor, labels: Tensor, number: int) -> Iterator[Tensor]:
        noise = ibp.gaussian_noise(torch.zeros_like(x), 1.0, stream(choice.seed, "noise", number))
        yield from (x + sigma * noise for sigma in levels)

    return perturb


def _pgd(model: nn.Module, levels: Sequence[float], choice: Evaluate) -> Perturb:
    def perturb(x: Tensor, labels: Tensor, number: int) -> Iterator[Tensor]:
        for epsilon in levels:
            draws = stream(choice.seed, "pgd", number)
            size = choice.pgd_step_size * epsilon
            yield ibp.pgd(model, x, labels, epsilon, steps=choice.pgd_steps, step_size=size, generator=draws)

    return perturb


def _random_signs(model: nn.Module, levels: Sequence[float], choice: Evaluate) -> Perturb:
    def perturb(x: Tensor, labels: Tensor, number: int) -> Iterator[Tensor]:
        signs = 2 * torch.randint(2, x.shape, generator=stream(choice.seed, "signs", number)) - 1
        yield from (x + epsilon * signs.to(x) for epsilon in levels)

    return perturb


def _signs(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return ibp.attacks.input_gradient(model, x, labels).sign()


@dataclass(frozen=True)
class CurveKind:
    """A curve of errors: the symbol of the perturbation's size, what it is the size of, a title, and how it is made."""

    symbol: str
    of: str
    title: str
    perturbation: Callable[[nn.Module, Sequence[float], Evaluate], Perturb]


CURVES = {  # by the key of `evaluate` that has the levels
    "adversarial": CurveKind("ε", "of the adversarial example x + ε sign(∇L)", "Adversarial examples", _fgsm),
    "gaussian": CurveKind("σ", "of the noise", "Gaussian noise", _noise),
    "pgd": CurveKind("ε", "of projected gradient descent", "Projected gradient descent", _pgd),
}
