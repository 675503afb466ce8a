"""Runs in a bucket as folders of this machine: that of the run which is trained, and the small files of all runs."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from ibp_triton.errors import DamageError
from ibp_triton.harness import store
from ibp_triton.harness.bucket import Bucket, url_of
from ibp_triton.harness.leases import LOCK, Lease

# What is put later counts: a reader of the later ones finds what they speak of.
_LATER = (store.CONFIG, store.ENVIRONMENT, "evaluation", store.RESUME, store.METRICS, store.RESULT)
_SMALL = re.compile(
    rf"[^/]+/({re.escape(store.CONFIG)}|{re.escape(store.ENVIRONMENT)}|{re.escape(store.METRICS)}"
    rf"|{re.escape(store.RESULT)}|evaluation-[0-9a-f]+\.(json|safetensors))"
)


class Held:
    """A run's folder while this process holds its lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def commit(self) -> None:
        """What is in the folder now is stored: on this machine's disk it is already."""

    def told(self, text: str) -> str:
        """A text about files of the folder, by the names that users have for them."""
        return text


class Mirror(Held):
    """One that holds what the bucket has of the run, and which the bucket is to have."""

    def __init__(self, folder: Path, bucket: Bucket, lease: Lease) -> None:
        super().__init__(folder)
        self._bucket, self._lease = bucket, lease
        self._seen: dict[str, str] = {}  # the version of each object, and what its bytes are
        self._digests: dict[str, str] = {}
        for name, found in bucket.get_all(self._stored()).items():
            path = folder / name.rpartition("/")[2]
            path.write_bytes(found.content)
            self._seen[path.name], self._digests[path.name] = found.etag, store.digest(path)

    def _stored(self) -> list[str]:
        found = self._bucket.names(f"{self.folder.name}/")
        return [name for name in found if name.count("/") == 1 and not name.endswith(f"/{LOCK}")]

    def commit(self) -> None:
        """Put what has changed in the folder, what commits a state last; then delete what is gone.

        Raises:
            OvertakenError: where another process has taken the run over; of a state nothing is put that counts then.
        """
        self._lease.renew()
        there = {path.name: path for path in self.folder.iterdir() if _is_stored(path)}
        for name in sorted(there, key=_order):
            digest = store.digest(there[name])
            if self._digests.get(name) != digest:
                self._seen[name] = self._bucket.put(self._of(name), there[name].read_bytes(), self._seen.get(name))
                self._digests[name] = digest
        for name in set(self._seen) - set(there):
            self._bucket.delete(self._of(name))
            del self._seen[name], self._digests[name]

    def _of(self, name: str) -> str:
        return f"{self.folder.name}/{name}"

    def told(self, text: str) -> str:
        """A text with the bucket's addresses for the files of the folder."""
        return text.replace(str(self.folder), self._bucket.of(self.folder.name))


def _is_stored(path: Path) -> bool:
    """Whether the bucket has it: not the state before the last, since objects are never half of a file."""
    return path.is_file() and not path.name.startswith(".") and path.name not in (store.PREVIOUS, LOCK)


def _order(name: str) -> tuple[int, str]:
    """By which files of a folder are put."""
    if name.endswith(".safetensors") and name != store.RESUME:
        return 0, name
    return next((number for number, one in enumerate(_LATER, 1) if name.startswith(one)), 1), name


@contextmanager
def held(root: Path, name: str, bucket: Bucket | None = None) -> Iterator[Held | None]:
    """The folder of a run, of a bucket a temporary one, and its lock; None if another process holds that."""
    if bucket is None:
        with store.lock(root / name) as mine:
            yield Held(root / name) if mine else None
        return
    lease = Lease(bucket, f"{name}/{LOCK}")
    if not lease.take():
        yield None
        return
    try:
        with tempfile.TemporaryDirectory(prefix="ibp-triton-") as scratch:
            yield from _mirrored(Path(scratch) / name, bucket, lease)
    finally:
        lease.free()


def _mirrored(folder: Path, bucket: Bucket, lease: Lease) -> Iterator[Held]:
    folder.mkdir()
    mirror = Mirror(folder, bucket, lease)
    try:
        yield mirror
    except DamageError as error:
        raise DamageError(mirror.told(str(error))) from error


def bucket_of(place: Path) -> Bucket | None:
    """The bucket that a path names; None for a folder of this machine."""
    url = url_of(place)
    return Bucket(url) if url else None


def brought(root: Path, stack: ExitStack, run: str = "") -> Path:
    """The folder of the runs; of a bucket one of this machine, until the stack is closed.

    It has the small files of all runs, or of one.
    """
    bucket = bucket_of(root)
    if bucket is None:
        return root
    place = scratch(stack) / root.name
    place.mkdir()
    fetch_small(replace(bucket, lease=0.0), place, run)  # a command begins where it need not wait for a connection
    return place


def file_of(path: Path, stack: ExitStack) -> Path:
    """A file; of a bucket a copy on this machine, until the stack is closed, if it is there."""
    bucket = bucket_of(path.parent)
    if bucket is None:
        return path
    folder = scratch(stack)
    replace(bucket, lease=0.0).fetch([path.name], folder)
    return folder / path.name


def scratch(stack: ExitStack) -> Path:
    """A new folder of this machine, until the stack is closed."""
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ibp-triton-")))


def fetch_small(bucket: Bucket, folder: Path, run: str = "") -> None:
    """Put the files of all runs of a bucket, or of one, into a folder, but for weights: all that a table needs."""
    names = bucket.names(f"{run}/" if run else "")
    bucket.fetch((name for name in names if _SMALL.fullmatch(name)), folder)


def write(path: Path, content: bytes) -> None:
    """Put a file whole into a folder, or into a bucket."""
    bucket = bucket_of(path.parent)
    if bucket:
        bucket.replace(path.name, content)
    else:
        store.write_bytes(path, content)


def sent(paths: list[Path], folder: Path, place: Path) -> list[str]:
    """Put files of a folder into `place`, if that is a bucket; where they are then, as a user names it."""
    bucket = bucket_of(place)
    if bucket is None:
        return [str(path) for path in paths]
    names = [path.relative_to(folder).as_posix() for path in paths]
    for name in names:
        bucket.replace(name, (folder / name).read_bytes())
    return [bucket.of(name) for name in names]
