"""The files of the public image sets: found or fetched, their bytes read and checked."""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pooch
import torch
from torch import Tensor

from ibp_triton.errors import DataError
from ibp_triton.harness.store import digest as digest_of
from ibp_triton.harness.store import write_bytes

Bytes = npt.NDArray[np.uint8]
ENVIRONMENT = "IBP_TRITON_DATA"
LARGE = 256 << 20  # bytes of an unpacked file, more than any of the public sets has
DIGESTS = ".unpacked.sha256"


@dataclass(frozen=True)
class Remote:
    """A file to download: address of its folder on each mirror, name and SHA-256."""

    mirrors: tuple[str, ...]
    name: str
    sha256: str

    @property
    def is_archive(self) -> bool:
        """Whether it holds several files."""
        return self.name.endswith(".tar.gz")


def given_folder(given: str | None) -> Path | None:
    """`data.dir`, else the environment variable IBP_TRITON_DATA; None if neither is set."""
    place = given or os.environ.get(ENVIRONMENT)
    return Path(place).expanduser() if place else None


def cache_folder() -> Path:
    """Where downloads are kept for this user."""
    return Path(pooch.os_cache("ibp_triton"))


def locate(root: Path, subfolder: str, name: str) -> Path | None:
    """`name` or `name.gz` under root/subfolder or root itself; None if it is in neither."""
    candidates = [base / (name + suffix) for base in (root / subfolder, root) for suffix in ("", ".gz")]
    return next((path for path in candidates if path.is_file()), None)


def fetch(remote: Remote, target: Path) -> Path:
    """Download into folder `target` from the first mirror that answers, check the SHA-256; raises DataError."""
    reasons = []
    for mirror in remote.mirrors:
        try:
            return Path(
                pooch.retrieve(
                    mirror + remote.name, f"sha256:{remote.sha256}", fname=remote.name, path=target, progressbar=True
                )
            )
        except OSError as error:
            reasons.append(f"{mirror}: {type(error).__name__}")
        except ValueError:  # pooch has deleted what it got
            reasons.append(f"{mirror}: bytes of another SHA-256 than {remote.sha256}")
    raise DataError(
        f"{target / remote.name}: not there, and no mirror gave it ({'; '.join(reasons)}); "
        f"put the file into that folder, or name its folder by data.dir or {ENVIRONMENT}"
    )


def read(path: Path) -> bytes:
    """All bytes of a plain or gzipped file; raises DataError for a truncated or damaged one."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as stream:
            raw = stream.read(LARGE + 1)
        if len(raw) > LARGE:
            raise DataError(f"{path}: holds more than {LARGE >> 20} MB; delete it and fetch it again")
        return raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it and fetch it again") from error


def is_as_unpacked(path: Path, archive: str) -> bool:
    """Whether a file has the digest that `unpack` noted beside the archive of that name; True if it noted none."""
    notes = [folder / f"{archive}{DIGESTS}" for folder in (path.parent, path.parent.parent)]
    lines = [line for note in notes if note.is_file() for line in note.read_text("utf-8", "replace").splitlines()]
    known = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    return path.name not in known or known[path.name] == digest_of(path)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file of unsigned bytes as a uint8 tensor of `dimensions` axes; raises DataError."""
    raw = read(path)
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if raw[:4] != magic or len(raw) < header:
        raise DataError(
            f"{path}: expected an IDX file of unsigned bytes with {dimensions} axes (first bytes {magic.hex()}), "
            f"got {raw[:4].hex() or 'an empty file'}; delete it and fetch it again"
        )
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", dimensions, 4))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(raw) != expected:
        raise DataError(
            f"{path}: expected {expected} bytes for shape {shape}, got {len(raw)}; the file is truncated or damaged, "
            "delete it and fetch it again"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())


def read_cifar10(path: Path) -> tuple[Tensor, Tensor]:
    """Images [n, 3, 32, 32] uint8 and labels [n] int64 of one binary batch (1 + 3072 bytes a record)."""
    raw = np.frombuffer(read(path), np.uint8)
    if not len(raw) or len(raw) % 3073:
        raise DataError(f"{path}: expected records of 3073 bytes, got {len(raw)} bytes in all; fetch it again")
    records = raw.reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise DataError(f"{path}: label {records[:, 0].max()} found, expected 0 to 9; is it the *binary* CIFAR-10?")
    images = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(records[:, 0].astype(np.int64))


def unpack(archive: Path, wanted: set[str], target: Path) -> None:
    """Copy the `wanted` plain files out of a tar archive into `target`, whatever folders they lie in.

    Each is there whole or not at all, also for a process that reads or unpacks them meanwhile; their digests are
    written beside the archive, as sha256sum reads them. Raises DataError.
    """
    digests = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in wanted:
                    if member.size > LARGE:
                        raise DataError(f"{archive}: {name} has {member.size >> 20} MB; delete it and fetch it again")
                    stream = tar.extractfile(member)
                    assert stream is not None
                    content = stream.read()
                    digests[name] = hashlib.sha256(content).hexdigest()
                    write_bytes(target / name, content)
        lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
        write_bytes(archive.with_name(archive.name + DIGESTS), lines.encode())
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{archive}: cannot be unpacked ({error}); delete it and fetch it again") from error
