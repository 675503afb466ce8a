"""The faults that `make mutants` puts in: each is another program, and nothing but what is computed changes."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest

from tests.mutants import changes
from tests.mutants.__main__ import equivalents, selections

SOURCE = '''
"""Text of 1 and 2."""

@cache(maxsize=3)
def f(x: Literal[1, 2] = 1) -> Tensor | None:
    """Not a change: a + b."""
    assert x > 0
    if not x and x < 2:
        raise ValueError(f"{x + 1}")
    g(zip(x, strict=True))
    return x * -2 if True else "a" % x
'''


def test_what_is_changed_and_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "ROOT", tmp_path)
    (tmp_path / "m.py").write_text(SOURCE, encoding="utf-8")
    found = {line[1:].strip() for m in changes.mutants("m.py") for line in m.diff.splitlines() if line.startswith("+")}
    assert found == {
        "def f(x: Literal[1, 2] = 2) -> Tensor | None:",
        "if (not x or x < 2):",
        "if (x) and x < 2:",
        "if not x and (x <= 2):",
        "if not x and x < 3:",
        "pass",
        "return ('a' % x if True else x * -2)",
        'return (x / -2) if True else "a" % x',
        'return x * (2) if True else "a" % x',
        'return x * -3 if True else "a" % x',
        'return x * -2 if False else "a" % x',
        "return x * -2 if True else ('a' * x)",
    }


def test_every_fault_is_another_program_and_has_tests() -> None:
    for path, tests in selections().items():
        assert all((changes.ROOT / test).is_file() for test in tests), tests
        every = list(changes.mutants(path))
        for mutant in random.Random(0).sample(every, min(10, len(every))):
            assert ast.dump(ast.parse(mutant.text)) != ast.dump(ast.parse((changes.ROOT / path).read_bytes()))


def test_what_is_called_equivalent_can_be_made_and_has_a_reason() -> None:
    entries = equivalents()
    possible = {(path, mutant.change) for path in {path for path, _ in entries} for mutant in changes.mutants(path)}
    assert entries.keys() <= possible
    assert all(reason.strip() for reason in entries.values())
