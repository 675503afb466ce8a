"""The machine code of a compiled kernel: how many instructions stand in it, and in each of its loops."""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_NVIDIA = re.compile(r"(?P<label>\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(?P<text>\S.*;)")
_AMD = re.compile(r"(?P<label>\.LBB\d+_\d+):|\t(?P<text>[a-z]\w+\b.*)")
_JUMP = re.compile(r"(?:BRA|s_c?branch).*?(\.L_x_\d+|\.LBB\d+_\d+)")


@dataclass(frozen=True)
class Code:
    """Instructions of one kernel, a warp each time it comes by."""

    length: int  # of all the code
    loops: tuple[int, ...] = ()  # of each outermost loop, in the code's order

    def issued(self, trips: Sequence[int]) -> int:
        """Instructions that a warp issues, the longest loops gone through `trips` times, in the code's order.

        Without as many loops the longest that there are are taken: the others were unrolled or are gone.
        """
        longest = sorted(sorted(range(len(self.loops)), key=lambda i: -self.loops[i])[: len(trips)])
        return self.length + sum(self.loops[i] * (n - 1) for i, n in zip(longest, trips, strict=False) if n > 1)


def disassembled(kernel: Any, backend: str) -> Code:
    """The code of what `triton.compile` made, for "cuda" or "hip"."""
    if backend == "hip":
        return read(kernel.asm["amdgcn"].splitlines(), _AMD)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return read(text.splitlines(), _NVIDIA)


def read(lines: Iterable[str], pattern: re.Pattern[str] = _NVIDIA) -> Code:
    """Count instructions and find loops, which end in a jump back; the padding behind the code is left out."""
    places: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    length = 0
    for line in lines:
        found = pattern.match(line.strip() if pattern is _NVIDIA else line)
        if found is None:
            continue
        if found["label"]:
            places[found["label"]] = length
            continue
        if found["text"].startswith("NOP") or found["text"].startswith("s_code_end"):
            continue
        jump = _JUMP.search(found["text"])
        start = places.get(jump[1]) if jump else None
        if start == length:  # a jump to itself stands behind the end
            continue
        length += 1
        if start is not None:
            loops = [loop for loop in loops if loop[0] < start] + [(start, length)]
    return Code(length, tuple(end - start for start, end in loops))
