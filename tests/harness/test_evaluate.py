from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ibp_triton as ibp
from ibp_triton.errors import DamageError
from ibp_triton.harness import data, evaluate, grid, loading, models, stats, store
from ibp_triton.harness.config import Evaluate, Span
from ibp_triton.harness.train import train
from ibp_triton.outcomes import mcnemar

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
CHOICE = Evaluate(adversarial=[0.0, 0.1], gaussian=Span(stop=0.4, step=0.2), pgd=[0.1], masking=0.1, batch_size=10)


@pytest.fixture
def trained(tree: Tree, write: Write, tmp_path: Path) -> tuple[grid.Run, Path]:
    run = grid.runs(loading.load(write(tree)))[0]
    train(run, tmp_path / "run", lambda _: None)
    return run, tmp_path / "run"


def test_curves_are_those_of_the_attacks_on_a_plain_module(trained: tuple[grid.Run, Path]) -> None:
    run, folder = trained
    summary = evaluate.evaluate(run, folder, CHOICE)
    dataset = data.load(run.data, 0)
    model = models.build(run.network, dataset.shape, 4, 5).eval()
    model.load_state_dict(load_file(folder / store.CHECKPOINT))
    x, labels = dataset.test.images - load_file(folder / store.MEAN)["mean"], dataset.test.labels

    def error(moved: torch.Tensor) -> float:
        return 100 * float((model(moved).argmax(1) != labels).float().mean())

    expected = [error(x), error(ibp.fgsm(model, x, labels, 0.1))]
    assert summary["adversarial"] == {"levels": [0.0, 0.1], "error": pytest.approx(expected)}
    assert summary["clean"]["error"] == pytest.approx([store.read_json(folder / store.RESULT)["test_error"]])  # type: ignore[index]
    assert summary["gaussian"]["levels"] == [0.0, 0.2, 0.4]
    assert summary["gaussian"]["error"][0] == pytest.approx(expected[0])
    assert summary["pgd"]["error"][0] >= expected[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_draws_the_same_noise_and_finds_the_same_errors(trained: tuple[grid.Run, Path]) -> None:
    run, folder = trained
    found = [evaluate.evaluate(run.on(device), folder, CHOICE) for device in ("cpu", "cuda:0")]
    for name in ("clean", *evaluate.CURVES):
        assert found[0][name]["error"] == pytest.approx(found[1][name]["error"], abs=100 / 32)


def test_every_outcome_is_stored_and_noise_is_the_same_for_every_model(trained: tuple[grid.Run, Path]) -> None:
    run, folder = trained
    evaluate.evaluate(run, folder, CHOICE)
    stored = evaluate.outcomes_of(folder, CHOICE)
    assert stored is not None
    assert {name: tuple(rows.shape) for name, rows in stored.items()} == {
        "clean": (1, 32),
        "adversarial": (2, 32),
        "gaussian": (3, 32),
        "pgd": (1, 32),
    }
    assert evaluate.done(folder, CHOICE)
    assert not evaluate.done(folder, CHOICE.model_copy(update={"seed": 1}))
    seen = []
    for _ in range(2):
        noise = evaluate._noise(torch.nn.Identity(), [1.0], CHOICE)
        seen.append(next(noise(torch.zeros(10, 1, 4, 4), torch.zeros(10), 3)))
    assert torch.equal(*seen)


def test_first_examples_only(trained: tuple[grid.Run, Path]) -> None:
    run, folder = trained
    first = Evaluate(examples=7, gaussian=[0.0, 2.0])
    summary = evaluate.evaluate(run, folder, first)
    assert summary["examples"] == 7
    evaluate.evaluate(run, folder, Evaluate())
    some, every = (evaluate.outcomes_of(folder, choice) for choice in (first, Evaluate()))
    assert some is not None
    assert every is not None
    assert torch.equal(some["clean"], every["clean"][:, :7])
    assert (~some["gaussian"]).float().mean(1).mul(100).tolist() == pytest.approx(summary["gaussian"]["error"])


def test_masking_check_sees_a_model_without_gradients(trained: tuple[grid.Run, Path]) -> None:
    run, folder = trained
    honest = evaluate.evaluate(run, folder, CHOICE)["masking"]
    assert honest["zero_gradients"] == 0
    assert 0 <= honest["zero_entries"] < 0.5
    dead = torch.nn.Sequential(torch.nn.Hardtanh(-1e-6, 1e-6), torch.nn.Flatten(), torch.nn.Linear(16, 4))
    x, labels = torch.rand(20, 1, 4, 4) + 0.1, torch.arange(20) % 4
    found = evaluate.masking(dead, x, labels, CHOICE)
    assert found["zero_entries"] == found["zero_gradients"] == 1.0


def test_a_missing_checkpoint_is_named(trained: tuple[grid.Run, Path], tmp_path: Path) -> None:
    with pytest.raises(DamageError, match=r"checkpoint.safetensors: missing or damaged; delete .*result.json"):
        evaluate.evaluate(trained[0], tmp_path / "nowhere", CHOICE)


def test_checkpoint_serves_a_peer_without_this_package(trained: tuple[grid.Run, Path]) -> None:
    """torchattacks' FGSM, which clips to [0, 1], on the plain module: the same images as ours, clipped."""
    attacks = pytest.importorskip("torchattacks")
    run, folder = trained
    dataset = data.load(run.data, 0)
    plain = models.paper_mnist((1, 16, 16), 4, widths=[4, 4], hidden=8)
    plain.load_state_dict(load_file(folder / store.CHECKPOINT))
    mean = load_file(folder / store.MEAN)["mean"]
    whole = torch.nn.Sequential(Shift(mean), plain).eval()
    images, labels = dataset.test.images, dataset.test.labels
    theirs = attacks.FGSM(whole, eps=0.1)(images, labels)
    assert torch.allclose(theirs, ibp.fgsm(whole, images, labels, 0.1).clamp(0, 1), atol=1e-6)


class Shift(torch.nn.Module):
    def __init__(self, mean: torch.Tensor) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.mean


def test_spans_include_both_ends_without_rounding_dust() -> None:
    assert Span(stop=0.1, step=0.005).values()[3] == 0.015
    assert len(Span(stop=0.1, step=0.005).values()) == 21
    assert Span(start=1, stop=2, step=0.5).values() == [1.0, 1.5, 2.0]


def test_mcnemar_is_the_exact_binomial_of_discordant_pairs() -> None:
    first = torch.tensor([True] * 8 + [False] * 4)
    second = torch.tensor([True] * 7 + [False] + [True] * 3 + [False])
    found = mcnemar(first, second)
    assert (found.gained, found.lost) == (3, 1)
    assert found.p == pytest.approx(2 * (1 + 4) / 16)
    assert mcnemar(first, first).p == 1.0


def test_band_covers_the_error_and_narrows_with_examples() -> None:
    draw = torch.Generator().manual_seed(0)
    widths = []
    for examples in (100, 10_000):
        right = torch.rand(3, 2, examples, generator=draw) > torch.tensor([0.1, 0.3])[:, None]
        low, high = stats.band(right)
        truth = np.array([10.0, 30.0])
        assert ((low < truth + 3) & (truth - 3 < high)).all()
        widths.append((high - low).mean())
    assert widths[1] < widths[0] / 4
    assert widths[0] == pytest.approx(2 * 1.96 * 100 * np.sqrt(0.15 / 100), rel=0.6)
