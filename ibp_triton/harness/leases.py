"""The lock of a run in a bucket: an object that its owner puts anew while it lives, and others may when it does not."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace

from ibp_triton.errors import LaunchError, OvertakenError
from ibp_triton.harness.bucket import Bucket, Found

LOCK = "run.lock"
BEATS = 4  # of an owner, within a lease
_ROUNDING = 1.0  # seconds: the store tells its times in whole ones


class Lease:
    """A lock by name, `LOCK` of a run's folder; not held before `take`.

    How old a lock is, is read from the store's clock alone: those of the machines may differ.
    """

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._name = bucket, name
        self._owner = {"owner": f"{socket.gethostname()}, process {os.getpid()}", "token": secrets.token_hex(8)}
        self._seen: str | None = None
        self._beat, self._last = 0, 0.0
        self._turn, self._ended = threading.Lock(), threading.Event()

    def take(self) -> bool:
        """Whether it is this process's now; if another owner lives, it is not.

        Who is patient waits until the owner has put it anew, or its lease is over.
        """
        before: str | None = None
        while True:
            found = self._bucket.get(self._name)
            if found is None or _is_over(found, self._bucket.lease):
                if self._taken(found):
                    return True
            elif not self._bucket.patient or before not in (None, found.etag):
                return False
            else:
                before = found.etag
            time.sleep(min(1.0, self._bucket.lease / 8))

    def _taken(self, found: Found | None) -> bool:
        self._seen = found.etag if found else None
        with suppress(OvertakenError):
            self._put(self._bucket.lease, self._bucket)
            threading.Thread(target=self._live, daemon=True).start()
            return True
        return False  # another one was quicker

    def renew(self) -> None:
        """Make sure that it is still this process's.

        Raises:
            OvertakenError: where it is not, because this process, or its connection, stood still for a lease.
        """
        with self._turn:
            if time.monotonic() > self._last + self._bucket.lease / 2:
                self._put(self._bucket.lease, self._bucket)

    def free(self) -> None:
        """Let another one have it at once."""
        self._ended.set()
        with self._turn, suppress(OvertakenError, LaunchError):
            self._put(0.0, replace(self._bucket, lease=0.0))  # which waits for no connection

    def _live(self) -> None:
        """Put it anew until it is freed or lost."""
        while not self._ended.wait(self._bucket.lease / BEATS):
            with self._turn, suppress(LaunchError):  # what cannot be reached now, may be at the next beat
                try:
                    if not self._ended.is_set():
                        self._put(self._bucket.lease, self._bucket)
                except OvertakenError:
                    return

    def _put(self, lease: float, bucket: Bucket) -> None:
        now = time.monotonic()
        self._beat += 1
        content = json.dumps({**self._owner, "lease": lease, "beat": self._beat}) + "\n"
        self._seen = bucket.put(self._name, content.encode(), self._seen)
        self._last = now


def _is_over(found: Found, lease: float) -> bool:
    """Whether nobody holds the lock: it was freed, or its lease has run out; of a damaged one this one's own counts."""
    with suppress(ValueError, TypeError, KeyError):
        lease = float(json.loads(found.content)["lease"])
    return lease <= 0 or found.age > lease + _ROUNDING
