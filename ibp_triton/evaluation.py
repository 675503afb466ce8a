"""Robustness of any classifier: errors under attacks and noise of rising size, every example's outcome kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ibp_triton.attacks import Attack, Bounds, fgsm, gaussian_noise, input_gradient, pgd, random_signs
from ibp_triton.errors import InputError, MethodError
from ibp_triton.outcomes import CLEAN, Robustness
from ibp_triton.recording.snapshot import Snapshot

ATTACKS: dict[str, Sequence[float]] = {
    "fgsm": (2 / 255, 4 / 255, 8 / 255),
    "pgd": (2 / 255, 4 / 255, 8 / 255),
    "gaussian": (0.05, 0.1),
    "random_sign": (8 / 255,),
}
NAMES = tuple(ATTACKS)
Sizes = Sequence[float] | Mapping[float, Attack]  # of an attack known by its name, or an attack for each size


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
        data: a DataLoader of (images, labels), or one pair; images in pixel units, within the bounds, labels class
            numbers in a tensor, an array or a list.
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
            attack whose result has another shape or is not finite, a model whose logits are no numbers, or no
            examples. Where only an attack makes them so, the example counts as wrong.
        ImportError: for progress without rich.
    """
    named = dict(model) if isinstance(model, Mapping) else {"model": model}
    sizes = _checked_sizes(ATTACKS if attacks is None else attacks, norm, bounds)
    place = torch.device(device) if device is not None else _place(next(iter(named.values())))
    found: dict[tuple[str, str, float], list[Tensor]] = {}
    zeros: dict[str, list[Tensor]] = {name: [] for name in named}
    with _as_before(named.values(), place):
        for number, (images, labels) in enumerate(_shown(data, batch_size, progress)):
            x, y = _on(images, place), _class_numbers(labels, len(images)).to(place)
            _check_images(x, bounds)
            for name, one in named.items():
                classify = _Classifier(one, mean, std, x)
                zeros[name].append((input_gradient(classify, x, y) == 0).flatten(1).all(1).cpu())
                for key, star in _perturbed(classify, x, y, sizes, bounds, norm, steps, (seed, number)):
                    with torch.no_grad():
                        logits = classify(star)
                    broken = logits.isnan().any(1)  # argmax would take them for a class
                    if key[0] == CLEAN and bool(broken.any()):
                        raise InputError(
                            f"{name!r} gives logits that are no numbers (NaN) for {int(broken.sum())} of {len(broken)} "
                            "images: were its weights stored after it diverged, or do mean= and std= not fit it?"
                        )
                    right = (logits.argmax(1) == y) & ~broken
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


def _class_numbers(labels: Tensor, count: int) -> Tensor:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.shape != (count,):
        raise InputError(
            f"labels must be whole class numbers [{count}], one an image, not {labels.dtype} of shape "
            f"{list(labels.shape)}; give labels.argmax(1) of those that are one a class"
        )
    return labels.long()


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
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor):
        labels = torch.as_tensor(data[1])
        if len(labels) != len(data[0]):
            raise InputError(f"there are {len(data[0])} images and {len(labels)} labels")
        yield from zip(data[0].split(batch_size), labels.split(batch_size), strict=True)
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
