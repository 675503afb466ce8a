"""The autotuner, with a clock that prefers what a test wants it to."""

import json

import pytest

from ibp_triton.kernels import tiles
from ibp_triton.kernels.gemm import linear
from ibp_triton.kernels.launcher import recording
from ibp_triton.kernels.tiles import Config
from ibp_triton.kernels.workbench import autotune
from tests.kernels.support import randn

FAST, SLOW = Config(16, 16, 32), Config(64, 32, 32)
KEY = ("contract", "few rows", "sm_90", "float32", (1, 3, 4, 5))  # tangents, rows, columns, depth


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.setattr(tiles, "tuned", {})


def test_the_fastest_tile_is_kept_and_loaded_again(tmp_path):
    x, weight = randn(1, 3, 5), randn(4, 5)

    def clock(step):
        with recording() as launches:
            step()
        return float(launches[0].config.block_m)

    before = linear(x, weight)
    candidates = {"contract": [SLOW, FAST]}
    chosen = autotune.tune(lambda: linear(x, weight), tmp_path / "tiles.json", candidates=candidates, clock=clock)
    assert chosen == {KEY: FAST}
    assert (linear(x, weight) - before).abs().max() < 1e-5
    tiles.tuned.clear()
    assert autotune.load(tmp_path / "tiles.json") == 1
    assert tiles.tuned == {KEY: FAST}


def test_the_table_stands_where_nothing_is_faster():
    x, weight = randn(1, 3, 5), randn(4, 5)
    times = iter([1.0, 2.0, 3.0])
    tried = {"contract": [SLOW, FAST]}
    chosen = autotune.tune(
        lambda: linear(x, weight), candidates=tried, clock=lambda step: step() is None or next(times)
    )
    assert chosen == {}
    assert tiles.tuned == {}


def test_another_batch_keeps_the_tables_tile():
    x, weight = randn(1, 3, 5), randn(4, 5)
    tiles.tuned[KEY] = FAST
    with recording() as launches:
        linear(x, weight)
        linear(x[:, :2], weight)
    assert [launch.config == FAST for launch in launches] == [True, False]


def test_no_tile_is_tried_when_the_time_is_over():
    x, weight = randn(1, 3, 5), randn(4, 5)
    times = iter([3.0, 2.0])
    chosen = autotune.tune(
        lambda: linear(x, weight), candidates={"contract": [FAST]}, clock=lambda step: step() is None or next(times),
        seconds=-1.0,
    )  # fmt: skip
    assert chosen == {}
    assert next(times) == 2.0


def test_an_error_leaves_no_tile_in_force_that_was_only_tried():
    x, weight = randn(1, 3, 5), randn(4, 5)
    times = iter([2.0, 1.0])  # the table's, the first tile's; the second fails

    def clock(step):
        step()
        time = next(times, None)
        if time is None:
            raise RuntimeError("an illegal memory access")
        return time

    with pytest.raises(RuntimeError, match="illegal"):
        autotune.tune(lambda: linear(x, weight), candidates={"contract": [FAST, SLOW]}, clock=clock)
    assert tiles.tuned == {KEY: FAST}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "another card"}, "was measured on 'another card'"),
        ({"version": 2}, "is of version 2"),
        ({"entries": [{"key": list(KEY), "config": {"block_m": 48, "block_n": 16, "block_k": 32}}]}, "is no tile"),
        ({"entries": [{"key": list(KEY), "config": {"block_m": 16, "block_n": 16, "block_k": "32"}}]}, "is no tile"),
        ({"entries": [{"key": ["pool", *KEY[1:]], "config": {"block_m": 16}}]}, "is no tile"),
        ({"entries": [{"key": [*KEY[:4], [1, 3, 4, "5"]], "config": {"block_m": 16}}]}, "is no tile"),
        ({"entries": [{"key": [*KEY[:4]], "config": {"block_m": 16}}]}, "no file of autotune"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(change, message, tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"version": 3, "device": "", "entries": [], **change}))
    with pytest.raises(ValueError, match=message):
        autotune.load(path)
    assert tiles.tuned == {}


def test_what_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        autotune.tune(lambda: None)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no file of autotune"):
        autotune.load(tmp_path / "other.json")
