"""The scripts of examples/ run, and learn."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from examples import mixup, plain_loop, regression, segmentation

ROOT = Path(__file__).parents[2]


def test_a_plain_loop_learns():
    assert plain_loop.main(120) < 0.3 < plain_loop.main(1)
    assert plain_loop.main(120, torch.bfloat16) < 0.35


def test_mixup_learns():
    assert mixup.main(80) < mixup.main(1)


def test_segmentation_learns():
    assert segmentation.main(60) < 0.5 * segmentation.main(1)


def test_regression_learns():
    assert regression.main(120) < 0.3 * regression.main(1)


def test_data_parallel_runs_under_torchrun():
    """About 20 s: two processes that import torch."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    run = subprocess.run(
        [*command, "-m", "examples.data_parallel"],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.split()
    assert first == second
    assert float(first) < 0.5
