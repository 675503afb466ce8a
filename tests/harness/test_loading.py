from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ibp_triton.errors import ConfigError
from ibp_triton.harness import grid, loading, presets, yamltext

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loading.load(path, overrides)
    return str(caught.value)


def test_unknown_key_names_file_key_path_and_nearest_key(tree: Tree, write: Write) -> None:
    tree["training"]["epoch"] = 3
    path = write(tree)
    lines = path.read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.strip() == "epoch: 3")
    assert refusal(path) == f"{path}: line {line}: training.epoch: unknown key; did you mean epochs?"
    assert refusal(path, "training.epoch=4") == f"{path}: training.epoch: unknown key; did you mean epochs?"


def test_a_line_is_named_where_the_file_itself_has_the_key(tree: Tree, write: Write, tmp_path: Path) -> None:
    path = write({**tree, "training": {"epochs": 2, "epoch": 3}})
    above = tmp_path / "above.yaml"
    above.write_text("extends: tiny.yaml\ntraining:\n  batch_size: 4\n", encoding="utf-8")
    assert refusal(above) == f"{above}: training.epoch: unknown key; did you mean epochs?"
    above.write_text("extends: tiny.yaml\ntraining:\n  epoch: 4\n", encoding="utf-8")
    assert refusal(above) == f"{above}: line 3: training.epoch: unknown key; did you mean epochs?"
    path.write_text("name: a\ndata: {source: mnist}\nnetwork:\n  hidden: 3\nmethods:\n  bp:\n", encoding="utf-8")
    assert refusal(path).startswith(f"{path}: line 3: network: give either name")
    path.write_text("name: a\nnetwork: paper_mnist\nmethods: {bp: }\ndata:\n  crop: 3\n", encoding="utf-8")
    assert refusal(path) == f"{path}: line 4: data.source: this key is missing"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("training.epochs", "'many'", "training.epochs: Input should be a valid integer, got 'many'"),
        ("training.epochs", "0", "training.epochs: Input should be greater than or equal to 1, got 0"),
        ("training.learning_rate", "-1.0", "training.learning_rate: Input should be greater than 0"),
        ("network.pool", "ciel", "network.pool: Input should be 'ceil', 'torch-ceil' or 'floor', got 'ciel'"),
        (
            "methods.loss_ibp.bta",
            "1",
            "methods.loss_ibp.bta: loss_ibp takes no bta; did you mean beta? its fields: beta, norm, sem",
        ),
        ("methods.sgd", "{}", "methods.sgd: 'sgd' is no method; choose one of bp, loss_ibp"),
        ("methods.bp", "{beta: 1.0}", "methods.bp.beta: bp takes no beta; its fields: none"),
        ("methods.at", "{}", "methods.at: at needs epsilon"),
        (
            "methods.fast_at",
            "{epsilon: 0.1, norm: 2}",
            "methods.fast_at.norm: fast_at takes no norm; its fields: epsilon",
        ),
        ("methods.loss_ibp.beta", "[]", "methods.loss_ibp.beta: give at least one value"),
        ("methods.loss_ibp.beta", "[0.1, 0.2]", "set data.validation to a number of examples, or select: test"),
        ("network", "{hidden: 3}", "network: give either name (paper_mnist, paper_cifar10) or import"),
        ("preset", "toolbox", "preset: Input should be 'paper', 'toolbox-2015' or 'toolbox-2016', got 'toolbox'"),
        ("evaluate.gaussian", "{stop: 1.0e+9, step: 1.0e-9}", "must be 10 000 steps at most; make step larger"),
        ("evaluate.gaussian", "{start: 1, stop: 0, step: 1}", "must be 10 000 steps at most"),
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
    path = write(tree)
    lines = path.read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.strip() == "training.epoch: 1")
    expected = f"variants.small: line {line}: training.epoch: unknown key; did you mean epochs?"
    assert refusal(path) == f"{path}: {expected}"


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


HEAD = "name: a\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("day: 2024-01-01", "line 2: 2024-01-01 is read as a date; put it in quotes"),
        ("seeds: [1, 2024-01-01 10:00:00]", "line 2: 2024-01-01 10:00:00 is read as a date"),
        ("2024-01-01: 1", "line 2: 2024-01-01 is read as a date"),
        ("seeds: !!set {1, 2}", "line 2: !!set has no place in a configuration"),
        ("seeds: !!python/object:os.system {}", "line 2: !!python/object:os.system has no place"),
        ("x: !!binary aGk=", "line 2: aGk= is read as !!binary; leave the tag out"),
        ("output: {{ folder }}", "line 2: a list or mapping stands for a key; put text with {{ }} in quotes"),
        ("training: {epochs: 1:30}", "line 2: 1:30 is read as a number to base 60"),
        ("x: 190:20:30.15", "read as a number to base 60"),
        ("seeds: [010]", "line 2: 010 is read as a number to base 8; write it without the 0, or in quotes"),
        ("methods: {on: {}}", "line 2: the key 'on' is read as true or false; put it in quotes"),
        ("variants: {10: {}}", "line 2: the key '10' is read as a number; put it in quotes"),
        ('variants: {"a\\e[31m": {}}', "holds a character that cannot be shown"),
        ('output: "a\\0b"', "holds a character that no file can"),
        ('title: "\\ud800"', "line 2"),
        ("a: &a [*a]", "line 2: an alias (*name) stands for what it is a part of"),
        ("---\nname: b", "not valid YAML"),
        ("a: " + "[" * 20_000, ""),
        ("a: " + "9" * 5_000, ""),
    ],
)
def test_what_yaml_reads_as_something_else_is_one_sentence(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(HEAD + text, encoding="utf-8")
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 30)]
    (tmp_path / "a.yaml").write_text("\n".join(lines), encoding="utf-8")
    assert "its aliases (*name) stand for" in refusal(tmp_path / "a.yaml")


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    huge, loop, folder = (tmp_path / name for name in ("huge.yaml", "loop.yaml", "folder.yaml"))
    with huge.open("wb") as file:
        file.truncate(100 << 20)
    loop.symlink_to(loop)
    folder.mkdir()
    assert "larger than 10 MB" in refusal(huge)
    assert "loop.yaml: cannot be read" in refusal(loop)
    assert "folder.yaml: cannot be read" in refusal(folder)
    assert "larger than 10 MB" in refusal(Path("/dev/zero"))
    (tmp_path / "a.yaml").write_text("extends: loop.yaml", encoding="utf-8")
    assert "loop.yaml: cannot be read" in refusal(tmp_path / "a.yaml")
    for k in range(40):
        (tmp_path / f"{k}.yaml").write_text(f"extends: {k + 1}.yaml", encoding="utf-8")
    assert "at most 20 in a chain" in refusal(tmp_path / "0.yaml")


def test_merge_keys_fill_what_a_mapping_leaves_out(tree: Tree, write: Write) -> None:
    path = write({**tree, "methods": {"bp": None}})
    text = path.read_text(encoding="utf-8")
    text += "variants:\n  a: &a {training.epochs: 7, training.decay: 0.5}\n  b: {<<: *a, training.epochs: 8}\n"
    path.write_text(text + "  c: {<<: [*a, {seeds: [3]}]}\n", encoding="utf-8")
    found = dict(loading.load(path).variants())
    assert {label: (v.training.epochs, v.training.decay) for label, v in found.items()} == {
        "a": (7, 0.5),
        "b": (8, 0.5),
        "c": (7, 0.5),
    }
    assert found["c"].seeds == [3]


@pytest.mark.parametrize("key", ["name", "evaluate.pgd", "workers", "output", "runs", "select", "compare", "title"])
def test_a_variant_cannot_change_what_is_one_for_all(tree: Tree, write: Write, key: str) -> None:
    message = refusal(write({**tree, "variants": {"a": {key: "x"}}}))
    top = key.partition(".")[0]
    assert f"variants.a: {key}: {top} is one for the whole experiment; set it beside variants:" in message


def test_variants_leave_each_other_and_the_file_alone(tree: Tree, write: Write) -> None:
    tree["variants"] = {"a": {"network.hidden": 9, "training.augment.shift": 1.0}, "b": {"network.widths": [3, 3]}}
    plan = loading.load(write(tree))
    (_, a), (_, b) = plan.variants()
    assert (a.network.hidden, b.network.hidden, b.network.widths, a.network.widths) == (9, 8, [3, 3], [4, 4])
    assert b.training.augment is None
    assert plan.tree["network"] == tree["network"]


def test_labels_that_look_like_numbers_come_back_as_text(tree: Tree, tmp_path: Path) -> None:
    labels = ["1e-3", "010", "1:30", "2024-01-01", "on", "=", "<<", "{{ x }}", "|", "&a", "# no"]
    again = tmp_path / "again.yaml"
    again.write_text(
        yamltext.dump({**tree, "methods": {label: {"method": "bp"} for label in labels}}), encoding="utf-8"
    )
    plan = loading.load(again)
    again.write_text(plan.text(), encoding="utf-8")
    assert list(loading.load(again).experiment.methods) == labels


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seeds": [0, 1, 0]}, "seeds: 0 is given twice"),
        ({"seeds": [0, {"subset": 0, "weights": 0, "order": 0}]}, "seeds: 0 is given twice"),
        ({"methods": {"loss_ibp": {"beta": [0.1, 0.1]}}}, "methods.loss_ibp.beta: 0.1 is given twice"),
        ({"methods": {"at": {"epsilon": [1, 1.0]}}}, "methods.at.epsilon: 1.0 is given twice"),
        ({"variants": {"a": {"seeds": [2, 2]}}}, "seeds: 2 is given twice"),
        ({"name": ".."}, "name: String should match pattern"),
        ({"name": "."}, "name: String should match pattern"),
    ],
)
def test_what_would_count_twice_or_lie_elsewhere_is_refused(
    tree: Tree, write: Write, change: Tree, expected: str
) -> None:
    assert expected in refusal(write({**tree, "select": "test", **change}))


def test_overrides_and_numbers_with_exponents(tree: Tree, write: Write) -> None:
    plan = loading.load(
        write(tree), ["training.learning_rate=1e-3", "methods.loss_ibp.beta=5E-4", "network=paper_mnist"]
    )
    assert plan.experiment.training.learning_rate == 0.001
    assert grid.runs(plan)[1].method.beta == 0.0005
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
