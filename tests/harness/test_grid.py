from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ibp_triton.errors import ConfigError
from ibp_triton.harness import grid, loading

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


def runs(path: Path, *overrides: str) -> list[grid.Run]:
    return grid.runs(loading.load(path, overrides))


def test_grid_is_variants_by_rows_by_parameters_by_seeds(tree: Tree, write: Write) -> None:
    tree["methods"]["exact"] = {"method": "loss_ibp", "beta": [0.01, 0.1], "semantics": "exact"}
    tree |= {"variants": {"a": {}, "b": {"training.epochs": 3}}, "select": "test"}
    found = runs(write(tree))
    assert len(found) == 2 * (1 + 1 + 2) * 2
    assert [run.seeds.order for run in found] == [0] * 8 + [1] * 8
    assert len({run.name for run in found}) == len(found)
    assert {run.method.semantics for run in found if run.row == "exact"} == {"exact"}


def test_name_depends_on_what_decides_the_result_and_on_nothing_else(tree: Tree, write: Write) -> None:
    path = write(tree)
    first = runs(path)[0].name
    for harmless in ("data.dir=/elsewhere", "training.device=cuda", "name=other", "tangents.sigma=1.0", "workers=2"):
        assert runs(path, harmless)[0].name == first
    for decisive in ("training.epochs=3", "data.holdout=16", "network.hidden=9", "seeds=[7]", "training.decay=0.9"):
        assert runs(path, decisive)[0].name != first


def test_equal_variants_share_a_run(tree: Tree, write: Write) -> None:
    found = runs(write({**tree, "variants": {"paper": {"preset": "paper"}, "2015": {"preset": "toolbox-2015"}}}))
    assert len(found) == 8
    assert len({run.name for run in found}) == 4


def test_only_selects(tree: Tree, write: Write) -> None:
    every = runs(write(tree))
    assert {run.method.key for run in grid.select(every, ["method=loss_ibp"])} == {"loss_ibp"}
    assert [run.label for run in grid.select(every, ["seed=1", "beta=0.03"])] == ["loss_ibp 0.03 seed 1"]
    with pytest.raises(ConfigError, match=r"no such run; there is bp, loss_ibp"):
        grid.select(every, ["method=tbp"])
    with pytest.raises(ConfigError, match=r"write one of method, row"):
        grid.select(every, ["methods=tbp"])


def test_seeds_may_be_given_apart(tree: Tree, write: Write) -> None:
    found = runs(write({**tree, "seeds": [{"subset": 1, "weights": 2, "order": 3}]}))
    assert found[0].seeds.model_dump() == {"subset": 1, "weights": 2, "order": 3}


@pytest.mark.parametrize(
    ("given", "expected"),
    [("0..3", [0, 1, 2, 3]), ("-1..1", [-1, 0, 1]), ("5..5", [5]), ("[0..2, 7]", [0, 1, 2, 7]), ("2 .. 3", [2, 3])],
)
def test_seeds_may_be_ranges(tree: Tree, write: Write, given: str, expected: list[int]) -> None:
    tree["methods"] = {"bp": None}
    assert [run.seeds.order for run in runs(write(tree), f"seeds={given}")] == expected
    assert runs(write({**tree, "seeds": "0..1"}))[1].name == runs(write({**tree, "seeds": [0, 1]}))[1].name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("3..0", "seeds: '3..0' holds no seed, for it runs backwards; write 0..3"),
        ("[]", "seeds: List should have at least 1 item"),
        ("0..", "seeds: '0..' is no range of seeds; write its first and its last, such as 0..9"),
        ("many", "seeds: 'many' is no range of seeds"),
        ("[0..3, 2]", "seeds: 2 is given twice; give each once"),
        ("[0..3, 3..5]", "seeds: 3 is given twice; give each once"),
        ("0..10000", "seeds: '0..10000' holds 10001 seeds, more than 10000; shorten it"),
    ],
)
def test_seeds_that_are_none_are_refused(tree: Tree, write: Write, given: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        runs(write(tree), f"seeds={given}")
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
