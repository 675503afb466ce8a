"""Pictures from checkpoints: adversarial examples, tangent vectors, filters of the first layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import ibp_triton as ibp
from ibp_triton.errors import DamageError, DataError
from ibp_triton.harness import data, evaluate, store
from ibp_triton.harness.grid import Run
from ibp_triton.harness.report.gather import Findings, title
from ibp_triton.harness.report.sketch import Sketch, plain
from ibp_triton.tangents import TRANSFORMATIONS

ROWS, IMAGES, FILTERS = 8, 6, 12
HIGHEST = 7.0  # inches of a picture: few filters in many rows would make a column of it, and many megabytes
Gallery = list[tuple[str, list[Tensor]]]


def samples(findings: Findings, data_dir: str | None = None) -> Iterator[Sketch]:
    """Figures from the first checkpoint of each of the first rows; none where checkpoints or data are not there."""
    trained = [(title(row), run) for row in findings.chosen if (run := _checkpoint(findings, row.runs))][:ROWS]
    adversarial: Gallery = []
    filters: Gallery = []
    for label, run in trained:
        try:
            dataset = data.load(run.data.found_in(data_dir), run.seeds.subset)
            model = evaluate.load_model(run, findings.folder(run), dataset)
        except (DataError, DamageError):
            continue
        images, labels = dataset.test.images[:IMAGES], dataset.test.labels[:IMAGES]
        if not adversarial:
            adversarial.append(("clean", list(images)))
            yield _tangents(images, run)
        size = _size(findings)
        if size:
            (moved,) = ibp.fgsm(model, images - dataset.mean, labels, [size])
            adversarial.append((label, list(moved + dataset.mean)))
        first = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
        if first is not None:
            filters.append((label, [_stretched(one) for one in first.weight.detach()[:FILTERS]]))
    if len(adversarial) > 1:
        caption = f"Test images, and the same moved by FGSM of ε = {_size(findings):g} on each network"
        yield _gallery("samples", caption, adversarial)
    if filters:
        yield _gallery(
            "filters",
            f"The first {FILTERS} filters of the first layer, each from its least to its greatest weight",
            filters,
        )


def pictured(findings: Findings) -> list[Run]:
    """The runs that `samples` draws from where every finished one has its checkpoint."""
    return [row.runs[0] for row in findings.chosen if row.runs][:ROWS]


def _checkpoint(findings: Findings, runs: tuple[Run, ...]) -> Run | None:
    return next((run for run in runs if (findings.folder(run) / store.CHECKPOINT).is_file()), None)


def _size(findings: Findings) -> float:
    choice = findings.experiment.evaluate
    sizes = [size for name in ("adversarial", "pgd") for size in evaluate.levels_of(choice, name)]
    return max(sizes, default=choice.masking or 0.0)


def _tangents(images: Tensor, run: Run) -> Sketch:
    found = ibp.lie_tangents(images, **run.tangents.model_dump())
    lines = [
        (f"image {number + 1}", [images[number], *map(_stretched, found[:, number])])
        for number in range(min(3, len(images)))
    ]
    names = ", ".join(TRANSFORMATIONS)
    return _gallery("tangents", f"Tangent vectors of test images: {names}", lines)


def _stretched(image: Tensor) -> Tensor:
    """Values from the least to the greatest as 0 to 1."""
    low, high = image.min(), image.max()
    return (image - low) / (high - low).clamp_min(1e-12)


def _gallery(name: str, caption: str, lines: Gallery) -> Sketch:
    """Images [C, H, W] in [0, 1], a line of them for each label, as one picture."""
    pad = nn.ConstantPad2d(1, 1.0)
    rows = [torch.cat([pad(_rgb(image)) for image in images], -1) for _, images in lines]
    width, height = max(row.shape[-1] for row in rows), rows[0].shape[-2]
    whole = torch.cat([nn.functional.pad(row, (0, width - row.shape[-1]), value=1.0) for row in rows], -2)
    sketch = Sketch(name, caption, "", "")
    _, high = sketch.figure.get_size_inches()
    sketch.grow(min(max(0.8, 4.4 * whole.shape[-2] / width + 0.2), HIGHEST) - high)
    sketch.axes.imshow(whole.permute(1, 2, 0).numpy(), interpolation="nearest")
    sketch.axes.set_yticks([(n + 0.5) * height for n in range(len(rows))], [plain(label) for label, _ in lines])
    sketch.axes.set_xticks([])
    sketch.axes.grid(visible=False)
    return sketch


def _rgb(image: Tensor) -> Tensor:
    shown = image.clamp(0, 1)
    return shown if len(shown) == 3 else shown[:1].expand(3, -1, -1)
