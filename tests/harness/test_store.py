from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ibp_triton.errors import DamageError
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
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with store.lock(tmp_path) as mine:
            assert mine


def test_sweeping_takes_only_our_own_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".eslintrc.json", ".env.local", ".result.json.swp", ".config.json.ibp"):
        (tmp_path / name).write_text("precious", encoding="utf-8")
    (tmp_path / ".deep.ibp-tmp").mkdir()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        store.write_bytes(tmp_path / store.RESULT, b"half")
    monkeypatch.undo()
    (half,) = tmp_path.glob(f".{store.RESULT}.*ibp-tmp")
    store.sweep(tmp_path)
    assert not half.exists()
    assert len(list(tmp_path.iterdir())) == 5


def test_files_follow_the_umask(tmp_path: Path) -> None:
    for mask, mode in ((0o077, 0o600), (0o022, 0o644), (0o002, 0o664)):
        old = os.umask(mask)
        try:
            store.write_bytes(tmp_path / "file", b"")
        finally:
            os.umask(old)
        assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_lock_is_no_link_and_leaves_what_is_in_its_file(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / store.LOCK).write_text("mine", encoding="utf-8")
    with store.lock(tmp_path / "run") as mine:
        assert mine
    assert (tmp_path / "run" / store.LOCK).read_text(encoding="utf-8") == "mine"
    (tmp_path / "precious").write_text("precious", encoding="utf-8")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / store.LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(DamageError, match="a symbolic link"), store.lock(tmp_path / "linked"):
        pass
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "precious"


def test_shared_tensors_are_stored_under_each_name(tmp_path: Path) -> None:
    weight = torch.rand(4, 3)
    store.write_tensors(tmp_path / "t", {"a": weight, "b": weight, "row": weight[0], "empty": torch.zeros(0)})
    found = store.read_tensors(tmp_path / "t")
    assert found is not None
    assert torch.equal(found[0]["a"], weight)
    assert torch.equal(found[0]["b"], weight)
    assert torch.equal(found[0]["row"], weight[0])


def test_a_flipped_bit_belies_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "t"
    store.write_tensors(path, {"a": torch.arange(8.0), "n": torch.tensor(3)}, {"epochs": "1"})
    assert store.read_tensors(path) is not None
    raw = bytearray(path.read_bytes())
    for position in (len(raw) - 1, raw.index(b'"epochs":"1"') + 10):
        damaged = bytearray(raw)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert store.read_tensors(path) is None


def test_what_was_there_before_is_kept(tmp_path: Path) -> None:
    for content in (b"one", b"two", b"three"):
        store.write_bytes(tmp_path / "file", content, tmp_path / "before")
    assert (tmp_path / "before").read_bytes() == b"two"


@pytest.mark.parametrize("text", ["{", "[]", "null", "\xff", "[" * 100_000])
def test_damaged_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(DamageError, match=r"a.json: damaged"):
        store.read_json(tmp_path / "a.json")
    assert store.find_json(tmp_path / "a.json") is None


@pytest.mark.parametrize(
    "change",
    [{}, {"test_error": None}, {"test_error": float("nan")}, {"run": "bp-of-another"}, {"seconds_per_epoch": "1"}],
)
def test_a_result_counts_only_if_it_is_whole_and_of_this_run(tmp_path: Path, change: store.Record) -> None:
    sound = {"run": "bp-1", "test_error": 1.0, "seconds_per_epoch": 1.0, "predicted_ratio": 1.0}
    store.write_json(tmp_path / "bp-1" / store.RESULT, {**sound, **change})
    assert (store.result(tmp_path / "bp-1") is None) == bool(change)


def test_metrics_end_at_the_first_damaged_line(tmp_path: Path) -> None:
    for damage in (b'{"epoch": 2', b"[]", b'{"epoch": 3}', b'{"epoch": 2, "loss": "x"}', b"\xff\xfe"):
        (tmp_path / store.METRICS).write_bytes(b'{"epoch": 1, "loss": null}\n' + damage + b'\n{"epoch": 3}\n')
        assert store.read_metrics(tmp_path) == [{"epoch": 1, "loss": None}]
        assert store.count_epochs(tmp_path) == 1


def test_a_tensor_file_that_is_replaced_while_it_is_opened_is_as_good_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise RuntimeError("unable to open file in read-only mode: No such file or directory (2)")

    monkeypatch.setattr(store, "safe_open", gone)
    store.write_bytes(tmp_path / store.METRICS, b'{"epoch": 1}\n')
    assert store.count_epochs(tmp_path) == 1
    assert store.read_tensors(tmp_path / store.RESUME) is None
