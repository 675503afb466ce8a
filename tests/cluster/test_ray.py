"""Runs on a real Ray cluster, two nodes on this machine: one of them is killed in the middle.

A minute and more where two cores are busy: each node's first task imports torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ibp_triton.harness import store
from ibp_triton.harness.bucket import Bucket
from ibp_triton.harness.executors.ray_tasks import Ray
from ibp_triton.harness.launch import launch
from tests.cluster.conftest import ObjectStore, copied
from tests.harness.test_executors import content, job

ray = pytest.importorskip("ray")

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
IMPATIENT = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}  # a node is dead after 2 s
EPOCHS = 300
SMALL = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A head without CPUs, and two nodes of one."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = Cluster(initialize_head=True, head_node_args={**SMALL, "num_cpus": 0, "_system_config": IMPATIENT})
    try:
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def two_long_runs(tree: Tree) -> None:
    """One for each node, many times as long as a node takes to die."""
    tree["training"]["epochs"], tree["seeds"] = EPOCHS, [0]


def losing_a_node(cluster: Any, events: list[dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    """Listens, as ``launch`` wants it, and takes one of two new nodes away once runs are under way on both."""
    nodes = [cluster.add_node(**SMALL) for _ in range(2)]

    def listen(event: dict[str, Any]) -> None:
        events.append(event)
        trained = {one["run"] for one in events if one["kind"] == "epoch" and one["epoch"] >= 3}
        if nodes and len(trained) == 2:  # one on each node
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.clear()

    return listen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_a_node_that_dies_loses_no_run_and_changes_no_bit(
    cluster: Any, tree: Tree, write: Write, tmp_path: Path
) -> None:
    """Slow: two nodes import torch, and a third one after a death."""
    two_long_runs(tree)
    path, events = write(tree), list[dict[str, Any]]()
    calm, other = job(path, tmp_path / "calm"), job(Path("tiny.yaml"), Path("cluster"))
    launch(calm, 1, lambda _: None)
    assert launch(other, Ray(cluster.address), losing_a_node(cluster, events)) == []
    notes = [event["message"] for event in events if event["kind"] == "note"]
    assert len(notes) == 1
    assert notes[0].startswith(("its node died; another one", "its Ray worker died ("))
    for run in calm.runs:
        assert content(tmp_path / "calm" / run.name) == content(tmp_path / "cluster" / run.name)
    assert sorted(event["run"] for event in events if event["kind"] == "done") == sorted(r.name for r in calm.runs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_nodes_that_share_no_folder_share_a_bucket(
    object_store: ObjectStore, runs: Bucket, cluster: Any, tree: Tree, write: Write, tmp_path: Path
) -> None:
    """Slow: two nodes import torch, and a third worker after one was killed."""
    two_long_runs(tree)
    path, events, requests = write(tree), list[dict[str, Any]](), list[str]()
    object_store.hear = lambda request: requests.append(f"{request['REQUEST_METHOD']} {request['PATH_INFO']}")
    calm = job(path, tmp_path / "calm")
    launch(calm, 1, lambda _: None)
    other = replace(job(path, tmp_path / "none"), bucket=runs)
    assert launch(other, Ray(cluster.address, apart=True), losing_a_node(cluster, events)) == []
    notes = [event["message"] for event in events if event["kind"] == "note"]
    assert len(notes) == 1
    assert notes[0].startswith(("its node died; another one", "its Ray worker died ("))
    assert not (tmp_path / "none").exists(), "all of it is in the bucket"
    found = copied(runs, tmp_path / "copy")
    for run in calm.runs:
        assert content(tmp_path / "calm" / run.name) == content(found / run.name)
        states = [one for one in requests if one == f"PUT /bucket/tiny/runs/{run.name}/{store.RESUME}"]
        assert EPOCHS <= len(states) <= EPOCHS + 3, "each epoch once, but for what a dead node had not put"
    assert sorted(event["run"] for event in events if event["kind"] == "done") == sorted(r.name for r in calm.runs)


EXITS = """
import os
from torch import nn

def build(shape, classes, ends):
    if ends:
        os._exit(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, classes))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_ends_its_workers_fails_alone(cluster: Any, tree: Tree, write: Write, tmp_path: Path) -> None:
    """Slow: three workers import torch."""
    (tmp_path / "ends_its_worker.py").write_text(EXITS, encoding="utf-8")
    variants = {"bad": {"network.options.ends": True}, "good": {}}
    network = {"import": "ends_its_worker:build", "options": {"ends": False}}
    write({**tree, "network": network, "variants": variants, "methods": {"bp": None}, "seeds": [0]})
    cluster.add_node(**SMALL)
    task, events = job(Path("tiny.yaml"), Path("cluster")), list[dict[str, Any]]()
    (failure,) = launch(task, Ray(cluster.address), events.append)
    told = ["start", "note", "start", "failed"]
    assert failure.endswith("while it trained this run, as one before")
    assert [event["kind"] for event in events if event["run"] == task.runs[0].name] == told
    assert store.result(Path("cluster") / task.runs[1].name)


@pytest.mark.slow
def test_term_stops_the_command_and_its_cluster(tree: Tree, write: Write, tmp_path: Path) -> None:
    """Slow: the command and its worker import torch."""
    tree["training"]["epochs"] = 20_000
    command = [sys.executable, "-m", "ibp_triton", "run", str(write(tree)), "--executor", "ray"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    pipes: Any = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as ours:
        end = time.monotonic() + 120
        while not list((tmp_path / "out" / "runs").glob("*/metrics.jsonl")):
            assert time.monotonic() < end
            time.sleep(0.1)
        ours.terminate()
        _, told = ours.communicate(timeout=60)
    assert ours.returncode == 130
    assert "the same command goes on" in " ".join(told.split())
    with store.lock(next((tmp_path / "out" / "runs").iterdir())) as mine:
        assert mine, "its worker has ended"
