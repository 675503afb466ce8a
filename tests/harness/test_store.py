from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ibp_triton.harness import store


def test_write_replaces_whole_files_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    store.write_bytes(path, b"one")
    store.write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    store.write_bytes(path, b"old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        store.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_json_metrics_and_tensors_come_back(tmp_path: Path) -> None:
    store.write_json(tmp_path / "a.json", {"β": 0.03})
    assert store.read_json(tmp_path / "a.json") == {"β": 0.03}
    assert store.read_json(tmp_path / "none.json") is None
    records = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": None}]
    store.write_metrics(tmp_path, records)
    assert store.read_metrics(tmp_path) == records
    assert store.read_metrics(tmp_path, 1) == records[:1]
    tensors = {"weight": torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)}
    store.write_tensors(tmp_path / "t", tensors, {"epochs": "3"})
    found = store.read_tensors(tmp_path / "t")
    assert found is not None
    assert torch.equal(found[0]["weight"], tensors["weight"])
    assert found[1]["epochs"] == "3"


def test_damaged_tensors_count_as_missing(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"no safetensors")
    assert store.read_tensors(tmp_path / "t") is None
    assert store.read_tensors(tmp_path / "none") is None


HOLD = "import sys, time; from pathlib import Path; from ibp_triton.harness import store\n"
HOLD += "with store.lock(Path(sys.argv[1])) as mine:\n    print(mine, flush=True); time.sleep(60)"


def test_lock_keeps_others_out_until_its_process_dies(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with store.lock(tmp_path) as mine:
            assert not mine
        (tmp_path / ".result.json.half").write_bytes(b"half a file")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with store.lock(tmp_path) as mine:
            assert mine
            assert not (tmp_path / ".result.json.half").exists()
