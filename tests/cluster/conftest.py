"""The harness's tiny experiment."""

from tests.harness.conftest import _one_thread, tree, write  # noqa: F401
