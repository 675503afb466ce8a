"""Finished runs in one file: a line of JSON for each, from which their folders are made again, checkpoints left out."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ibp_triton.errors import DamageError
from ibp_triton.harness import store

_NAME, _EVALUATION = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"), re.compile(r"evaluation-[0-9a-f]{8}")
_JSON = {"config": store.CONFIG, "environment": store.ENVIRONMENT}
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def file_of(root: Path) -> Path:
    """Where the runs of a folder are kept: runs.jsonl beside runs/."""
    return root.with_name(f"{root.name}.jsonl")


def keep(root: Path, file: Path) -> int:
    """Write the sound finished runs under `root` to `file`, and those that it has already; how many there are.

    Raises:
        DamageError: where `file` is there with a damaged line, which would be lost.
    """
    records, lost = read(file)
    _refuse(lost)
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if store.result(folder):
            records[folder.name] = _record(folder)
    text = "".join(_line(records[name]) for name in sorted(records))
    if records:
        store.write_bytes(file, text.encode())
    return len(records)


def read(file: Path) -> tuple[dict[str, store.Record], list[str]]:
    """The records of a file by the name of their run, and its damaged lines in words; nothing if there is no file."""
    records: dict[str, store.Record] = {}
    lost = []
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else (), 1):
        try:
            record = _sound(json.loads(line))
        except _DAMAGE as error:
            lost.append(f"{file}, line {number} ({str(error).partition(chr(10))[0]:.80})")
        else:
            records[record["run"]] = record
    return records, lost


def unpack(root: Path, file: Path | None = None) -> list[str]:
    """Make the folders of kept runs under `root` that are not there as finished runs; the damaged lines, in words.

    A run's result is written last, so that one that was interrupted counts as not finished and is made again.
    """
    records, lost = read(file or file_of(root))
    for name, record in records.items():
        if store.result(root / name) is None:
            with store.lock(root / name) as mine:
                if mine:
                    _write(root / name, record)
    return lost


def unpack_all(root: Path) -> None:
    """`unpack`; raises DamageError where a line is damaged, whose run would be trained anew."""
    _refuse(unpack(root))


@contextmanager
def opened(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder with the runs of `root`, kept ones too, and the damaged lines; a temporary one if there is no `root`."""
    if root.is_dir() or not file_of(root).is_file():
        yield root, unpack(root)
        return
    with tempfile.TemporaryDirectory(prefix="ibp-triton-") as folder:
        place = Path(folder) / root.name
        yield place, unpack(place, file_of(root))


def _refuse(lost: list[str]) -> None:
    if lost:
        raise DamageError(f"{'; '.join(lost)}: damaged; restore the file, or delete the line and train its run anew")


def _record(folder: Path) -> store.Record:
    record: store.Record = {"run": folder.name, "result": store.result(folder)}
    record |= {key: found for key, name in _JSON.items() if (found := store.find_json(folder / name))}
    record["metrics"] = store.read_metrics(folder)
    paths = sorted(folder.glob("evaluation-*.json"))
    record["evaluations"] = {path.stem: found for path in paths if (found := _evaluation(path))}
    return record


def _evaluation(path: Path) -> store.Record | None:
    """Summary and bitmap of an evaluation; None where one of its files is damaged."""
    summary, outcomes = store.find_json(path), path.with_suffix(".safetensors")
    found = store.read_tensors(outcomes)
    if summary is None or found is None or summary.get(store.SEAL) not in (None, store.digest(outcomes)):
        return None
    return {"summary": summary, "outcomes": {name: _packed(tensor) for name, tensor in found[0].items()}}


def _packed(tensor: Tensor) -> store.Record:
    if tensor.dtype != torch.uint8:
        return {"numbers": tensor.tolist()}
    packed = zlib.compress(tensor.contiguous().numpy().tobytes(), 9)
    return {"shape": list(tensor.shape), "bits": base64.b64encode(packed).decode()}


def _unpacked(stored: store.Record) -> Tensor:
    if "numbers" in stored:
        return torch.tensor(stored["numbers"])
    content = bytearray(zlib.decompress(base64.b64decode(stored["bits"], validate=True)))
    return torch.frombuffer(content, dtype=torch.uint8).reshape(stored["shape"])


def _line(record: store.Record) -> str:
    return json.dumps({**record, store.SEAL: seal(record)}, ensure_ascii=False) + "\n"


def seal(record: store.Record) -> str:
    """SHA-256 of a record without its checksum."""
    text = json.dumps({key: value for key, value in record.items() if key != store.SEAL}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sound(record: store.Record) -> store.Record:
    """The record; raises one of _DAMAGE if it belies its checksum or names what is no run's."""
    if record[store.SEAL] != seal(record):
        raise ValueError("its checksum is another one")
    names = [record["run"], *record["evaluations"]]
    if not (_NAME.fullmatch(names[0]) and all(map(_EVALUATION.fullmatch, names[1:]))):
        raise ValueError("its names are those of no run")
    return record


def _write(folder: Path, record: store.Record) -> None:
    for key, name in _JSON.items():
        if key in record:
            store.write_json(folder / name, record[key], last=False)
    store.write_metrics(folder, record["metrics"])
    for stem, stored in record["evaluations"].items():
        outcomes = folder / f"{stem}.safetensors"
        store.write_tensors(outcomes, {name: _unpacked(one) for name, one in stored["outcomes"].items()}, last=False)
        summary = stored["summary"]
        if store.SEAL in summary:
            summary = {**summary, store.SEAL: store.digest(outcomes)}
        store.write_json(folder / f"{stem}.json", summary, last=False)
    store.write_json(folder / store.RESULT, record["result"])
