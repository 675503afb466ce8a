from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

Tree = dict[str, Any]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tree() -> Tree:
    """A run of a second: 64 synthetic 16×16 images, a narrow network, two epochs."""
    return {
        "name": "tiny",
        "data": {
            "source": "synthetic",
            "size": 16,
            "channels": 1,
            "classes": 4,
            "examples": 64,
            "holdout": 32,
        },
        "network": {"name": "paper_mnist", "widths": [4, 4], "hidden": 8, "init": "uniform"},
        "training": {"epochs": 2, "batch_size": 16},
        "methods": {"bp": None, "loss_ibp": {"beta": 0.03}},
        "seeds": [0, 1],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Tree], Path]:
    def write_yaml(tree: Tree) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({"output": str(tmp_path / "out"), **tree}), encoding="utf-8")
        return path

    return write_yaml
