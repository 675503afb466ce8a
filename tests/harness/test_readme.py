from __future__ import annotations

import re
from pathlib import Path

import torch

from ibp_triton.harness import models

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_examples_run_as_printed() -> None:
    section = README.split("## As a library")[1].split("\n## ")[0]
    code = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    model = models.paper_mnist((1, 16, 16), 4, widths=[4, 4], hidden=8, init="uniform")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    images = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    names = {
        "model": model,
        "other": models.paper_mnist((1, 16, 16), 4, widths=[2, 2], hidden=8, init="uniform"),
        "x": images - images.mean(),
        "labels": torch.arange(8) % 4,
        "images": images,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
    }
    exec(code, names)
    assert not all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_every_file_and_config_that_is_named_exists() -> None:
    for name in re.findall(r"configs/\w+\.yaml|docs/\w+\.md", README):
        assert (ROOT / name).is_file(), name
    table = re.findall(r"^\| ([a-z0-9_*, ]+) \|", README.split("| file in configs/")[1].split("## ")[0], re.MULTILINE)
    for name in ", ".join(table).split(", "):
        assert list((ROOT / "configs").glob(f"{name}.yaml")), name


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)", README):
        assert f"\n{target}:" in makefile


def test_the_table_of_examples_names_every_script() -> None:
    named = re.findall(r"^\| (\w+) \|", README.split("| examples/ |")[1].split("\n## ")[0], re.MULTILINE)
    assert sorted(named) == sorted(path.stem for path in (ROOT / "examples").glob("[!_]*.py"))
