"""mypy --strict passes on a user's script, and notices what is wrong in one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ibp_triton as ibp

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "typed_script.py"
WRONG = {
    "steps[0](x, [0, 1])": ("steps[0](x)", "Missing positional argument"),
    "clip_norm=1.0": ("clip_nrom=1.0", "Unexpected keyword argument"),
    "penalty: Tensor | None": ("penalty: Tensor", "Incompatible types"),
    "ibp.TRADES(6.0, 0.1, 0.02, 10)": ('ibp.TRADES(6.0, "0.1", 0.02, 10)', "incompatible type"),
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], tuple[str, int]]]:
    """mypy as a user calls it, without this project's settings, the library's own lines silent as when installed."""
    api, cache = pytest.importorskip("mypy.api"), tmp_path_factory.mktemp("mypy")
    options = ["--strict", "--config-file=", "--follow-imports=silent", f"--cache-dir={cache}"]

    def check(path: Path) -> tuple[str, int]:
        out, err, code = api.run([*options, str(path)])
        return out + err, code

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPYPATH", str(ROOT))
        yield check


def test_mypy_strict_passes_on_a_users_script_with_every_public_name(checked: Callable[..., tuple[str, int]]) -> None:
    """About 15 s: mypy reads torch."""
    out, code = checked(SCRIPT)
    assert code == 0, out
    text = SCRIPT.read_text(encoding="utf-8")
    assert [name for name in ibp.__all__ if not re.search(rf"\bibp\.{name}\b", text)] == []


def test_mypy_notices_what_is_wrong(checked: Callable[..., tuple[str, int]], tmp_path: Path) -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    for right, (wrong, _) in WRONG.items():
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    (tmp_path / "wrong.py").write_text(text, encoding="utf-8")
    out, code = checked(tmp_path / "wrong.py")
    assert code == 1
    for _, message in WRONG.values():
        assert message in out
