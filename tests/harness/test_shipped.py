"""Experiments by name, `ibp-triton list`, `--version`, completion."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ibp_triton as ibp
from ibp_triton.errors import ConfigError
from ibp_triton.harness import shipped
from ibp_triton.harness.sources import SOURCES
from tests.harness.test_cli import ibp_triton


def command(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ibp_triton", *arguments], capture_output=True, text=True, check=False, cwd=folder
    )


def test_list_names_everything_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(command("list", "--json").stdout)
    assert set(found["methods"]) == set(ibp.METHODS)
    assert set(found["data sources"]) == set(SOURCES)
    assert all(found["data sources"].values())
    root = Path(ibp.__file__).parents[1]
    assert set(found["experiments"]) == {path.stem for path in (root / "configs").glob("*.yaml")}
    assert all(found["experiments"].values())
    assert ibp_triton(monkeypatch, "list") == 0
    assert "quickstart" in capsys.readouterr().out


def test_an_experiment_is_run_by_its_name_from_any_folder(tmp_path: Path) -> None:
    run = command("run", "quickstart", "--dry-run", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "14 runs" in run.stdout
    assert not list(tmp_path.iterdir())


def test_a_file_comes_first_and_a_wrong_name_shows_the_right_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped.find(Path("quickstart")) == shipped.folder() / "quickstart.yaml"
    Path("quickstart").write_text("", encoding="utf-8")
    assert shipped.find(Path("quickstart")) == Path("quickstart")
    with pytest.raises(ConfigError, match=r"table1: no such file, nor one of .* table1_mnist"):
        shipped.find(Path("table1"))


def test_version_and_completion() -> None:
    assert command("--version").stdout == f"ibp-triton {ibp.__version__}\n"
    assert "--install-completion" in command("--help").stdout
