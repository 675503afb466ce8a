"""The harness's tiny experiment, and an object store on this machine."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from ibp_triton.harness import bucket
from ibp_triton.harness.bucket import Bucket
from ibp_triton.harness.leases import LOCK
from tests.harness.conftest import _one_thread, tree, write  # noqa: F401

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}


class ObjectStore:
    """moto's S3, one request at a time: its conditional puts look and put in two steps.

    `hear` sees each request before it is answered.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app, self._turn = DomainDispatcherApplication(create_backend_app), threading.Lock()
        self.hear: Callable[[dict[str, Any]], None] = lambda request: None
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.address = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _answer(self, request: dict[str, Any], begin: Any) -> Any:
        self.hear(request)
        with self._turn:
            return list(self._app(request, begin))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """One with the bucket `bucket`, at which this process and its children look."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    found = ObjectStore()
    urlopen(Request(f"{found.address}/moto-api/reset", method="POST")).close()  # moto's state is its process's
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": found.address}.items():
        monkeypatch.setenv(name, value)
    bucket._files.cache_clear()
    bucket._files().call_s3("create_bucket", Bucket="bucket")
    try:
        yield found
    finally:
        found.close()
        bucket._files.cache_clear()


@pytest.fixture
def runs(object_store: ObjectStore) -> Bucket:
    """The runs of an experiment there, whose locks hold for two seconds."""
    return Bucket("s3://bucket/tiny/runs", lease=2.0)


def copied(runs: Bucket, folder: Path) -> Path:
    """All that the bucket has, as a folder."""
    runs.fetch((name for name in runs.names() if not name.endswith(LOCK)), folder)
    return folder
