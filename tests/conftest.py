"""Which of the two kinds of process this is: kernels are interpreted here, and compiled in tests/compiled alone."""

import os
from pathlib import Path

import pytest

collect_ignore: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Triton reads TRITON_INTERPRET once, when it is imported: before any test module, or conftest of one, is."""
    paths = [Path(argument.split("::")[0]) for argument in config.args]
    if not all("compiled" in path.parts for path in paths):
        os.environ["TRITON_INTERPRET"] = "1"
        collect_ignore.append("compiled")
