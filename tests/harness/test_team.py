"""Processes that train together: whose samples are whose, and who is at fault when something is raised."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from ibp_triton.errors import LaunchError
from ibp_triton.harness import team
from ibp_triton.harness.team import ALONE, Ranks


@pytest.mark.parametrize("count", [0, 1, 5, 32])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_sample_is_one_process_s_and_shares_are_even(count: int, size: int) -> None:
    ranks = [Ranks(None, rank, size) for rank in range(size)]
    shares = [list(range(count))[one.share(count)] for one in ranks]
    assert [sample for share in shares for sample in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert ALONE.share(count) == slice(0, count)


def raised(ranks: list[Ranks], actions: list[Callable[[], None]]) -> list[BaseException | None]:
    """What each process raises of what it does together with the others."""
    found: list[BaseException | None] = [None] * len(ranks)

    def work(number: int) -> None:
        try:
            with ranks[number].together():
                actions[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def fails() -> None:
    raise ValueError("too large")


def fails_later() -> None:
    time.sleep(0.1)
    raise ValueError("too large")


def goes_well() -> None:
    pass


@pytest.mark.parametrize("other", [fails_later, goes_well])
def test_what_all_raise_is_the_run_s_fault_and_what_one_raises_ends_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: Callable[[], None]
) -> None:
    monkeypatch.setattr(team, "PATIENCE", 2.0 if other is fails_later else 0.2)
    ranks = [Ranks(dist.FileStore(str(tmp_path / "store"), 2), rank, 2) for rank in range(2)]
    first, second = raised(ranks, [fails, other])
    if other is fails_later:
        assert isinstance(first, ValueError)
        assert isinstance(second, ValueError)
    else:
        assert second is None
        assert isinstance(first, LaunchError)
        assert str(first).startswith("process 0 of 2 stopped (ValueError: too large), and not all others did alike")


def test_work_is_called_for_in_order_until_the_end(tmp_path: Path) -> None:
    first, second = (Ranks(dist.FileStore(str(tmp_path / "store"), 2), rank, 2) for rank in range(2))
    first.call(("a run", None))
    first.call(None)
    assert second.called() == ("a run", None)
    assert second.called() is None
