"""Suites of steps that several processes take together, and of one process on a link that it pretends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from ibp_triton.bench import data_parallel, suite
from ibp_triton.errors import ConfigError
from ibp_triton.harness.cli import app

TINY = {
    "name": "tiny",
    "networks": {"mlp": {"options": {"hidden": 16, "depth": 4}}},
    "methods": ["bp", "loss_ibp", "tbp"],
    "batch": [4],
    "step": ["eager"],
    "rounds": 3,
    "warmup": 1,
}
NUMBERS = 784 * 16 + 2 * 16 * 16 + 16 * 10 + 3 * 16 + 10  # of its gradients


def bench(folder: Path, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """The command and what it wrote."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False), encoding="utf-8")
    result = CliRunner().invoke(app, ["bench", str(path), "--output", str(folder / "out")])
    return result, json.loads((folder / "out" / "tiny.json").read_text())


def failing(*_: Any) -> nn.Module:
    """A network that cannot be made."""
    raise OSError("no such weights")


def test_two_processes_beside_one_and_sums_that_begin_late(tmp_path: Path) -> None:
    """Three new processes import torch: 10 s."""
    wanted = ["one_process", "late_sums", "by_hand_step", "sums"]
    result, found = bench(
        tmp_path, processes=[2], baselines=wanted, targets={"bp eager step / one_process eager step": 1}
    )
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row["extra_info"] for row in found["benchmarks"]}
    kinds = ("eager step", "late_sums eager step", "one_process eager step", "sums")
    assert rows.keys() == {f"{m} {k}" for m in TINY["methods"] for k in kinds} | {"bp by_hand eager step"}  # type: ignore[attr-defined]
    own = rows["loss_ibp eager step"]
    assert (own["processes"], own["clock"]) == (2, "wall")
    assert own["parity"] < 1e-5
    assert own["waiting_seconds"] > 0
    others = ("one_process", "late_sums")
    assert own["ratios"].keys() >= {f"loss_ibp eager step / {name} eager step" for name in others}
    assert "bp eager step / by_hand eager step" in rows["bp eager step"]["ratios"]
    assert rows["tbp sums"]["ratios"].keys() >= {"tbp sums / eager step"}
    assert not rows["bp late_sums eager step"]["ratios"]
    assert "| bp eager step / one_process eager step | ≤ 1 |" in (tmp_path / "out" / "tiny.md").read_text()


def test_a_pretended_link_takes_its_time(tmp_path: Path) -> None:
    speed = 4 * NUMBERS / 0.05  # bytes a second: 50 ms
    result, found = bench(tmp_path, link=speed / 1e9, baselines=["late_sums", "sums"])
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in found["benchmarks"]}
    assert rows["bp sums"]["stats"]["min"] > 0.05
    assert rows["bp sums"]["stats"]["median"] < 0.1
    for method in ("bp", "loss_ibp", "tbp"):
        late = rows[f"{method} late_sums eager step"]
        assert late["stats"]["min"] > late["extra_info"]["waiting_seconds"] > 0.04
        assert sum(late["extra_info"]["cpu_seconds"]) < 3 * 0.04


def test_a_gradient_that_is_not_everybodys_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = data_parallel.Link.begin

    def louder(world: data_parallel.Link, value: torch.Tensor) -> Any:
        return right(world, value.mul_(1.01))

    monkeypatch.setattr(data_parallel.Link, "begin", louder)
    result, found = bench(tmp_path, link=1, baselines=["late_sums"], methods=["loss_ibp"])
    assert result.exit_code == 1
    assert "loss_ibp: off the mean of each process's gradients by 0.0" in str(result.exception)
    assert not found["benchmarks"]


def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    """Two new processes import torch: 8 s."""
    networks = {"mine": {"import": f"{__name__}:failing", "input_shape": [1, 16, 16]}}
    (tmp_path / "out").mkdir()
    result, found = bench(tmp_path, processes=[2], networks=networks, baselines=["sums"])
    assert result.exit_code == 1
    assert "raised OSError: no such weights" in str(result.exception)
    assert found["refused"][0]["fault"] == "ours"
    assert " of 2: " in found["refused"][0]["reason"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": ["late_sums"]}, "baseline late_sums is of several processes"),
        ({"processes": [2], "step": ["compiled"]}, r"processes and link are of step: [eager] on device: [cpu]"),
        ({"link": 1, "device": ["cuda"]}, r"processes and link are of step: [eager] on device: [cpu]"),
        ({"link": 1, "processes": [2]}, "a link is pretended by one process: leave processes out"),
        ({"link": 0}, "link: Input should be greater than 0"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        suite.validate({**TINY, **changes}, "here")
    assert message in str(caught.value)
