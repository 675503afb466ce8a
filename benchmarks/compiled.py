"""Whole training steps under torch.compile beside the same steps eager: `python -m benchmarks.compiled [--json FILE]`.

A step is the gradient and the optimizer's update. Autograd's is compiled as it stands, with
``torch._dynamo.config.trace_autograd_ops``; ours is the harness's `training.compile`. Each compiled step is compared
with its eager twin, parameters and momenta after every one of four steps, before anything is timed. Needs g++.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor
from torch._inductor.utils import fresh_cache

from ibp_triton.bench import by_hand, parity, whole_steps
from ibp_triton.bench import measure as clock
from ibp_triton.bench.candidates import METHODS, NETWORKS, PRECISIONS, Case
from ibp_triton.bench.whole_steps import Trainee
from ibp_triton.harness.threads import keep_freed_memory


def autograd(case: Case, key: str, compiled: bool) -> Trainee:
    """Gradients by autograd, then SGD; compiled as one function in which a graph break is an error."""
    model = case.model()
    optimizer, gradients = whole_steps.optimizer_of(model), by_hand.autograd(case, key, model)
    parameters = dict(model.named_parameters())
    buffers = whole_steps.momenta(model, optimizer)

    def step() -> Tensor:
        value, found = gradients()
        for name, parameter in parameters.items():
            parameter.grad = found[name]
        optimizer.step()
        return value

    def whole() -> Tensor:
        value, found = gradients()
        with torch.no_grad():
            for name, parameter in parameters.items():  # the product stands alone: inductor would lose an alpha
                parameter.sub_(0.1 * buffers[name].mul_(0.9).add_(found[name] * (1 - 0.9)))
        return value

    return Trainee(torch.compile(whole, fullgraph=True) if compiled else step, parameters, buffers)


def ours(case: Case, key: str, compiled: bool) -> Trainee:
    """The library's step."""
    return whole_steps.ours(case, key, "compiled" if compiled else "eager")


STEPS = {"autograd": autograd, "ours": ours}


def measure(case: Case, key: str, rounds: int) -> dict[str, Any]:
    """One method: seconds to compile, parity, milliseconds a step; instead of those, the error of what fails."""
    steps = {name: make(case, key, False) for name, make in STEPS.items()}
    row: dict[str, Any] = {"network": case.network, "precision": case.precision, "method": key}
    row |= {"compile_seconds": {}, "parity": {}, "error": {}}
    for name, make in STEPS.items():
        start = cpu_seconds()
        try:
            found = make(case, key, True)
            found.step()  # compiles
            row["compile_seconds"][name] = cpu_seconds() - start
            steps[name].step()
            off = row["parity"][name] = whole_steps.off_twin(found, steps[name])
        except Exception as error:  # whatever the compiler raises is the result
            row["error"][name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        if off < parity.PARITY[case.precision]:
            steps[f"compiled {name}"] = found
        else:
            row["error"][name] = f"off its eager twin by {off:.2g}"
    times = clock.interleave({name: training.step for name, training in steps.items()}, rounds)
    row["milliseconds"] = {name: 1e3 * found.median for name, found in times.items()}
    row["ratios"] = {
        f"{a} / {b}": clock.ratio(times[a], times[b])
        for a, b in (("compiled autograd", "autograd"), ("compiled ours", "ours"), ("ours", "compiled autograd"))
        if a in times and b in times
    }
    torch._dynamo.reset()
    return row


def cpu_seconds() -> float:
    """Of this process and of the C++ compilers that it ran."""
    return sum(os.times()[:4])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds, ratios in brackets to the eager twin."""
    lines = [
        "| network | method | precision | compile autograd, ours (s) | autograd (ms) | compiled | ours (ms) |"
        " compiled | ours / fastest autograd |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        took = ", ".join(f"{row['compile_seconds'].get(name, float('nan')):.0f}" for name in ("autograd", "ours"))
        shown, cells = row["milliseconds"], []
        for name in ("autograd", "ours"):
            ratio = row["ratios"].get(f"compiled {name} / {name}")
            cells.append(f"{shown[name]:.1f}")
            cells.append("failed" if ratio is None else f"{shown[f'compiled {name}']:.1f} ({ratio:.2f})")
        best = shown["ours"] / min(shown["autograd"], shown.get("compiled autograd", float("inf")))
        name = f"{row['network']} | {row['method']} | {row['precision']}"
        lines.append(f"| {name} | {took} | {' | '.join(cells)} | {best:.2f} |")
    errors = [f"{r['method']} {r['precision']} {name}: {text}" for r in rows for name, text in r["error"].items()]
    return "\n".join([*lines, "", *errors])


def main() -> None:
    """Compile, compare, measure; print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (15)")
    parser.add_argument("--network", default="mnist", choices=list(NETWORKS))
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS), help="methods")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    torch._dynamo.config.trace_autograd_ops = True
    torch._inductor.config.compile_threads = 1  # compilers as children of this process, so that their time counts
    rows = []
    with fresh_cache():
        for precision in arguments.precision:
            for key in arguments.only:
                rows.append(measure(Case(arguments.network, 32, precision), key, arguments.rounds))
                print(json.dumps(rows[-1]), flush=True)
    results = {"machine": clock.machine(), "rounds": arguments.rounds, "rows": rows}
    print(f"\n{results['machine']}\n\n{table(rows)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
