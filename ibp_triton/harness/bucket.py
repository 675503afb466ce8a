"""A folder in an object store (s3://): objects are put whole, and only over what this process has seen of them."""

from __future__ import annotations

import mimetypes
import re
import secrets
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ibp_triton.errors import ConfigError, LaunchError, OvertakenError

LEASE = 60.0  # seconds that a lock holds without a word of its owner; so long a lost connection is waited for too
_AT_ONCE = 16  # objects that are fetched at the same time
_URL, _NAMES = re.compile(r"s3:/+([^/]+)/*(.*?)/*"), re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)*", re.ASCII)
_PASSING = (408, 409, 429, 500, 502, 503, 504)  # HTTP's answers that another try may not get
_REFUSED = (401, 403)


class Found(NamedTuple):
    """An object: its bytes, the version that they are of, and seconds since it was put, by the store's own clock."""

    content: bytes
    etag: str
    age: float


@dataclass(frozen=True)
class Bucket:
    """What an s3:// address names; names of objects below are relative to it.

    `lease` is how long, in seconds, a lock in it holds after its owner's last word, and how long a connection that is
    lost is tried again; who is `patient` waits to see whether the owner of a lock still lives. Every call raises
    LaunchError, with cause and cure, where the store is not to be reached or refuses, and ConfigError without s3fs.
    """

    url: str
    lease: float = LEASE
    patient: bool = False

    @property
    def _place(self) -> tuple[str, str]:
        """Name of the bucket, and what the keys of the objects begin with."""
        match = _URL.fullmatch(self.url)
        if match is None:
            raise ConfigError(f"{self.url}: names no bucket; write s3://BUCKET/FOLDER")
        return match[1], f"{match[2]}/" if match[2] else ""

    def of(self, name: str) -> str:
        """Address of an object."""
        return f"{self.url.rstrip('/')}/{name}"

    def names(self, under: str = "") -> dict[str, str]:
        """Name and version of each object whose name begins with `under`."""
        _, prefix = self._place
        found: dict[str, str] = {}
        more: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", under, Prefix=prefix + under, **more)
            found |= {one["Key"].removeprefix(prefix): one["ETag"] for one in page.get("Contents", ())}
            if not page.get("IsTruncated"):
                return {name: etag for name, etag in found.items() if _NAMES.fullmatch(name)}
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def get(self, name: str) -> Found | None:
        """An object; None if there is none of that name."""
        try:
            answer = self._call("get_object", name, Key=self._place[1] + name)
        except FileNotFoundError:
            return None
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return Found(answer["Body"], answer["ETag"], (now - answer["LastModified"]).total_seconds())

    def get_all(self, names: Iterable[str]) -> dict[str, Found]:
        """Those of the objects that are there."""
        wanted = list(names)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = zip(wanted, pool.map(self.get, wanted), strict=True)
            return {name: one for name, one in found if one is not None}

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Put objects into a folder of this machine, by their names."""
        for name, found in self.get_all(names).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(found.content)

    def put(self, name: str, content: bytes, seen: str | None) -> str:
        """Put an object over the version of it that was `seen`, or where none is (None); its new version.

        Raises:
            OvertakenError: where there is another version, of other bytes.
        """
        condition = {"IfNoneMatch": "*"} if seen is None else {"IfMatch": seen}
        try:
            return self._put(name, content, **condition)
        except (OvertakenError, FileNotFoundError):
            found = self.get(name)
            if found is not None and found.content == content:  # this put's own, whose answer was lost, or its twin
                return found.etag
            raise OvertakenError(f"{self.of(name)}: another process has written it") from None

    def replace(self, name: str, content: bytes) -> None:
        """Put an object over whatever there is."""
        self._put(name, content)

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        self._call("delete_object", name, Key=self._place[1] + name)

    def check(self) -> None:
        """Raise LaunchError unless this process may write here, and the store puts on condition as it is asked to."""
        name = f"probe-{secrets.token_hex(8)}"
        refused = 0
        try:
            self._put(name, b"0", IfNoneMatch="*")
            for condition in ({"IfNoneMatch": "*"}, {"IfMatch": f'"{"0" * 32}"'}):
                with suppress(OvertakenError):
                    self._put(name, b"1", **condition)
                    continue
                refused += 1
        finally:
            with suppress(LaunchError):
                self.delete(name)
        if refused < 2:
            raise self._unsafe()

    def _unsafe(self) -> LaunchError:
        return LaunchError(
            f"{self.url}: {_endpoint()} puts objects without heeding If-None-Match and If-Match, by which runs are "
            "locked; take a store that knows them (Amazon S3 does, MinIO, Cloudflare R2), or a shared file system"
        )

    def _put(self, name: str, content: bytes, **condition: str) -> str:
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        key = self._place[1] + name
        answer = self._call("put_object", name, Key=key, Body=content, ContentType=kind, **condition)
        return str(answer["ETag"])

    def _call(self, method: str, about: str, **arguments: Any) -> Any:
        """An answer of the store; tried again for as long as a lease where it is a passing fault."""
        files, end = self._client(), time.monotonic() + self.lease
        while True:
            try:
                return _answer(files, method, {"Bucket": self._place[0], **arguments})
            except Exception as error:
                code, status = _told(error)
                if status == 412:
                    raise OvertakenError(f"{self.of(about)}: another version is there") from error
                if code == "NoSuchKey":
                    raise FileNotFoundError(self.of(about)) from error
                if not _is_passing(error, status) or time.monotonic() > end:
                    raise self._failure(error, code, status) from error
            time.sleep(min(1.0, self.lease / 8))

    def _client(self) -> Any:
        try:
            return _files()
        except ModuleNotFoundError:
            raise ConfigError(f"{self.url}: s3fs is not installed; pip install 'ibp-triton[s3]'") from None

    def _failure(self, error: Exception, code: str, status: int) -> LaunchError:
        reason = code or str(error).partition("\n")[0] or type(error).__name__
        stored = "what is stored there is whole, and the same command goes on"
        if "Credential" in type(error).__name__ or "Token" in type(error).__name__:
            return LaunchError(
                f"{self.url}: no credentials to be used ({reason}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                f"or AWS_PROFILE, or give this machine a role; {stored}"
            )
        if code == "NoSuchBucket":
            name = self._place[0]
            return LaunchError(f"{self.url}: {_endpoint()} has no bucket {name}; make it, or name another one")
        if code == "NotImplemented":
            return self._unsafe()
        if status in _REFUSED:
            return LaunchError(
                f"{self.url}: {_endpoint()} refuses these credentials ({reason}); they must be allowed to list, get, "
                f"put and delete objects there; {stored}"
            )
        if not status or status in _PASSING:
            return LaunchError(
                f"{self.url}: {_endpoint()} is not to be reached ({reason}); look at the network and at "
                f"AWS_ENDPOINT_URL; {stored}"
            )
        return LaunchError(f"{self.url}: {_endpoint()} cannot do it ({reason}); look at the address; {stored}")


def url_of(place: Path | str) -> str | None:
    """The s3:// address that a path was made from, whose slashes it has joined; None for any other path."""
    text = place if isinstance(place, str) else place.as_posix()
    match = _URL.fullmatch(text)
    return f"s3://{match[1]}/{match[2]}".rstrip("/") if match else None


def shown(place: Path) -> str:
    """A path, or an s3:// address, as a user writes it."""
    return url_of(place) or str(place)


@cache
def _files() -> Any:
    """S3 as fsspec knows it: endpoint and credentials are those of AWS's variables and files."""
    import s3fs

    config = {"retries": {"total_max_attempts": 2}, "read_timeout": 60}  # seconds, in which an object must be put
    return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)


def _endpoint() -> str:
    client = getattr(_files(), "_s3", None)
    return client.meta.endpoint_url if client is not None else "the object store"


def _answer(files: Any, method: str, arguments: dict[str, Any]) -> Any:
    from fsspec.asyn import sync

    return sync(files.loop, _read, files, method, arguments)


async def _read(files: Any, method: str, arguments: dict[str, Any]) -> Any:
    answer = await files._call_s3(method, **arguments)
    if method == "get_object":
        async with answer["Body"] as body:
            answer["Body"] = await body.read()
    return answer


def _told(error: Exception) -> tuple[str, int]:
    """The store's own code of an error and HTTP's; nothing and 0 where it did not answer."""
    answers = (getattr(one, "response", None) for one in (error, error.__cause__))
    answer: dict[str, Any] = next(filter(None, answers), {})
    return answer.get("Error", {}).get("Code", ""), answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _is_passing(error: Exception, status: int) -> bool:
    """Whether another try may do: the store is busy, or the connection was lost."""
    from aiohttp import ClientError
    from botocore.exceptions import ConnectionError as Unconnected
    from botocore.exceptions import HTTPClientError

    lost = isinstance(error, OSError | Unconnected | HTTPClientError | ClientError)
    return status in _PASSING or (not status and lost)
