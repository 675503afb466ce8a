"""What the paper leaves open, bundled: the choices of the authors' toolbox in 2015 and 2016, and the paper's own words.

A preset only fills fields that a YAML file leaves out. `paper` takes the choices of 2015 wherever the paper is silent.
"""

from __future__ import annotations

import copy
from typing import Any

from ibp_triton.harness.config import Preset

Tree = dict[str, Any]

_TOOLBOX_2015: Tree = {
    "data": {"mean": "pixel"},
    "network": {"pool": "ceil", "init": "normal"},
    "training": {"momentum": 0.9, "dampening": 0.9, "beta_decay": True, "at_gradient": "mean"},
    "augmentation": {"scaling": "log-uniform"},
}
_TOOLBOX_2016: Tree = {
    "data": {"mean": "channel"},
    "network": {"pool": "floor", "init": "uniform"},
    "training": {"momentum": 0.9, "dampening": 0.9, "beta_decay": True, "at_gradient": "sum"},
    "augmentation": {"scaling": "log-uniform"},
}
PRESETS: dict[Preset, Tree] = {
    "paper": {**_TOOLBOX_2015, "augmentation": {"scaling": "uniform"}},
    "toolbox-2015": _TOOLBOX_2015,
    "toolbox-2016": _TOOLBOX_2016,
}
_CIFAR_CROP: dict[Preset, int | None] = {"paper": 28, "toolbox-2015": 28, "toolbox-2016": None}


def fill(tree: Tree) -> Tree:
    """The tree of a YAML file with the fields of its preset under it; unknown presets are left to validation."""
    name = tree.get("preset", "toolbox-2015")
    if name not in PRESETS:
        return tree
    preset = copy.deepcopy(PRESETS[name])
    network = tree.get("network")
    if isinstance(network, dict) and "import" in network:
        preset["network"] = {}
    if isinstance(network, dict) and network.get("name") == "paper_cifar10":
        preset["data"]["crop"] = _CIFAR_CROP[name]
    augmentation = preset.pop("augmentation")
    training = tree.get("training")
    if isinstance(training, dict) and training.get("optimizer") is not None:
        del preset["training"]["momentum"], preset["training"]["dampening"]
    if isinstance(training, dict) and isinstance(training.get("augment"), dict):
        preset["training"]["augment"] = augmentation
    return merge(preset, tree)


def merge(under: Tree, over: Tree) -> Tree:
    """Both trees in one, mapping by mapping; `over` wins."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
