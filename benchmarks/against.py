"""Gradients of this checkout beside those of another commit: `python -m benchmarks.against COMMIT --rounds 15`.

Two processes, one for each code, compute in turn on the paper's networks, float32, one thread each; every third round
begins with new ones, in case one is slower or faster for all its life.
Prints per network and method new time over old: the ratio of each code's least CPU time, the median and range of the
ratios within a round, and how far the two gradients are apart. `HEAD` as COMMIT shows what is noise. `--instructions`
counts what the processor does in one gradient instead, by valgrind, the same on every run whatever else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
NETWORKS = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
LIFE = 3  # rounds that a pair of processes lives
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "bp": ("BP", {}),
    "loss_ibp": ("LossIBP", {"beta": 0.03}),
    "fast_tbp": ("FastTangentBP", {"beta": 0.01}),
    "fast_at": ("FastAdversarialTraining", {"epsilon": 0.03}),
    "at": ("AdversarialTraining", {"epsilon": 0.05}),
    "prediction_ibp": ("PredictionIBP", {"beta": 1 / 32}),
    "tbp": ("TangentBP", {"beta": 0.01}),
    "loss_ibp_exact": ("LossIBP", {"beta": 0.03, "semantics": "exact"}),
}
SERVE = "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[2])['serve']()"
VALGRIND = ["valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=counts"]


def serve() -> None:
    """Answer each line {network, method, batch, calls} by the CPU seconds of each call and sums of the gradient.

    Under valgrind, with {count: true}, instructions stand for seconds.
    """
    torch.set_num_threads(1)
    cells: dict[Any, Callable[[], Any]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        key = asked["network"], asked["method"], asked["batch"]
        if key not in cells:
            cells = {key: gradient(*key)}
        taken = []
        for _ in range(asked["calls"]):
            begin = time.process_time()
            if asked.get("count"):
                control("--instr=on")
            found = cells[key]()
            if asked.get("count"):
                control("--instr=off")
                control("--dump")
            taken.append(time.process_time() - begin)
        if asked.get("count"):
            taken = counted()[-len(taken) :]
        print(json.dumps({"seconds": taken, "sums": [float(g.double().square().sum()) for g in found]}), flush=True)


def control(what: str) -> None:
    """Tell valgrind, in which this process runs."""
    subprocess.run(["callgrind_control", what, str(os.getpid())], stdout=subprocess.DEVNULL, check=True)


def counted() -> list[float]:
    """Instructions of each dump so far, in order."""
    files = sorted(Path().glob("counts.*"), key=lambda path: int(path.suffix[1:]))
    totals = [line for path in files for line in path.read_text().splitlines() if line.startswith("totals:")]
    return [float(line.split()[1]) for line in totals]


def gradient(network: str, method: str, batch: int) -> Callable[[], list[torch.Tensor]]:
    """The gradients of this method on this network, by the package that is first on the path."""
    import ibp_triton as ibp
    from ibp_triton.harness import models

    torch.manual_seed(0)
    shape, name = NETWORKS[network], f"paper_{network}"
    model = getattr(models, name)(shape, pool="torch-ceil", init="torch").to(memory_format=torch.channels_last)
    x, tangents = torch.rand(batch, *shape), 0.1 * torch.randn(5 * batch, *shape)
    x, tangents = (a.contiguous(memory_format=torch.channels_last) for a in (x, tangents))
    labels, wrapped, (kind, fields) = torch.arange(batch) % 10, ibp.Network(model), METHODS[method]
    chosen = getattr(ibp, kind)(**fields)
    tau = tangents.unflatten(0, (5, batch)) if chosen.needs_tangents else None
    return lambda: list(chosen.gradients(wrapped, x, labels, tau)[1].values())


def ask(worker: subprocess.Popen[str], **asked: Any) -> dict[str, Any]:
    """One answer of a worker."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(asked) + "\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    return json.loads(line) if line else sys.exit("a worker ended; its error stands above")  # type: ignore[no-any-return]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--instructions", action="store_true", help="count instructions, by valgrind")
    asked = parser.parse_args()
    if asked.instructions and shutil.which("valgrind") is None:
        parser.error("--instructions needs valgrind (Debian's package of that name)")
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", asked.commit], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
        if asked.instructions:
            count((str(ROOT), folder), asked)
            return
        for network in asked.networks:
            for method in asked.only:
                print(cell((str(ROOT), folder), network, method, asked.batch, asked.rounds), flush=True)


@contextmanager
def pair(places: tuple[str, str], under: Sequence[str] = ()) -> Iterator[list[subprocess.Popen[str]]]:
    """A process for each of the two codes, each in a folder of its own."""
    workers = []
    for i, place in enumerate(places):
        (folder := Path(places[1], f"worker{i}")).mkdir(exist_ok=True)
        command = [*under, sys.executable, "-c", SERVE, place, __file__]
        workers.append(subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def count(places: tuple[str, str], asked: argparse.Namespace) -> None:
    """The table of instructions: of one gradient, in millions, and new over old."""
    with pair(places, VALGRIND) as workers:
        for network in asked.networks:
            for method in asked.only:
                what = {"network": network, "method": method, "batch": asked.batch}
                for worker in workers:
                    ask(worker, **what, calls=4)
                new, old = (ask(worker, **what, calls=1, count=True)["seconds"][0] / 1e6 for worker in workers)
                print(f"{network:8} {asked.batch:4} {method:16} {new:8.1f} {old:8.1f}  {new / old:.4f}", flush=True)


def cell(places: tuple[str, str], network: str, method: str, batch: int, rounds: int) -> str:
    """One line of the table."""
    what = {"network": network, "method": method, "batch": batch}
    times: tuple[list[float], list[float]] = ([], [])
    ratios, apart = [], 0.0
    for first in range(0, rounds, LIFE):
        with pair(places) as workers:
            sums = [ask(worker, **what, calls=3)["sums"] for worker in workers]
            apart = max(apart, *(abs(a - b) / abs(b) for a, b in zip(*sums, strict=True)))
            for number in range(first, min(first + LIFE, rounds)):
                found = {}
                for i in (0, 1) if number % 2 else (1, 0):
                    found[i] = ask(workers[i], **what, calls=8)["seconds"]
                    times[i].extend(found[i])
                ratios.append(statistics.median(found[0]) / statistics.median(found[1]))
    least, middle = min(times[0]) / min(times[1]), statistics.median(ratios)
    spread = f"{middle:.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
    return f"{network:8} {batch:4} {method:16} least {least:.3f}  in turn {spread}  apart {apart:.0e}"


if __name__ == "__main__":
    main()
