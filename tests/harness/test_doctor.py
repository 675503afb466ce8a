from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ibp_triton.harness import files, remotes
from ibp_triton.harness.cli import app


def found(monkeypatch: pytest.MonkeyPatch, root: Path) -> dict[str, dict[str, str | None]]:
    monkeypatch.setenv(files.ENVIRONMENT, str(root))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    return {one["name"]: one for one in json.loads(result.output)}


def test_it_says_what_is_there_what_it_is_for_and_what_mends_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mnist").mkdir()
    for name in remotes.IDX_NAMES:
        (tmp_path / "mnist" / f"{name}.gz").write_bytes(b"")
    monkeypatch.setenv("CXX", "no-such-compiler")
    machine = found(monkeypatch, tmp_path)
    assert machine["mnist"] == {"name": "mnist", "found": str(tmp_path), "use": "data.source: mnist", "cure": ""}
    assert machine["cifar10"]["found"] is None
    assert str(tmp_path / "cifar-10-batches-bin") in (machine["cifar10"]["cure"] or "")
    assert machine["C++ compiler"]["found"] is None
    assert "CXX" in (machine["C++ compiler"]["cure"] or "")
    assert machine["torch"]["found"]
    assert "GiB free" in (machine["disk, here"]["found"] or "")


def test_it_says_it_to_people_too(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ("torch", "GPU", "C++ compiler", "cifar10", "to mend it"))
