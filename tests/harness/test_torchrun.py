"""Runs that two processes of torchrun train together: the numbers of one process, and a death in the middle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ibp_triton.harness import grid, loading, store
from ibp_triton.harness.launch import launch
from tests.harness.test_executors import TIMES, content, job

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
ROOT = Path(__file__).parents[2]
METHODS = {
    "bp": None,
    "loss_ibp": {"beta": 0.03},
    "prediction_ibp": {"beta": 0.03, "semantics": "exact"},
    "at": {"epsilon": 0.05},
    "tbp": {"beta": 0.01},
}


def torchrun(config: Path, *options: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """The command on two processes; the first port that is free, so that tests may run beside each other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    command += ["-m", "ibp_triton", "run", str(config), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{config.parent}"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


NORMED = """
from torch import nn

def build(shape, classes):
    convolution = nn.Conv2d(1, 4, 3, stride=2)
    return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, classes))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tree: Tree, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow: torchrun and its two processes import torch."""
    (tmp_path / "normed_here.py").write_text(NORMED, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    tree |= {"network": {"import": "normed_here:build"}, "methods": METHODS, "seeds": [0]}
    tree["training"] |= {"augment": {}, "batch_size": 15, "test_every": 1}  # an odd size, and a last batch of 2
    tree["data"]["examples"] = 49
    path = write(tree)
    launch(job(path, tmp_path / "one"), 1, lambda _: None)
    run = torchrun(path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("[5/5]") == 1, "process 0 alone prints"
    for each in grid.runs(loading.load(path)):
        one, two = (tmp_path / place / each.name for place in ("one", "out/runs"))
        for first, second in zip(store.read_metrics(one), store.read_metrics(two), strict=True):
            assert {k: first[k] for k in first if k not in TIMES} == pytest.approx(
                {k: second[k] for k in second if k not in TIMES}, rel=1e-5
            )
        assert (store.find_json(two / store.ENVIRONMENT) or {})["processes"] == 2
        expected, found = (load_file(place / store.CHECKPOINT) for place in (one, two))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


KILLED = """
import os, signal
from pathlib import Path
from torch import nn

class Killed(nn.Linear):  # process 1, in its 100th forward pass, once
    passes = 0
    def forward(self, x):
        Killed.passes += self.training
        once = Path(__file__).parent / "once"
        if os.environ.get("RANK") == "1" and Killed.passes == 100 and once.exists():
            once.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

def build(shape, classes):
    return nn.Sequential(nn.Flatten(), Killed(256, classes))
"""


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_torchrun_goes_on_from_the_last_epoch(
    tree: Tree, write: Write, tmp_path: Path
) -> None:
    """Slow: torchrun starts its processes four times."""
    (tmp_path / "killed.py").write_text(KILLED, encoding="utf-8")
    tree |= {"network": {"import": "killed:build"}, "methods": {"loss_ibp": {"beta": 0.03}}, "seeds": [0]}
    tree["training"]["epochs"] = 60
    path = write(tree)
    (name,) = (run.name for run in grid.runs(loading.load(path)))
    assert torchrun(path, "--set", f"output={tmp_path / 'calm'}").returncode == 0
    (tmp_path / "once").touch()
    broken = torchrun(path)
    assert broken.returncode != 0
    told = " ".join(broken.stderr.split())  # torchrun's own signal may come first
    assert "process 0 of 2 stopped (" in told or "stopped; finished runs and epochs are stored" in told
    done = store.count_epochs(tmp_path / "out" / "runs" / name)
    assert 0 < done < 60
    (tmp_path / "once").touch()
    whole = torchrun(path, "--set", f"output={tmp_path / 'again'}", restarts=1)
    assert whole.returncode == 0, whole.stderr
    assert not (tmp_path / "once").exists()
    assert content(tmp_path / "again" / "runs" / name) == content(tmp_path / "calm" / "runs" / name)
