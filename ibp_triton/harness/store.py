"""One folder a run, every file written whole or not at all; a lock that dies with its process."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

RESULT, METRICS, RESUME, CHECKPOINT, MEAN = (
    "result.json",
    "metrics.jsonl",
    "resume.safetensors",
    "checkpoint.safetensors",
    "input_mean.safetensors",
)
Record = dict[str, Any]


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` atomically: a temporary file beside it, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Record | None:
    """A JSON mapping, or None if there is no such file."""
    try:
        value: Record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return value


def write_metrics(folder: Path, records: list[Record]) -> None:
    """All records so far, one JSON object a line."""
    write_bytes(folder / METRICS, "".join(json.dumps(record) + "\n" for record in records).encode())


def read_metrics(folder: Path, epochs: int | None = None) -> list[Record]:
    """Records of the first `epochs` epochs (all if None); empty if there are none yet."""
    return [json.loads(line) for line in _lines(folder)][:epochs]


def count_epochs(folder: Path) -> int:
    """How many epochs of a run have a record."""
    return len(_lines(folder))


def _lines(folder: Path) -> list[str]:
    try:
        return (folder / METRICS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, atomically; tensors are stored contiguous, on the CPU.

    Without metadata equal tensors give equal bytes; the order of several metadata keys is not fixed.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, {"format": "pt", **(metadata or {})}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a safetensors file; None if it is missing or unreadable."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return None


@contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; yields False if another process holds it. The system frees the lock of a dead process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        sweep(folder)
        yield True


def sweep(folder: Path) -> None:
    """Delete temporary files that a killed process left behind; call only while holding the lock."""
    for leftover in folder.glob(".*.*"):
        leftover.unlink(missing_ok=True)


def environment() -> Record:
    """What the figures depend on beside the config: versions, processor, threads, device."""
    return {
        "ibp_triton": version("ibp-triton"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
