"""Work that goes to another machine: with its folder and its modules, or an error that names the folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ibp_triton.errors import LaunchError
from ibp_triton.harness.executors.parcel import Parcel


def test_it_is_opened_in_its_folder_with_its_modules_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_there.py").write_text("class Thing:\n    number = 3\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as there:
        there.setattr(sys, "path", [*sys.path, str(tmp_path)])
        from only_there import Thing  # type: ignore[import-not-found]

        parcel = Parcel.of(Thing, {"a": 1})
    monkeypatch.delitem(sys.modules, "only_there")
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "path", own := list(sys.path))
    before = list(own)
    thing, rest = parcel.open()
    assert (thing.number, rest) == (3, {"a": 1})
    assert Path.cwd() == tmp_path
    assert sys.path[: len(before)] == before


def test_machines_that_need_no_folder_do_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    parcel = Parcel.of(5, apart=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").rmdir()
    assert parcel.open() == (5,)
    assert Path.cwd() == tmp_path


def test_a_folder_that_this_machine_has_not_is_named(tmp_path: Path) -> None:
    parcel = Parcel(str(tmp_path / "shared"), (), b"")
    with pytest.raises(LaunchError, match=r"shared: not to be reached from .*; give the command in a folder that"):
        parcel.open()
