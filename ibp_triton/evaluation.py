"""Robustness of any classifier: errors under attacks and noise of rising size, every example's outcome kept."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ibp_triton.attacks import Attack, Bounds, fgsm, gaussian_noise, input_gradient, pgd, random_signs
from ibp_triton.errors import InputError, MethodError
from ibp_triton.recording.snapshot import Snapshot

CLEAN = "clean"
ATTACKS: dict[str, Sequence[float]] = {
    "fgsm": (2 / 255, 4 / 255, 8 / 255),
    "pgd": (2 / 255, 4 / 255, 8 / 255),
    "gaussian": (0.05, 0.1),
    "random_sign": (8 / 255,),
}
NAMES = tuple(ATTACKS)
Sizes = Sequence[float] | Mapping[float, Attack]  # of an attack known by its name, or an attack for each size


@dataclass(frozen=True)
class ErrorRate:
    """One model under one attack of one size."""

    model: str
    attack: str
    size: float  # ε or σ, in pixel units
    errors: int
    examples: int

    @property
    def error(self) -> float:
        """In per cent."""
        return 100 * self.errors / self.examples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the error, in per cent."""
        z, n, p = 1.959964, self.examples, self.errors / self.examples
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return 100 * (centre - half) / (1 + z * z / n), 100 * (centre + half) / (1 + z * z / n)


@dataclass(frozen=True)
class Mcnemar:
    """What McNemar's exact test found of two models on the same examples."""

    gained: int  # examples that only the second model gets right
    lost: int  # examples that only the first gets right
    p: float  # two-sided


@dataclass(frozen=True)
class Comparison(Mcnemar):
    """The test of two models under the same attack."""

    attack: str
    size: float


@dataclass(frozen=True, eq=False)
class Robustness:
    """What ``robustness`` measured: a table to print, store, draw and compare.

    Attributes:
        outcomes: {(model, attack, size): booleans [N], True where the example is classified right}.
        norm: of the perturbations of fgsm and pgd.
        zero_gradients: {model: share of examples whose input gradient is all zeros}.
    """

    outcomes: Mapping[tuple[str, str, float], Tensor]
    norm: str
    zero_gradients: Mapping[str, float]

    @property
    def rows(self) -> list[ErrorRate]:
        """One for each model, attack and size."""
        return [ErrorRate(*key, int((~right).sum()), len(right)) for key, right in self.outcomes.items()]

    @property
    def models(self) -> list[str]:
        """Their names."""
        return list(dict.fromkeys(name for name, _, _ in self.outcomes))

    def error(self, attack: str = CLEAN, size: float = 0.0, model: str | None = None) -> float:
        """Error in per cent.

        Args:
            attack: its name; "clean" for the examples as they are.
            size: ε or σ in pixel units, as it was measured.
            model: its name; the first by default.

        Raises:
            InputError (a ValueError): for what was not measured.
        """
        name = self.models[0] if model is None else model
        for key, right in self.outcomes.items():
            if key[:2] == (name, attack) and math.isclose(key[2], size, abs_tol=1e-12):
                return 100 * float((~right).double().mean())
        raise InputError(f"{attack} of size {size} of model {name!r} was not measured")

    def compare(self, other: Robustness | None = None) -> list[Comparison]:
        """Paired tests of the two models, or of this result's one and another's, wherever both were measured.

        Args:
            other: the result of another model on the same examples, where this one has one model.

        Raises:
            InputError (a ValueError): where there are not two models, or they saw different examples.
        """
        both = (
            list(self._single()) + list(other._single())
            if other is not None
            else [{key[1:]: right for key, right in self.outcomes.items() if key[0] == name} for name in self.models]
        )
        if len(both) != 2:
            raise InputError(f"a comparison takes two models, not {len(both)}: give one result of two, or two of one")
        first, second = both
        if any(first[key].shape != second[key].shape for key in first.keys() & second.keys()):
            raise InputError("the two models were measured on different examples")
        tests = {key: mcnemar(right, second[key]) for key, right in first.items() if key in second}
        return [Comparison(test.gained, test.lost, test.p, *key) for key, test in tests.items()]

    def _single(self) -> Iterator[dict[tuple[str, float], Tensor]]:
        for name in self.models:
            yield {key[1:]: right for key, right in self.outcomes.items() if key[0] == name}

    def masking(self) -> list[str]:
        """Signs that gradients are masked, so that errors under fgsm and pgd say little; empty where there is none.

        PGD should harm at least as much as FGSM of the same size, FGSM more than random signs, more ε more than less,
        and few examples should have no gradient at all.
        """
        found = []
        for model in self.models:
            own = {key[1:]: right for key, right in self.outcomes.items() if key[0] == model}
            for (attack, size), right in own.items():
                weaker = {"pgd": "fgsm", "fgsm": "random_sign"}.get(attack)
                other = own.get((weaker, size)) if weaker else None
                if other is not None and _clearly_more(other, right):
                    found.append(f"{model}: {attack} at {size:g} harms less than {weaker}")
                steps = [(s, r) for (a, s), r in own.items() if a == attack and s < size]
                if attack in ("fgsm", "pgd") and steps and _clearly_more(steps[-1][1], right):
                    found.append(f"{model}: {attack} at {size:g} harms less than at {steps[-1][0]:g}")
            if self.zero_gradients.get(model, 0.0) > 0.1:
                found.append(f"{model}: {100 * self.zero_gradients[model]:.0f}% of the examples have no gradient")
        return found

    def _cells(self) -> list[tuple[str, str, str, str, str]]:
        return [
            (row.model, row.attack, f"{row.size:.4g}", f"{row.error:.2f}", "{:.2f} – {:.2f}".format(*row.interval))
            for row in self.rows
        ]

    def to_csv(self, path: str | Path | None = None) -> str:
        """One line a row with header, full precision; written to ``path`` too if that is given."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["model", "attack", "size", "errors", "examples", "error_percent", "low_percent", "high_percent"]
        )
        for row in self.rows:
            writer.writerow(
                [csv_cell(row.model), row.attack, row.size, row.errors, row.examples, row.error, *row.interval]
            )
        return _written(file.getvalue(), path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """A Markdown table, error in per cent with its 95 % interval; written to ``path`` too if that is given."""
        head = ["| model | attack | size | error % | 95 % |", "| --- | --- | --- | --- | --- |"]
        rows = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in self._cells()]
        return _written("\n".join([*head, *rows]) + "\n", path)

    def to_latex(self, path: str | Path | None = None) -> str:
        """A LaTeX tabular, error in per cent with its 95 % interval; written to ``path`` too if that is given."""
        rows = [" & ".join(latex_cell(cell) for cell in cells) + r" \\" for cells in self._cells()]
        head = [r"\begin{tabular}{llrrr}", r"\hline", r"model & attack & size & error \% & 95 \% \\", r"\hline"]
        return _written("\n".join([*head, *rows, r"\hline", r"\end{tabular}"]) + "\n", path)

    def plot(self, path: str | Path | None = None) -> Any:
        """Error against size, a panel an attack, with bands of 95 %; the figure, also written to ``path`` if given.

        Raises:
            ImportError: without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
        attacks = list(dict.fromkeys(row.attack for row in self.rows if row.attack != CLEAN)) or [CLEAN]
        figure = Figure(figsize=(4 * len(attacks), 3.2), layout="constrained")
        for axes, attack in zip(figure.subplots(1, len(attacks), squeeze=False)[0], attacks, strict=True):
            for model in self.models:
                own = [row for row in self.rows if row.model == model and row.attack in (CLEAN, attack)]
                own.sort(key=lambda row: row.size)
                sizes = [row.size for row in own]
                axes.plot(sizes, [row.error for row in own], marker=".", label=model.replace("$", r"\$"))
                axes.fill_between(sizes, *zip(*(row.interval for row in own), strict=True), alpha=0.2, linewidth=0)
            axes.set(title=attack.replace("_", " "), xlabel="σ" if attack == "gaussian" else "ε", ylabel="error %")
            axes.legend(frameon=False)
        if path is not None:
            figure.savefig(path)
        return figure

    def __str__(self) -> str:
        return self.to_markdown()


def robustness(
    model: nn.Module | Mapping[str, nn.Module],
    data: Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor],
    attacks: Mapping[str, Sizes] | None = None,
    *,
    bounds: Bounds = (0.0, 1.0),
    norm: str = "linf",
    mean: Any = None,
    std: Any = None,
    device: torch.device | str | None = None,
    steps: int = 10,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> Robustness:
    """Errors of a classifier, or of several on the same examples, under attacks of rising size.

    The models are evaluated in eval mode; afterwards their modes, gradients, buffers and the generators are as before.

    Args:
        model: x [N, ...] → logits [N, M], or {name: model} to compare.
        data: a DataLoader of (images, labels), or one pair of tensors; images in pixel units, within the bounds.
        attacks: {"fgsm", "pgd", "gaussian" or "random_sign": sizes ε or σ in pixel units}; small default sizes. Under
            any other name {size: attack}, an attack being a function (model, x, y) → x' of pixels, its model a module
            that takes pixels and returns logits; ``ibp.attacks.from_torchattacks`` makes these of other people's.
        bounds: the least and the largest pixel, to which perturbed images are clipped; None clips nothing.
        norm: "linf" or "l2", of fgsm and pgd.
        mean: subtracted from images before the model sees them: a number, one a channel, or an image.
        std: what the difference is divided by, likewise.
        device: where to compute; that of the first model's parameters by default. The models are not moved.
        steps: of pgd, each 2.5 ε / steps long, from a uniform random point of the ball.
        seed: of noise and random starts, the same for all models.
        batch_size: for a pair of tensors.
        progress: whether to show a bar; needs rich.

    Raises:
        InputError, MethodError (ValueErrors): for an unknown attack, a negative size, images outside the bounds, an
            attack whose result has another shape or is not finite, or no examples.
        ImportError: for progress without rich.
    """
    named = dict(model) if isinstance(model, Mapping) else {"model": model}
    sizes = _checked_sizes(ATTACKS if attacks is None else attacks, norm, bounds)
    place = torch.device(device) if device is not None else _place(next(iter(named.values())))
    found: dict[tuple[str, str, float], list[Tensor]] = {}
    zeros: dict[str, list[Tensor]] = {name: [] for name in named}
    with _as_before(named.values(), place):
        for number, (images, labels) in enumerate(_shown(data, batch_size, progress)):
            x, y = _on(images, place), labels.to(place)
            _check_images(x, bounds)
            for name, one in named.items():
                classify = _Classifier(one, mean, std, x)
                zeros[name].append((input_gradient(classify, x, y) == 0).flatten(1).all(1).cpu())
                for key, star in _perturbed(classify, x, y, sizes, bounds, norm, steps, (seed, number)):
                    with torch.no_grad():
                        right = classify(star).argmax(1) == y
                    found.setdefault((name, *key), []).append(right.cpu())
    if not found:
        raise InputError("there are no examples to evaluate")
    shares = {name: float(torch.cat(parts).double().mean()) for name, parts in zeros.items()}
    order = sorted(found, key=lambda key: list(named).index(key[0]))
    return Robustness({key: torch.cat(found[key]) for key in order}, norm, shares)


def _checked_sizes(attacks: Mapping[str, Sizes], norm: str, bounds: Bounds) -> dict[str, dict[float, Attack | None]]:
    """{attack: {size: the function, None for an attack known by its name}}, from the smallest size."""
    sizes: dict[str, dict[float, Attack | None]] = {}
    for name, many in attacks.items():
        given: Mapping[float, Attack | None] = many if isinstance(many, Mapping) else dict.fromkeys(many)
        if not isinstance(many, Mapping) and name not in NAMES:
            raise MethodError(
                f"unknown attack {name!r}; there are {', '.join(NAMES)}, and {{size: (model, x, y) -> x'}} of your own"
            )
        if isinstance(many, Mapping) and (name in (*NAMES, CLEAN) or not all(callable(a) for a in many.values())):
            raise MethodError(
                f"{name!r}: {{size: attack}} takes functions (model, x, y) -> x', under a name of their own"
            )
        sizes[name] = {float(size): given[size] for size in sorted(given)}
    if any(not 0 <= size < math.inf for many in sizes.values() for size in many):
        shown = {name: list(many) for name, many in sizes.items()}
        raise MethodError(f"sizes of attacks must be finite and not negative, got {shown}")
    fgsm(lambda x: x, torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), 0.0, bounds=bounds, norm=norm)
    return sizes


def _place(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _on(images: Tensor, place: torch.device) -> Tensor:
    if not images.is_floating_point():
        raise InputError(
            f"images must be floating point in pixel units, not {images.dtype}: use images / 255 for whole numbers"
        )
    return images.to(place)


def _check_images(x: Tensor, bounds: Bounds) -> None:
    if bounds is None:
        return
    low, high = float(x.min()), float(x.max())
    if low < bounds[0] - 1e-6 or high > bounds[1] + 1e-6:
        raise InputError(
            f"images lie in {low:.4g} … {high:.4g}, outside bounds={bounds}: pass them in pixel units and give mean= "
            "and std= for what the model subtracts and divides by, or pass bounds=None"
        )


def _batches(data: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        yield from zip(data[0].split(batch_size), data[1].split(batch_size), strict=True)
        return
    for batch in data:
        yield batch[0], torch.as_tensor(batch[1])


def _shown(data: Any, batch_size: int, progress: bool) -> Iterable[Any]:
    batches = _batches(data, batch_size)
    if not progress:
        return batches
    try:
        from rich.progress import track
    except ImportError as error:
        raise ImportError("progress=True needs rich: pip install rich") from error
    pair = isinstance(data, (tuple, list))
    count = -(-len(data[0]) // batch_size) if pair else len(data) if hasattr(data, "__len__") else None
    return track(batches, description="robustness", total=count)


class _Classifier(nn.Module):
    """A model on pixels: (x − mean) / std goes before it."""

    def __init__(self, model: nn.Module, mean: Any, std: Any, x: Tensor) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, _shaped(mean, x), _shaped(std, x)
        self.training = False  # as the model is, whose own layers this does not touch

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, M] of pixels [N, ...]."""
        x = x if self.mean is None else x - self.mean
        out: Tensor = self.model(x if self.std is None else x / self.std)
        return out


def _shaped(value: Any, x: Tensor) -> Any:
    """A number, one a channel, or an image, to go with x [N, C, ...]."""
    if value is None or isinstance(value, (int, float)):
        return value
    found = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    return found.view(-1, *[1] * (x.dim() - 2)) if found.dim() == 1 and x.dim() > 2 else found


def _perturbed(
    classify: nn.Module,
    x: Tensor,
    y: Tensor,
    sizes: Mapping[str, Mapping[float, Attack | None]],
    bounds: Bounds,
    norm: str,
    steps: int,
    source: tuple[int, int],
) -> Iterator[tuple[tuple[str, float], Tensor]]:
    """Each attack and size, with its images; noise is drawn on the CPU, alike for every model."""
    number = source[0] * 1_000_003 + source[1]

    def drawn() -> torch.Generator:
        return torch.Generator().manual_seed(number)

    def clipped(u: Tensor) -> Tensor:
        return u if bounds is None else u.clamp(*bounds)

    yield (CLEAN, 0.0), x
    for attack, many in sizes.items():
        stars = fgsm(classify, x, y, list(many), bounds=bounds, norm=norm) if attack == "fgsm" and many else None
        for i, (size, own) in enumerate(many.items()):
            if own is not None:
                torch.manual_seed(number)
                star = clipped(_checked(own(classify, x.clone(), y.clone()), x, attack))
            elif stars is not None:
                star = stars[i]
            elif attack == "pgd":
                star = pgd(classify, x, y, size, steps=steps, generator=drawn(), bounds=bounds, norm=norm)
            else:
                noise = gaussian_noise if attack == "gaussian" else random_signs
                star = clipped(noise(x, size, drawn()))
            yield (attack, size), star


def _checked(star: Any, x: Tensor, attack: str) -> Tensor:
    if not isinstance(star, Tensor) or star.shape != x.shape:
        got = list(star.shape) if isinstance(star, Tensor) else type(star).__name__
        raise InputError(f"the attack {attack!r} must return images {list(x.shape)}, and returned {got}")
    if not bool(star.isfinite().all()):
        raise InputError(f"the attack {attack!r} returned pixels that are not finite")
    return star.detach().to(x)


@contextmanager
def _as_before(models: Iterable[nn.Module], place: torch.device) -> Iterator[None]:
    """Inside, eval mode; afterwards modes, gradients, buffers and generators are what they were."""
    modes = [(m, m.training) for model in models for m in model.modules()]
    gradients = [(p, p.grad) for model in models for p in model.parameters()]
    before = [Snapshot.of(model, torch.empty(0, device=place)) for model in models]
    for m, _ in modes:
        m.training = False
    for parameter, _ in gradients:
        parameter.grad = None  # so that an attack's own backward adds nothing to what is put back
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for snapshot in before:
            snapshot.restore()


def mcnemar(first: Tensor, second: Tensor) -> Mcnemar:
    """McNemar's exact test of two outcomes (True: right) on the same examples, booleans of one shape."""
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    n, k = gained + lost, min(gained, lost)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return Mcnemar(gained, lost, 1.0 if n == 0 else min(1.0, 2 * sum(math.exp(log) for log in logs)))


def _clearly_more(harmed: Tensor, other: Tensor) -> bool:
    """Whether the first outcomes have more errors than the second, beyond chance (p < 0.05, paired)."""
    test = mcnemar(harmed, other)
    return test.gained > test.lost and test.p < 0.05


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def csv_cell(label: str) -> str:
    """A label that no spreadsheet takes for a formula."""
    return f"'{label}" if label.startswith(("=", "+", "-", "@", "\t", "\r")) else label


def latex_cell(text: str) -> str:
    """A text that LaTeX sets as it is, Greek letters and signs as formulas."""
    return re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", "\0")).translate(_LATEX)


_SIGNS = {"±": "pm", "×": "times", "ε": "varepsilon", "β": "beta", "σ": "sigma", "λ": "lambda", "∇": "nabla"}
_LATEX = {ord(sign): f"$\\{name}$" for sign, name in _SIGNS.items()}
_LATEX |= {0: r"\textbackslash{}", ord("−"): "$-$", ord("–"): "--", ord("~"): r"\textasciitilde{}", ord("^"): r"\^{}"}
_LATEX |= {ord("<"): "$<$", ord(">"): "$>$", ord("|"): "$|$"}
