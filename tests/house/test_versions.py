"""Python 3.10 to 3.13: the sources are right in each, the constraints name one version of each package for each."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
SOURCES = [
    path for name in ("ibp_triton", "tests", "examples", "benchmarks", "docs") for path in (ROOT / name).rglob("*.py")
]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_sources_have_the_oldest_versions_syntax() -> None:
    assert len(SOURCES) > 200
    for path in SOURCES:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


def test_the_oldest_version_is_the_one_that_is_checked_everywhere() -> None:
    """mypy knows which names the standard library of 3.10 lacks."""
    assert re.search(r'^requires-python = ">=3.10"', PYPROJECT, re.MULTILINE)
    assert re.search(r'^python_version = "3.10"', PYPROJECT, re.MULTILINE)
    assert re.search(r'^target-version = "py310"', PYPROJECT, re.MULTILINE)
    assert f"\nVERSIONS = {' '.join(VERSIONS)}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_interpreter_that_is_found_compiles_the_sources(version: str) -> None:
    python = shutil.which(f"python{version}")
    script = (
        "import sys; [compile(open(f, encoding='utf-8').read(), f, 'exec') for f in sys.argv[1:]]; print(sys.version)"
    )
    command = [python or "", "-W", "error", "-c", script, *map(str, SOURCES)]
    found = subprocess.run(command, capture_output=True, text=True, check=False) if python else None
    if found is None or (found.returncode == 127 and "not found" in found.stderr):
        pytest.skip(f"there is no Python {version}")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f"{version}.")


def applying(version: str) -> list[Requirement]:
    """The constraints that hold on Linux, for this version of Python."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    about = {
        "python_version": version,
        "python_full_version": f"{version}.9",
        "sys_platform": "linux",
        "os_name": "posix",
    }
    about |= {"platform_system": "Linux", "platform_machine": "x86_64", "platform_python_implementation": "CPython"}
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.marker is None or one.marker.evaluate({**about})]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_constraints_name_one_version_of_each_package(version: str) -> None:
    """Whether they fit each other `make resolve` asks an index of packages."""
    count = Counter(canonicalize_name(one.name) for one in applying(version))
    assert set(count.values()) == {1}
    assert {"torch", "numpy", "triton", "pytest", "mkdocs-material", "transformers"} <= set(count)
