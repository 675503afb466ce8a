"""Finished runs in one file: the same report, the same names, nothing trained twice, damage named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ibp_triton.errors import ConfigError, DamageError
from ibp_triton.harness import grid, kept, loading, store
from ibp_triton.harness.cli import app
from ibp_triton.harness.report import Findings, tables, write_report

RESULTS = Path(__file__).parents[2] / "results"
Tree = dict[str, Any]
Write = Callable[[Tree], Path]


@pytest.fixture
def trained(tree: Tree, write: Write, tmp_path: Path) -> Path:
    """The folder of a finished experiment of four runs."""
    tree["evaluate"] = {"adversarial": [0.0, 0.1], "masking": 0.1}
    assert CliRunner().invoke(app, ["run", str(write(tree)), "--quiet"]).exit_code == 0
    return tmp_path / "out"


@pytest.fixture
def small(trained: Path, tmp_path: Path) -> Path:
    """The same, kept, its runs gone."""
    done = CliRunner().invoke(app, ["keep", str(trained), str(tmp_path / "kept")])
    assert done.exit_code == 0, done.output
    shutil.rmtree(trained)
    return tmp_path / "kept"


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_report_of_kept_runs_is_that_of_their_folders(trained: Path, tmp_path: Path) -> None:
    plan = loading.load(trained / "experiment.yaml")
    for folder in (trained / "runs").iterdir():
        (folder / store.CHECKPOINT).unlink()  # only it can draw pictures of examples
    before = write_report(plan, trained / "runs", tmp_path / "before", png=False)
    assert command("keep", trained, tmp_path / "kept").exit_code == 0
    names = sorted(folder.name for folder in (trained / "runs").iterdir())
    shutil.rmtree(trained)
    after = write_report(plan, tmp_path / "kept" / "runs", tmp_path / "after", png=False)
    assert len(before) == len(after) > 8
    for one, other in zip(before, after, strict=True):
        assert (
            one.read_bytes()
            == other.read_bytes()
            == (tmp_path / "kept" / one.relative_to(tmp_path / "before")).read_bytes()
        )
    assert sorted(kept.read(tmp_path / "kept" / "runs.jsonl")[0]) == names == sorted(r.name for r in grid.runs(plan))
    files = {path.suffix for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert files == {".yaml", ".jsonl", ".html", ".md", ".csv", ".svg"}


def test_run_on_a_kept_folder_trains_what_is_missing_alone(small: Path) -> None:
    listed = command("run", small, "--dry-run", "--json")
    assert {one["state"] for one in json.loads(listed.output)} == {"finished"}
    assert not (small / "runs").exists()
    done = command("run", small, "--set", "seeds=[0,1,2]")
    assert "6 runs, 4 finished before" in done.output, done.output
    assert done.exit_code == 0
    found = Findings(loading.load(small / "experiment.yaml"), small / "runs")
    assert tables.state(found).startswith("6 of 6 runs are finished.")
    assert command("keep", small, small).exit_code == 0
    assert len(kept.read(small / "runs.jsonl")[0]) == 6


def test_keeping_fewer_runs_loses_none(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    assert kept.keep(trained / "runs", file) == 4
    text = file.read_bytes()
    shutil.rmtree(sorted((trained / "runs").iterdir())[0])
    assert kept.keep(trained / "runs", file) == 4
    assert file.read_bytes() == text


def _flipped(line: str) -> str:
    return line.replace('"test_error": ', '"test_error": 1', 1)


def _elsewhere(line: str) -> str:
    """A sound line that would write outside the folder."""
    record = {**json.loads(line), "run": "../elsewhere"}
    return json.dumps({**record, store.SEAL: kept.seal(record)})


@pytest.mark.parametrize(
    "damage",
    [_flipped, _elsewhere, lambda line: line[:100], lambda line: "[]", lambda line: "\\", lambda line: "[" * 99_999],
)
def test_a_damaged_line_is_named_and_nothing_is_trained_for_it(small: Path, damage: Callable[[str], str]) -> None:
    file = small / "runs.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[1] = damage(lines[1])
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    state = tables.state(Findings(loading.load(small / "experiment.yaml"), small / "runs"))
    assert state.startswith("3 of 4 runs are finished.")
    assert f"count as not finished: {file}, line 2 (" in state
    assert command("report", small).exit_code == 0
    for refused in (["run", small], ["keep", small, small]):
        with pytest.raises(DamageError, match=r"runs.jsonl, line 2 .*: damaged; restore the file, or delete the line"):
            raise command(*refused).exception
    assert not (small.parent / "elsewhere").exists()
    assert file.read_text(encoding="utf-8").splitlines() == lines


def test_an_interrupted_run_folder_is_made_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json = store.write_json

    def stop(path: Path, value: Any, last: bool = True) -> None:
        if path.name == store.RESULT:
            raise KeyboardInterrupt
        write_json(path, value, last)

    root = small / "runs"
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            kept.unpack(root)
    (started,) = root.iterdir()
    assert store.result(started) is None
    kept.unpack(root)
    assert all(store.result(folder) for folder in root.iterdir())
    assert len(list(root.iterdir())) == 4


def test_a_file_is_written_whole_or_not_at_all(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "runs.jsonl"
    kept.keep(trained / "runs", file)
    text = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    result = next((trained / "runs").iterdir()) / store.RESULT
    store.write_json(result, {**(store.read_json(result) or {}), "test_error": 99.0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            kept.keep(trained / "runs", file)
    assert file.read_bytes() == text
    assert [path.name for path in tmp_path.iterdir() if "runs.jsonl" in path.name] == ["runs.jsonl"]


def test_what_cannot_be_kept_is_refused(trained: Path, tmp_path: Path) -> None:
    for folder in (trained / "runs").iterdir():
        (folder / store.RESULT).unlink()
    for refused in (
        ["keep", trained, tmp_path / "kept"],
        ["keep", tmp_path, tmp_path / "kept"],
        ["run", trained / "runs"],
    ):
        assert isinstance(command(*refused).exception, ConfigError)
    assert not (tmp_path / "kept").exists()


def test_kept_results_are_sound() -> None:
    files = sorted(RESULTS.rglob("runs.jsonl"))
    assert len(files) >= 8
    assert [lost for file in files for lost in kept.read(file)[1]] == []
    assert not list(RESULTS.rglob("result.json"))


@pytest.mark.parametrize("name", ["table1_mnist", "prediction_ibp_mnist"])
def test_kept_tables_are_what_report_writes(name: str) -> None:
    folder = RESULTS / name
    found = Findings(loading.load(folder / "experiment.yaml"), folder / "runs")
    assert (folder / "tables.md").read_text(encoding="utf-8") == tables.markdown(found)
