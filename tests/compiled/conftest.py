"""Kernels compiled ahead of time, for chips that need not be there: run apart from the interpreted tests."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process cannot interpret kernels and compile them."""
    import triton

    if items and triton.knobs.runtime.interpret:
        raise pytest.UsageError("tests/compiled needs its own pytest run, without TRITON_INTERPRET=1")
