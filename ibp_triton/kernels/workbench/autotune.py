"""Opt-in tuning on the device at hand: better tiles than the table's, kept in a file of the user's.

    autotune.tune(step, "tiles.json")     # once, on the chip and the shapes that matter
    autotune.load("tiles.json")           # in later runs, before the first step

Nothing is tuned unless asked for, and nothing but the operations with matrix products: the rest is bound by bandwidth.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from ibp_triton.kernels import tiles as table
from ibp_triton.kernels.tiles import FAMILIES, FLOATS, Config, Key

VERSION = 3  # of the file
CANDIDATES = {
    "contract": [
        Config(*tile, warps=warps, stages=stages)
        for tile in ((32, 32, 32), (32, 32, 64), (32, 64, 32), (64, 32, 32), (64, 64, 32), (128, 64, 32))
        for warps, stages in ((4, 2), (4, 3), (8, 3))
    ],
    "wgrad": [
        Config(*tile, warps=warps, stages=2)
        for tile in ((32, 32, 32), (32, 32, 64), (32, 64, 32), (64, 64, 16), (64, 64, 32))
        for warps in (4, 8)
    ],
}


def tune(
    step: Callable[[], Any],
    path: str | Path | None = None,
    *,
    candidates: Mapping[str, Sequence[Config]] | None = None,
    clock: Callable[[Callable[[], Any]], float] | None = None,
    seconds: float = float("inf"),
) -> dict[Key, Config]:
    """Time `step` with each candidate for each operation of each size in it; keep the fastest of all.

    Args:
        step: runs the work to be tuned for, without changing what it works on (`method.gradients`, say).
        path: a JSON file to keep the result in, for `load`.
        candidates: tiles to try, by operation.
        clock: milliseconds of one call; by default those of a CUDA graph of it, for at small batches the time of a
            plain call is that of its Python.
        seconds: no further candidate is tried after so many; what was found until then stands.

    Returns: the tile chosen for each key; it is in force from now on, the table's where nothing was faster.
    Raises: RuntimeError without a CUDA device, unless a clock is given.
    """
    if clock is None and not torch.cuda.is_available():
        raise RuntimeError("autotune.tune needs a CUDA device; without one the table of kernels.tiles stands")
    end = time.monotonic() + seconds
    clock = clock or triton.testing.do_bench_cudagraph
    tiles: Mapping[str, Sequence[Config]] = candidates or CANDIDATES
    seen: set[Key] = set()
    table.watchers.append(seen)
    try:
        best = clock(step)
    finally:
        table.watchers.remove(seen)
    for key in sorted(seen):
        best = _tune_one(key, tiles.get(key[0], ()), step, clock, best, end)
    chosen = {key: table.tuned[key] for key in sorted(seen) if key in table.tuned}
    if path is not None:
        save(chosen, path)
    return chosen


def save(chosen: Mapping[Key, Config], path: str | Path) -> None:
    """Tiles that `tune` found on the device at hand, into a file for `load`."""
    entries = [{"key": list(key), "config": asdict(tile)} for key, tile in chosen.items()]
    content = {"version": VERSION, "device": _device(), "entries": entries}
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _tune_one(
    key: Key,
    tiles: Sequence[Config],
    step: Callable[[], Any],
    clock: Callable[[Callable[[], Any]], float],
    best: float,
    end: float,
) -> float:
    """Leave the fastest tile in force for `key`; the milliseconds that the step then takes."""
    kept = table.tuned.get(key)
    try:
        for tile in tiles:
            if time.monotonic() > end:
                break
            table.tuned[key] = tile
            try:
                found = clock(step)
            except OutOfResources:  # more shared memory or registers than the chip has
                continue
            if found < best:
                kept, best = tile, found
    finally:  # whatever stops it, no tile that was only tried stays in force
        if kept is None:
            table.tuned.pop(key, None)
        else:
            table.tuned[key] = kept
    return best


def load(path: str | Path) -> int:
    """Put the tiles of a file of `tune` in force; returns how many.

    Raises ValueError for another kind of file, for one of another device, and for numbers that are no tile.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = {(*e["key"][:4], tuple(e["key"][4])): Config(**e["config"]) for e in content["entries"]}
        version, device = content["version"], content["device"]
    except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is no file of autotune.tune: {error!r}") from error
    if version != VERSION:
        raise ValueError(f"{path} is of version {version} of such files, and {VERSION} is read: tune anew")
    if device != _device():
        raise ValueError(f"{path} was measured on {device!r}, and this is {_device()!r}: tune here, into another file")
    for key, tile in entries.items():
        known = len(key) == 5 and key[0] in CANDIDATES and key[2] in FAMILIES and key[3] in FLOATS
        if not (known and all(type(n) is int for n in key[4]) and _is_tile(tile)):
            raise ValueError(f"{path}: {list(key)} with {tile} is no tile of a kernel: tune anew")
    table.tuned.update(entries)
    return len(entries)


def _device() -> str:
    """The name of the device at hand; "" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _is_tile(tile: Config) -> bool:
    """Blocks that matrix products take, and launch options that a chip has."""
    numbers = asdict(tile).values()
    blocks = (tile.block_m, tile.block_n, tile.block_k)
    return (
        all(type(n) is int for n in numbers)
        and all(16 <= n <= 256 and n & (n - 1) == 0 for n in blocks)
        and tile.warps in (1, 2, 4, 8, 16)
        and 1 <= tile.stages <= 8
        and 1 <= tile.group <= 8
        and 0 <= tile.registers <= 255
    )
