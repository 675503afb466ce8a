"""The house: no name twice, one table of each kind of name, one error tree."""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict
from pathlib import Path
from typing import get_args

import pytest

import ibp_triton as ibp
from ibp_triton import errors
from ibp_triton.harness import config, evaluate, models, presets, remotes, sources
from ibp_triton.harness.report import paper

ROOT = Path(ibp.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")


def classes(path: Path) -> list[ast.ClassDef]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef)]


def test_every_package_is_in_the_wheel() -> None:
    text = (ROOT.parent / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'^    "(ibp_triton[\w.]*)",', text, re.MULTILINE)
    found = {".".join(path.parent.relative_to(ROOT.parent).parts) for path in ROOT.rglob("*.py")}
    assert set(listed) == found | {"ibp_triton.configs", "ibp_triton.configs.bench"}


def test_no_two_modules_and_no_two_classes_have_one_name() -> None:
    places = defaultdict(list)
    for path in FILES:
        places[path.name].append(str(path))
        for node in classes(path):
            places[node.name].append(f"{path}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_every_error_of_the_package_stands_in_one_tree() -> None:
    bases = {node.name: " ".join(map(ast.unparse, node.bases)) for path in FILES for node in classes(path)}
    own = [name for name, text in bases.items() if re.search(r"Error\b|Exception\b", text) and name.endswith("Error")]
    found = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls)}
    assert sorted(own) == sorted(found)
    drawn = re.findall(r"^[│ ├└─]*(\w+Error)\b(?: \((\w+)\))?", errors.__doc__ or "", re.M)
    assert sorted(name for name, _ in drawn) == sorted(found)
    for name, base in drawn:
        assert issubclass(found[name], errors.IBPError)
        assert not base or base in {cls.__name__ for cls in found[name].__bases__}


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (config.SourceName, sources.SOURCES),
        (config.Preset, presets.PRESETS),
        (config.Precision, models.PRECISIONS),
        (config.PublishedTable, paper.TABLES),
        (config.NetworkName, [name for name in config.NetworkName.__args__ if hasattr(models, name)]),
    ],
)
def test_what_a_file_may_name_is_what_there_is(names: object, table: list[str]) -> None:
    assert set(get_args(names)) == set(table)


def test_curves_and_public_sets_are_those_a_file_can_ask_for() -> None:
    levels = [name for name, field in config.Evaluate.model_fields.items() if field.annotation == config.Levels]
    assert sorted(levels) == sorted(evaluate.CURVES)
    assert set(remotes.PUBLIC) < set(sources.SOURCES)


def test_the_tree_of_files_in_the_readme_is_there() -> None:
    text = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    block = text.partition("## Where things are")[2].partition("## Glossary")[0]
    places = {path.relative_to(ROOT.parent).as_posix() for path in ROOT.rglob("*") if "__pycache__" not in path.parts}
    for name in re.findall(r"\b([a-z_0-9]+\.py)\b", block):
        assert any(place.endswith(f"/{name}") for place in places), name
