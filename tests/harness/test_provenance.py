from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ibp_triton.errors import LaunchError
from ibp_triton.harness import grid, kept, loading, plugins, provenance, store
from ibp_triton.harness.cli import app
from ibp_triton.harness.launch import Job, launch, remaining

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
ROOT = Path(__file__).parents[2]
MODEL = "from torch import nn\nfrom {name}_parts import width\n"
MODEL += (
    "def build(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, classes))\n"
)


def arrays(path: Path, seed: int) -> Path:
    draw = np.random.default_rng(seed)
    x, y = draw.random((48, 8, 8), np.float32), np.arange(48) % 3
    np.savez(path, x_train=x, y_train=y, x_test=x[:12], y_test=y[:12])
    return path


@pytest.fixture
def own(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Tree:
    """Own data, and an own model in a module of this test's name, beside one that it imports."""
    name = f"model_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODEL.format(name=name), encoding="utf-8")
    (tmp_path / f"{name}_parts.py").write_text("width = 5\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    arrays(tmp_path / "a.npz", 0)
    data = {"source": "arrays", "path": str(tmp_path / "a.npz")}
    return {**tree, "data": data, "network": {"import": f"{name}:build"}, "methods": {"bp": None}, "seeds": [0]}


def job(path: Path, root: Path, **more: Any) -> Job:
    return Job(grid.runs(loading.load(path)), root, **more)


def run_all(task: Job) -> list[str]:
    done: list[str] = []
    assert launch(task, 1, lambda event: done.append(event["run"]) if event["kind"] == "done" else None) == []
    return done


def test_stored_runs_keep_their_names() -> None:
    files = [kept.read(file) for file in (ROOT / "results").rglob("runs.jsonl")]
    records = {name: record for stored, _ in files for name, record in stored.items()}
    assert len(records) > 50
    for name, record in records.items():
        assert grid.Run.from_config(record["config"]).name == name


@pytest.mark.parametrize("what", ["data", "code", "part"])
def test_changed_data_or_code_are_refused_until_accepted(own: Tree, write: Write, tmp_path: Path, what: str) -> None:
    path, root = write(own), tmp_path / "runs"
    (name,) = run_all(job(path, root))
    assert run_all(job(path, root)) == []
    module = own["network"]["import"].partition(":")[0]
    if what == "data":
        arrays(tmp_path / "a.npz", 1)
    else:
        source = tmp_path / (f"{module}.py" if what == "code" else f"{module}_parts.py")
        source.write_text(source.read_text(encoding="utf-8") + "# another\n", encoding="utf-8")
    kind = "data.path" if what == "data" else "network.import"
    with pytest.raises(LaunchError, match=rf"{kind} .* changed since 1 of these runs .*--accept-changed"):
        launch(job(path, root), 1, lambda _: None)
    before = (root / name / store.CHECKPOINT).read_bytes()
    assert run_all(job(path, root, accept_changed=True)) == []
    assert run_all(job(path, root)) == []
    assert (root / name / store.CHECKPOINT).read_bytes() == before
    config = store.read_json(root / name / store.CONFIG)
    assert config is not None
    assert len(config["accepted"]) == 1


def test_a_checkpoint_is_not_evaluated_on_other_data_without_a_word(
    own: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = run_all(job(write(own), tmp_path / "runs"))
    monkeypatch.chdir(tmp_path / "runs" / name)
    assert CliRunner().invoke(app, ["evaluate", "."]).exit_code == 0
    arrays(tmp_path / "a.npz", 1)
    result = CliRunner().invoke(app, ["evaluate", "."])
    assert isinstance(result.exception, LaunchError)
    assert CliRunner().invoke(app, ["evaluate", ".", "--accept-changed"]).exit_code == 0


def test_half_trained_runs_are_not_mixed_from_two_data_sets(own: Tree, write: Write, tmp_path: Path) -> None:
    task = job(write(own), tmp_path / "runs")
    run_all(task)
    (tmp_path / "runs" / task.runs[0].name / store.RESULT).unlink()
    arrays(tmp_path / "a.npz", 1)
    with pytest.raises(LaunchError, match="changed since"):
        launch(task, 1, lambda _: None)


def test_a_comment_elsewhere_and_another_path_change_nothing(own: Tree, write: Write, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    (name,) = run_all(job(write(own), root))
    (tmp_path / "unrelated.py").write_text("x = 1\n", encoding="utf-8")
    (tmp_path / "a.npz").rename(tmp_path / "moved.npz")
    own["data"]["path"] = str(tmp_path / "moved.npz")
    moved = job(write(own), root)
    assert [run.name for run in moved.runs] == [name]
    assert run_all(moved) == []


def test_a_folder_under_the_name_with_the_path_is_used(own: Tree, write: Write, tmp_path: Path) -> None:
    task = job(write(own), tmp_path / "runs")
    (name,) = run_all(task)
    old = task.runs[0].name_with_path
    assert old != name
    (tmp_path / "runs" / name).rename(tmp_path / "runs" / old)
    folder = tmp_path / "runs" / old
    config, result = (store.read_json(folder / file) or {} for file in (store.CONFIG, store.RESULT))
    del config["digests"]  # as they were written then
    store.write_json(folder / store.CONFIG, config)
    store.write_json(folder / store.RESULT, {**result, "run": old})
    assert remaining(task) == {}
    assert run_all(task) == []
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [old]


def test_two_data_sets_of_one_grid_are_two_runs(own: Tree, write: Write, tmp_path: Path) -> None:
    arrays(tmp_path / "b.npz", 1)
    own["variants"] = {"a": {}, "b": {"data.path": str(tmp_path / "b.npz")}}
    task = job(write(own), tmp_path / "runs")
    assert len(set(run_all(task))) == 2
    assert run_all(task) == []
    assert provenance.settle(task.runs, task.root)[1].name == task.runs[1].name_with_path


def test_code_is_the_module_and_what_it_imports_from_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "__init__": "",
        "net": "import torch, json\nfrom . import blocks\nfrom .deep.more import x\nfrom ibp_triton import BP\n",
        "blocks": "from pkg_of_test import net, not_a_module\n",
        "deep/__init__": "",
        "deep/more": "from ..other import y\n",
        "other": "this is no python",
        "unused": "",
    }.items():
        path = tmp_path / "pkg_of_test" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    names = {"", ".net", ".blocks", ".deep", ".deep.more", ".other"}
    assert set(plugins.code_files("pkg_of_test.net:build")) == {f"pkg_of_test{name}" for name in names}
    assert plugins.code_files("no_such_module:build") == {}
