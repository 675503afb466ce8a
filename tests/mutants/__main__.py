"""Try the mutants of the sample that are not known yet, for so many minutes; write docs/mutants.md."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.machinery
import json
import math
import os
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mutants.changes import ROOT, Mutant, mutants

OUTCOMES, REPORT = ROOT / ".mutants" / "outcomes.jsonl", ROOT / "docs" / "mutants.md"
EQUIVALENTS, OUTCOME = Path(__file__).with_name("equivalent.txt"), ("killed", "timed out", "survived", "equivalent")
SLOW = ("numpy", "torch._dynamo", "torch._decomp.decompositions_for_jvp")  # imported once, before the forks
HEAD = """# Mutants

Written by `make mutants` (tests/mutants): small faults put into the mathematics, one at a time, and whether the
tests notice.
"""
TESTS = {  # files of tests/library for files of the package, the quickest and nearest first
    "methods": ("invariants", "ledger", "more_methods", "criteria", "agreement", "tape", "precision", "step"),
    "sweeps": ("invariants", "ledger", "more_methods", "criteria", "agreement", "buckets", "memory"),
    "dense pooling moves reductions structural": ("rules", "rules_structural", "ledger", "invariants"),
    "batch_norm normalisation": ("rules_normalisation", "rules", "invariants"),
    "attention multihead products": ("rules_attention", "rules"),
    "activations pointwise binary": ("rules_pointwise", "rules", "memory"),
    "selection": ("rules_structural", "rules", "rules_pointwise"),
    "generic functional outputs unseen": ("rules", "ledger", "invariants", "vmap", "any_code", "recording"),
    "written": ("rules_structural", "any_code"),
    "tape steady": ("tape", "agreement", "more_methods", "criteria", "buckets"),
    "image_conv": ("image_conv",),
}


def selections() -> dict[str, list[str]]:
    """The test files of each file of the package."""
    found = {}
    for names, tests in TESTS.items():
        for name in names.split():
            places = {"methods": "methods/*.py"} | {
                top: f"{top}.py" for top in ("sweeps", "tape", "steady", "image_conv")
            }
            for path in sorted((ROOT / "ibp_triton").glob(places.get(name, f"backends/torch/{name}.py"))):
                found[path.relative_to(ROOT).as_posix()] = [f"tests/library/test_{test}.py" for test in tests]
    return found


class Changed(importlib.machinery.SourceFileLoader):
    """Finds and loads one module, from other text than its file's."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(mutant.path.removesuffix(".py").replace("/", "."), str(ROOT / mutant.path))
        self.text = mutant.text

    def find_spec(self, name: str, *_: Any) -> Any:
        """None for every other module."""
        return importlib.machinery.ModuleSpec(name, self, origin=self.path) if name == self.name else None

    def get_code(self, fullname: str) -> Any:
        """Compiled from the text."""
        return compile(self.text, self.path, "exec")


def run(tests: list[str], mutant: Mutant, limit: float) -> tuple[str, float]:
    """The outcome of these tests in a child with this mutant, which may compute for `limit` seconds, and those it took.

    Only a child that sleeps is ended by the clock on the wall: others may be at work on the machine.
    """
    begin, pid = time.monotonic(), os.fork()
    if pid == 0:
        _child(tests, mutant, limit)
    while time.monotonic() < begin + 20 * limit:
        found, status, used = os.wait4(pid, os.WNOHANG)
        if found:
            late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
            outcome = "timed out" if late else "killed" if status else "survived"
            return outcome, used.ru_utime + used.ru_stime
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "timed out", limit


def _child(tests: list[str], mutant: Mutant, limit: float) -> None:
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 10))
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    sys.meta_path.insert(0, Changed(mutant))  # type: ignore[arg-type]
    code = 1
    try:
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
    finally:
        os._exit(code)


def read(digests: dict[str, str]) -> dict[str, str]:
    """The outcomes known by key; what survived other tests than today's is not known."""
    lines = OUTCOMES.read_text(encoding="utf-8").splitlines() if OUTCOMES.exists() else []
    found = list(map(json.loads, lines))
    now = (one for one in found if one["outcome"] != "survived" or one["tests"] == digests[one["key"].split(":")[0]])
    return {one["key"]: one["outcome"] for one in now}


def digest(tests: list[str]) -> str:
    """Of these files."""
    return hashlib.sha256(b"".join((ROOT / test).read_bytes() for test in tests)).hexdigest()[:16]


def equivalents() -> dict[tuple[str, str], str]:
    """Why a change, by file and changed lines, alters no result; one that stands twice in a file has one reason."""
    found = {}
    for entry in EQUIVALENTS.read_text(encoding="utf-8").strip().split("\n\n"):
        head, _, change = entry.partition("\n")
        path, _, reason = head.partition(": ")
        found[path, change] = reason
    return found


def report(sample: list[Mutant], known: dict[str, str], seed: int) -> str:
    """The text of docs/mutants.md."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    done = [mutant for mutant in sample if mutant.key in known]
    for mutant in done:
        counts[mutant.path][known[mutant.key]] += 1
    total, reasons = sum(counts.values(), Counter[str]()), equivalents()
    noticed, wrong = total["killed"] + total["timed out"], len(done) - total["equivalent"]
    percent = f"{100 * noticed / wrong:.1f} %" if wrong else "none"
    lines = [f"Seed {seed}: {len(done)} of a sample of {len(sample)} tried. The tests notice {noticed} of the {wrong}"]
    lines += [f"that are not shown to be equivalent, {percent}.", ""]
    lines += [f"| file | {' | '.join(OUTCOME)} |", f"| --- |{' --- |' * len(OUTCOME)}"]
    rows = [*sorted(counts.items()), ("all", total)]
    lines += [f"| {path} | {' | '.join(str(count[k]) for k in OUTCOME)} |" for path, count in rows]
    lines += ["", "## Survivors", ""]
    lines += [f"{m.path}\n\n```diff\n{m.diff}\n```\n" for m in done if known[m.key] == "survived"]
    lines += ["## Equivalent", "", "They change no result; tests/mutants/equivalent.txt says why.", ""]
    same = [mutant for mutant in done if known[mutant.key] == "equivalent"]
    lines += [f"{m.path}: {reasons[m.path, m.change]}\n\n```diff\n{m.diff}\n```\n" for m in same]
    return "\n".join([HEAD, *lines])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    for name, default in (("count", 300), ("seed", 0), ("minutes", 90)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked, tests = parser.parse_args(), selections()
    os.chdir(ROOT)
    os.environ["TRITON_INTERPRET"] = "1"  # as tests/conftest.py sets it, before triton is imported
    for name in SLOW:
        importlib.import_module(name)
    torch.set_num_threads(1)
    every = [mutant for path in sorted(tests) for mutant in mutants(path)]
    sample = sorted(every, key=lambda mutant: mutant.rank(asked.seed))[: asked.count]
    digests = {path: digest(files) for path, files in tests.items()}
    end, known, usual = time.monotonic() + 60 * asked.minutes, read(digests), dict[str, float]()
    same = equivalents()
    known |= {mutant.key: "equivalent" for mutant in sample if (mutant.path, mutant.change) in same}
    OUTCOMES.parent.mkdir(exist_ok=True)
    for number, mutant in enumerate(sample, 1):
        if mutant.key in known or time.monotonic() > end:
            continue
        if mutant.path not in usual:
            outcome, usual[mutant.path] = run(tests[mutant.path], Mutant(mutant.path, 0, 0, ""), 600)
            if outcome != "survived":
                sys.exit(f"{mutant.path}: {' '.join(tests[mutant.path])} fail as they are; mend them first")
        known[mutant.key], seconds = run(tests[mutant.path], mutant, 10 + 3 * usual[mutant.path])
        with OUTCOMES.open("a", encoding="utf-8") as file:
            record = {"key": mutant.key, "outcome": known[mutant.key], "tests": digests[mutant.path]}
            file.write(json.dumps(record) + "\n")
        print(f"{number}/{len(sample)} {mutant.path}: {known[mutant.key]}, {seconds:.1f} s", flush=True)
        REPORT.write_text(report(sample, known, asked.seed), encoding="utf-8")
    REPORT.write_text(report(sample, known, asked.seed), encoding="utf-8")


if __name__ == "__main__":
    main()
