from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ibp_triton.harness import grid, loading, presets
from ibp_triton.harness.loading import ConfigError

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loading.load(path, overrides)
    return str(caught.value)


def test_unknown_key_names_file_key_path_and_nearest_key(tree: Tree, write: Write) -> None:
    tree["training"]["epoch"] = 3
    path = write(tree)
    assert refusal(path) == f"{path}: training.epoch: unknown key; did you mean epochs?"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("training.epochs", "'many'", "training.epochs: Input should be a valid integer, got 'many'"),
        ("training.epochs", "0", "training.epochs: Input should be greater than or equal to 1, got 0"),
        ("training.learning_rate", "-1.0", "training.learning_rate: Input should be greater than 0"),
        ("network.pool", "ciel", "network.pool: Input should be 'ceil', 'torch-ceil' or 'floor', got 'ciel'"),
        ("methods.loss_ibp.bta", "1", "methods.loss_ibp.bta: unknown key; did you mean beta?"),
        ("methods.sgd", "{}", "methods.sgd: 'sgd' is no method; choose one of bp, loss_ibp"),
        ("methods.bp", "{beta: 1.0}", "methods.bp: bp takes no beta"),
        ("methods.at", "{}", "methods.at: at needs epsilon"),
        ("methods.fast_at", "{epsilon: 0.1, norm: 2}", "methods.fast_at: fast_at takes neither norm nor semantics"),
        ("methods.loss_ibp.beta", "[]", "methods.loss_ibp.beta: give at least one number"),
        ("methods.loss_ibp.beta", "[0.1, 0.2]", "set data.validation to a number of examples, or select: test"),
        ("network", "{hidden: 3}", "network: give either name (paper_mnist, paper_cifar10) or import"),
        ("preset", "toolbox", "preset: Input should be 'paper', 'toolbox-2015' or 'toolbox-2016', got 'toolbox'"),
        ("training", "3", "training: Input should be a valid dictionary"),
    ],
)
def test_faults_are_named(tree: Tree, write: Write, key: str, value: str, expected: str) -> None:
    assert expected in refusal(write(tree), f"{key}={value}")


def test_one_line_for_each_fault(tree: Tree, write: Write) -> None:
    lines = refusal(write(tree), "training.epochs=none", "data.mean=median").splitlines()
    assert len(lines) == 2
    assert "data.mean" in lines[0]
    assert "training.epochs" in lines[1]


def test_fault_in_a_variant_names_the_variant(tree: Tree, write: Write) -> None:
    tree["variants"] = {"small": {"training.epoch": 1}}
    assert "variants.small: training.epoch: unknown key; did you mean epochs?" in refusal(write(tree))


def test_malformed_missing_and_doubled(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    assert "cannot be read" in refusal(path)
    path.write_text("name: [", encoding="utf-8")
    assert f"{path}: line 1" in refusal(path)
    path.write_text("- 1", encoding="utf-8")
    assert "expected a mapping" in refusal(path)
    path.write_text("name: a\nname: b", encoding="utf-8")
    assert "key 'name' is given twice" in refusal(path)
    path.write_bytes(b"\x00\xff")
    assert "not a text file in UTF-8" in refusal(path)
    path.write_text("extends: other.yaml", encoding="utf-8")
    (tmp_path / "other.yaml").write_text("extends: broken.yaml", encoding="utf-8")
    assert "other.yaml: extends: expected the name of another YAML file" in refusal(path)


def test_overrides_and_numbers_with_exponents(tree: Tree, write: Write) -> None:
    plan = loading.load(
        write(tree), ["training.learning_rate=1e-3", "methods.loss_ibp.beta=5E-4", "network=paper_mnist"]
    )
    assert plan.experiment.training.learning_rate == 0.001
    assert grid.runs(plan)[1].method.parameter == 0.0005
    assert plan.experiment.network.hidden == 256
    assert "write key.path=value" in refusal(write(tree), "training.epochs")
    assert "name holds a plain value" in refusal(write(tree), "name.first=x")


def test_presets_fill_only_what_is_left_open(tree: Tree, write: Write) -> None:
    del tree["network"]["init"]
    experiment = loading.load(write({**tree, "preset": "toolbox-2016"})).experiment
    assert (experiment.network.pool, experiment.network.init) == ("floor", "uniform")
    assert (experiment.data.mean, experiment.training.at_gradient) == ("channel", "sum")
    mine = loading.load(write({**tree, "preset": "toolbox-2016"}), ["network.pool=ceil"]).experiment
    assert (mine.network.pool, mine.network.init) == ("ceil", "uniform")


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_crop_of_cifar_networks(tree: Tree, write: Write, preset: str) -> None:
    tree["network"] = "paper_cifar10"
    experiment = loading.load(write({**tree, "preset": preset})).experiment
    assert experiment.data.crop == (None if preset == "toolbox-2016" else 28)


def test_scaling_of_augmentation_follows_the_preset(tree: Tree, write: Write) -> None:
    tree["training"]["augment"] = {}
    for preset, scaling in (("paper", "uniform"), ("toolbox-2015", "log-uniform")):
        augment = loading.load(write({**tree, "preset": preset})).experiment.training.augment
        assert augment is not None
        assert augment.scaling == scaling


def test_plan_text_loads_to_the_same_runs(tree: Tree, write: Write, tmp_path: Path) -> None:
    tree["variants"] = {"a": {"preset": "paper"}, "b": {"preset": "toolbox-2016", "training.epochs": 3}}
    plan = loading.load(write(tree), ["seeds=[4]"])
    again = tmp_path / "again.yaml"
    again.write_text(plan.text(), encoding="utf-8")
    assert [run.name for run in grid.runs(loading.load(again))] == [run.name for run in grid.runs(plan)]
