"""One folder a run, every file written whole or not at all; a lock that dies with its process."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import ibp_triton as ibp
from ibp_triton.errors import DamageError

RESULT, METRICS, CONFIG, ENVIRONMENT = "result.json", "metrics.jsonl", "config.json", "environment.json"
RESUME, PREVIOUS = "resume.safetensors", "resume.previous.safetensors"
CHECKPOINT, MEAN, LAST_GOOD = "checkpoint.safetensors", "input_mean.safetensors", "last_good.safetensors"
LOCK = ".lock"
SEAL = "sha256"
_TEMPORARY = ".ibp-tmp"
_UNREADABLE = (OSError, SafetensorError, RuntimeError)  # the last where a run's process replaces the file just then
_DAMAGE = (ValueError, RecursionError, IsADirectoryError)
Record = dict[str, Any]


def write_bytes(path: Path, content: bytes, previous: Path | None = None, last: bool = True) -> None:
    """Replace `path` atomically: a temporary file beside it, flushed to disk, then renamed; the folder flushed too.

    What was at `path` before is kept as `previous`, if that is given. Not `last`: another file of the same folder
    follows, with which this one is flushed.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{_TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if last:
        _flush(path.parent)


def make_folder(folder: Path) -> None:
    """The folder and those above it, each new one flushed to disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush(folder.parent)


def _flush(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that flush no folders
            raise
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read piece by piece."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def write_json(path: Path, value: Any, last: bool = True) -> None:
    """Indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(), last=last)


def read_json(path: Path) -> Record | None:
    """A JSON mapping, or None if there is no such file; raises DamageError if the file holds none."""
    try:
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
        reason = f"a mapping was expected, it holds {type(value).__name__}"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except _DAMAGE as error:
        reason = str(error)
    raise DamageError(f"{path}: damaged ({reason}); restore it, or move it away")


def find_json(path: Path) -> Record | None:
    """A JSON mapping; None if the file is missing, damaged or out of reach."""
    try:
        return read_json(path)
    except (DamageError, OSError):
        return None


def result(folder: Path) -> Record | None:
    """The result of the run in `folder`; None if it is missing, damaged or another run's: it is not finished then."""
    found = find_json(folder / RESULT)
    if found is None or found.get("run", folder.name) != folder.name:
        return None
    numbers = (found.get(key) for key in ("test_error", "seconds_per_epoch", "predicted_ratio"))
    return found if all(_is_number(number) for number in numbers) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def write_metrics(folder: Path, records: list[Record]) -> None:
    """All records so far, one JSON object a line."""
    write_bytes(folder / METRICS, metrics_text(records).encode(), last=False)


def metrics_text(records: list[Record]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(record) + "\n" for record in records)


def read_metrics(folder: Path, epochs: int | None = None) -> list[Record]:
    """Records of the first `epochs` epochs (all if None), up to the first damaged line; empty if there are none."""
    try:
        lines = (folder / METRICS).read_bytes().splitlines()
    except OSError:
        return []
    return list(sound_records(lines))[:epochs]


def sound_records(lines: list[bytes]) -> Iterator[Record]:
    """The records of the lines, up to the first that is none of its epoch."""
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except _DAMAGE:
            return
        if not (isinstance(record, dict) and record.get("epoch") == number):
            return
        if not all(value is None or _is_number(value) for value in record.values()):
            return
        yield record


def count_epochs(folder: Path) -> int:
    """How many epochs of a run are done, by its resume file, or by their records where there is none."""
    try:
        with safe_open(folder / RESUME, framework="pt") as file:
            return int((file.metadata() or {})["epochs"])
    except (*_UNREADABLE, KeyError, ValueError):
        return len(read_metrics(folder))


def write_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    previous: Path | None = None,
    last: bool = True,
) -> None:
    """A safetensors file, atomically; tensors are stored contiguous, on the CPU, shared ones once for each name.

    Without metadata equal tensors give equal bytes; metadata come with a checksum over all, in no fixed order.
    """
    plain = _unshared(tensors)
    sealed = {**metadata, SEAL: _seal(plain, metadata)} if metadata else {}
    write_bytes(path, save(plain, {"format": "pt", **sealed}), previous, last)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        one = tensor.detach().cpu().contiguous()
        place = one.untyped_storage().data_ptr()
        plain[name] = one.clone() if place in seen else one
        seen.add(place)
    return plain


def _seal(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    rest = {key: value for key, value in metadata.items() if key not in ("format", SEAL)}
    found.update(json.dumps(rest, sort_keys=True).encode())
    return found.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a safetensors file; None if it is missing, unreadable or belies its checksum."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata: dict[str, str] = file.metadata() or {}
    except _UNREADABLE:
        return None
    if SEAL in metadata and metadata[SEAL] != _seal(tensors, metadata):
        return None
    return tensors, metadata


@contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; yields False if another process holds it. The system frees the lock of a dead process."""
    make_folder(folder)
    path = folder / LOCK
    held, there = FileLock(path), path.read_bytes() if path.is_file() else b""
    try:
        with suppress(Timeout):
            held.acquire(timeout=0)
        if held.is_locked and there and not path.stat().st_size:
            path.write_bytes(there)  # filelock 4.1, the last for Python 3.10, empties it
    except OSError as error:
        if path.is_symlink():
            raise DamageError(
                f"{path}: a symbolic link; a lock is a file of its own folder, delete the link"
            ) from error
        raise
    try:
        yield held.is_locked
    finally:
        held.release()


def sweep(folder: Path) -> None:
    """Delete temporary files of ours that a killed process left behind; call holding the lock of a run's folder."""
    for leftover in folder.glob(f".*{_TEMPORARY}"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)


def environment() -> Record:
    """What the figures depend on beside the config: versions, processor, threads, device."""
    return {
        "ibp_triton": ibp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
