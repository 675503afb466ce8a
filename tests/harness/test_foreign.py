"""`ibp-triton evaluate package.module:build`: any model's weights and images."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ibp_triton as ibp
from examples.own_model import build
from ibp_triton.harness import cli

TARGET = "examples.own_model:build"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ibp-triton", "evaluate", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    model = build((1, 8, 8), 3)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    labels = np.arange(40) % 3
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "a.pt")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    return tmp_path / "a.pt", tmp_path / "data.npz"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_table_is_that_of_the_library(
    files: tuple[Path, Path], suffix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, data = files
    checkpoint = checkpoint.with_suffix(suffix)
    out = checkpoint.parent / "table.csv"
    options = ["--attack", "fgsm=2/255,8/255", "--attack", "gaussian=0.1", "--mean", "0.5", "--std", "0.25"]
    arguments = [TARGET, "--checkpoint", str(checkpoint), "--data", str(data), *options, "--csv", str(out)]
    assert command(monkeypatch, *arguments) == 0
    assert "40 examples" in capsys.readouterr().out
    assert command(monkeypatch, *arguments, "--quiet") == 0
    assert "".join(capsys.readouterr()) == ""
    torch.manual_seed(0)
    model = build((1, 8, 8), 3)
    with np.load(data) as arrays:
        x, y = torch.from_numpy(arrays["x_test"])[:, None] / 255, torch.from_numpy(arrays["y_test"])
    expected = ibp.robustness(model, (x, y), {"fgsm": [2 / 255, 8 / 255], "gaussian": [0.1]}, mean=0.5, std=0.25)
    assert out.read_text(encoding="utf-8") == expected.to_csv()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_of_torchattacks_by_name(
    files: tuple[Path, Path], norm: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    checkpoint, data = files
    arguments = [TARGET, "--checkpoint", str(checkpoint), "--data", str(data), "--count", "12", "--norm", norm]
    attacks = ["--attack", "torchattacks.APGD=0.02,0.1", "--attack", "torchattacks.FGSM=0.02"]
    made: list[object] = []

    class Recorded(torchattacks.APGD):  # type: ignore[misc, name-defined]
        def __init__(self, model: object, norm: str = "Linf", eps: float = 0.0, seed: int = 0) -> None:
            super().__init__(model, norm=norm, eps=eps, seed=seed)
            made.append((norm, eps))

    monkeypatch.setattr(torchattacks, "APGD", Recorded)
    assert command(monkeypatch, *arguments, *attacks) == 0
    assert made == [(norm.capitalize(), 0.02), (norm.capitalize(), 0.1)]
    assert "torchattacks.FGSM" in capsys.readouterr().out


def test_torchattacks_that_is_not_installed_names_its_extra(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    arguments = [TARGET, "--checkpoint", str(files[0]), "--data", str(files[1]), "--attack", "torchattacks.PGD=0.1"]
    assert command(monkeypatch, *arguments) == 1
    assert "pip install 'ibp-triton[attacks]'" in " ".join(capsys.readouterr().err.split())


WRONG = {
    "no checkpoint": ([TARGET, "--data", "mnist"], "give --checkpoint FILE and --data SOURCE"),
    "no file": ([TARGET, "--checkpoint", "none.pt", "--data", "{data}"], "none.pt does not exist"),
    "no state dict": ([TARGET, "--checkpoint", "{data}", "--data", "{data}"], "can't be read"),
    "no source": (
        [TARGET, "--checkpoint", "{pt}", "--data", "mnits"],
        "nor one of the data sources",
    ),
    "no numbers": ([TARGET, "--checkpoint", "{pt}", "--data", "{data}", "--attack", "fgsm=a"], "no list of numbers"),
    "no attack": ([TARGET, "--checkpoint", "{pt}", "--data", "{data}", "--attack", "fgms=0.1"], "unknown attack"),
    "no foreign attack": (
        [TARGET, "--checkpoint", "{pt}", "--data", "{data}", "--attack", "torchattacks.FGMS=0.1"],
        "torchattacks has no such attack",
    ),
    "no module": (["nowhere:build", "--checkpoint", "{pt}", "--data", "{data}"], "cannot import"),
    "another model": ([TARGET, "--checkpoint", "{other}", "--data", "{data}"], "does not fit the model"),
    "an object": ([TARGET, "--checkpoint", "{object}", "--data", "{data}"], "can't be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(
    files: tuple[Path, Path], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = WRONG[name]
    folder = files[0].parent
    torch.save({"weight": torch.zeros(2)}, folder / "other.pt")
    torch.save({"model": torch.nn.Linear(2, 2)}, folder / "object.pt")
    places = {"pt": files[0], "data": files[1], "other": folder / "other.pt", "object": folder / "object.pt"}
    assert command(monkeypatch, *(a.format(**places) for a in arguments)) == 1
    assert message in " ".join(capsys.readouterr().err.split())
