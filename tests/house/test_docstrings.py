"""Every public name says what it does and names its parameters; help(ibp.LossIBP) explains β."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import ibp_triton as ibp

PUBLIC = {name: getattr(ibp, name) for name in ibp.__all__}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
FUNCTIONS |= {f"{name}.gradients": ibp.reference.gradients for name in ("reference",)}
FUNCTIONS |= {f"attacks.{name}": f for name, f in vars(ibp.attacks).items() if name == "from_torchattacks"}
SIMILAR = re.compile(r"[Aa]rguments as")  # of another that names them


def methods() -> Iterator[tuple[str, Any]]:
    """Those of public classes that users call; a recipe takes what the library hands it."""
    for name, cls in CLASSES.items():
        for attribute, value in vars(cls).items():
            public = attribute == "__call__" or not attribute.startswith("_")
            if inspect.isfunction(value) and public and attribute not in ("recipe", "parts_of"):
                yield f"{name}.{attribute}", value


METHODS = dict(methods())


def said(of: Any) -> str:
    found = inspect.getdoc(of) or ""
    assert len(found.splitlines()[0]) > 10, of
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_names_its_parameters_and_what_they_are(name: str) -> None:
    text = said(FUNCTIONS[name])
    for parameter in inspect.signature(FUNCTIONS[name]).parameters:
        assert re.search(rf"^ +{parameter}: \S", text, re.MULTILINE), parameter


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_names_its_parameters_or_attributes(name: str) -> None:
    cls = CLASSES[name]
    if issubclass(cls, BaseException):
        return
    names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else list(parameters(cls))
    text = said(cls)
    for parameter in names:
        assert SIMILAR.search(text) or re.search(rf"^ +{parameter}: \S", text, re.MULTILINE), parameter


def parameters(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name != "self"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_its_parameters(name: str) -> None:
    text = said(METHODS[name])
    for parameter in inspect.signature(METHODS[name]).parameters:
        assert parameter == "self" or SIMILAR.search(text) or re.search(rf"\b{parameter}\b", text), parameter


def test_help_explains_beta() -> None:
    text = said(ibp.LossIBP)
    beta = text.partition("beta:")[2].partition("norm:")[0]
    for word in ("unit of x", "batch size", "norm 1", "each sample's"):
        assert word in " ".join(beta.split()), word
    assert '"exact"' in text.partition("semantics:")[2]
    assert "Eq. 8 of the paper" in text
    for cls in ibp.METHODS.values():
        for field in dataclasses.fields(cls):
            assert re.search(rf"^ +{field.name}: \S", said(cls), re.MULTILINE), (cls, field.name)
