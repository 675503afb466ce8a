"""The documentation names what there is: every public name, every page, the tree of files; its code runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

import ibp_triton as ibp

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def test_the_reference_has_every_public_name_and_no_other() -> None:
    listed = re.findall(r"^::: ibp_triton\.(\w+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted([*ibp.__all__, "errors"])


def test_every_page_stands_in_the_menu() -> None:
    named = re.findall(r": ([\w/]+\.(?:md|py))$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    there = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*") if path.suffix in (".md", ".py")]
    assert sorted(named) == sorted(there)


def test_the_cost_table_is_what_the_recipes_say() -> None:
    text = (DOCS / "methods.md").read_text(encoding="utf-8").partition("## What they cost")[2]
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\|[^|]*\| ([^|]*\|[^|]*\|[^|]*)\|", text, re.MULTILINE))
    assert set(rows) == {method.__name__ for method in ibp.METHODS.values()}
    for one in (ibp.BP(), ibp.AdversarialTraining(0.1), ibp.FastAdversarialTraining(0.1)):
        assert rows[type(one).__name__].split("|")[0].strip() == str(one.sweeps)
    for cls in (ibp.LossIBP, ibp.PredictionIBP, ibp.TangentBP, ibp.FastTangentBP, ibp.JacobianRegularisation):
        cells = rows[cls.__name__].split("|")
        assert cells[0].strip() == str(cls(1.0, semantics="paper").sweeps)
        assert cells[2].strip() == str(cls(1.0, semantics="exact").sweeps)
    for steps in (1, 10):
        for name, one in {
            "PGDTraining": ibp.PGDTraining(1.0, 0.1, steps),
            "TRADES": ibp.TRADES(1.0, 1.0, 0.1, steps),
        }.items():
            more = re.match(r"2k \+ (\d+) ", rows[name])
            assert more is not None
            assert 2 * steps + int(more[1]) == one.sweeps


def test_the_tour_runs_as_printed() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "index.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})


@pytest.mark.parametrize("name", ["loss", "model", "data"])
def test_the_losses_and_models_of_the_how_to_pages_run(name: str) -> None:
    text = (DOCS / "howto" / f"{name}.md").read_text(encoding="utf-8")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    names = {
        "torch": torch, "nn": torch.nn, "ibp": ibp, "w": torch.ones(2), "p": torch.ones(2), "model": model,
        "method": ibp.LossIBP(0.1), "x": torch.rand(4, 1, 8, 8), "images": torch.rand(4, 1, 8, 8),
        "mean": 0.1, "std": 0.3, "y": torch.arange(4) % 2,
    }  # fmt: skip
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """To files that exist; the package's own description, on an index of packages, has none that are relative."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    near = [link.partition("#")[0] for link in links if "://" not in link and not link.startswith("#")]
    assert [link for link in near if not (page.parent / link).exists()] == []
    if page == ROOT / "README.md":
        assert near == []
        assert f'readme = "{page.relative_to(ROOT).as_posix()}"' in (ROOT / "pyproject.toml").read_text(
            encoding="utf-8"
        )


def test_what_contributing_names_is_there() -> None:
    for name in re.findall(r"`((?:ibp_triton|tests|docs|configs)/[\w./]+)`", CONTRIBUTING):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"(?<![\w/.`])(docs/\w+\.md)", CONTRIBUTING):
        assert (ROOT / name).is_file(), name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)`", CONTRIBUTING):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in re.findall(r"python -m ([\w.]+)", CONTRIBUTING):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module


def test_the_tree_of_the_readme_has_every_folder_and_module_of_the_library() -> None:
    """Modules of folders that are told in one line (rules of the backend, kernels, bench, report) need not be named."""
    tree = README.partition("## Where things are")[2].partition("## Glossary")[0]
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not files:
        pytest.skip("not a checkout")
    for folder in {name.partition("/")[0] for name in files if "/" in name and not name.startswith(".")}:
        assert f"{folder}/" in tree, folder
    for name in files:
        parts = Path(name).parts
        if parts[0] == "ibp_triton" and len(parts) == 2 and name.endswith(".py") and not parts[1].startswith("__"):
            assert parts[1] in tree, name
        if parts[0] == "ibp_triton" and len(parts) > 2:
            assert f"{parts[1]}/" in tree, name
