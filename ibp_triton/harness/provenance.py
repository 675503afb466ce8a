"""What a run came from beside its config: digests of the files at data.path and of the code that it imports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ibp_triton.harness import plugins, rows, sources, store
from ibp_triton.harness.config import Data
from ibp_triton.harness.grid import Run

Digests = dict[str, str]
KEYS = {
    "data": "the files at data.path",
    "code": "the code behind network.import",
    "method": "the code of the method",
    "source": "the code of the data source",
    "optimizer": "the code of the optimizer",
}


def targets(run: Run) -> Digests:
    """package.module:attribute of the code that a run imports, by the key of its digest."""
    optimizer = next(iter(run.training.optimizer or {}), "")
    found = {
        "code": run.network.target or plugins.target_of("networks", run.network.name or ""),
        "method": rows.target(type(run.method)),
        "source": plugins.target_of("sources", run.data.source),
        "optimizer": plugins.target_of("optimizers", optimizer),
    }
    return {key: target for key, target in found.items() if target}


def digests(run: Run) -> Digests:
    """Of the files as they are now; nothing for what the run does not use or what is not there."""
    found = {key: plugins.code_digest(target) for key, target in targets(run).items()}
    found["data"] = data_digest(run.data)
    return {key: value for key, value in found.items() if value}


def config(run: Run) -> dict[str, Any]:
    """What config.json says of a run that this process trains: with the digest of the code it has imported."""
    found = digests(run)
    used = {key: plugins.code_in_use(target) for key, target in targets(run).items()}
    found |= {key: digest for key, digest in used.items() if digest}
    return {**run.config(), **({"digests": found} if found else {})}


def changes(run: Run, folder: Path) -> list[str]:
    """What is other now than when the run in `folder` was trained: keys of KEYS; none where that is not known."""
    if not (run.data.path or targets(run)):
        return []
    before, now = _stored(folder), digests(run)
    return [key for key in now if before.get(key, now[key]) != now[key]]


def accept(run: Run, folder: Path) -> None:
    """Take the run in `folder` as one of today's data and code; config.json remembers the digests it had."""
    stored = store.read_json(folder / store.CONFIG) or run.config()
    earlier = [*stored.get("accepted", []), _stored(folder)]
    store.write_json(folder / store.CONFIG, {**stored, "digests": digests(run), "accepted": earlier})


def _stored(folder: Path) -> Digests:
    found = (store.find_json(folder / store.CONFIG) or {}).get("digests")
    return found if isinstance(found, dict) else {}


def settle(runs: Sequence[Run], root: Path) -> list[Run]:
    """The runs, each with the folder under `root` that holds it or will hold it.

    Its name has no data.path in it. A folder of the time when it had is used; so is that name where the other is
    taken, by a run of this config on other data from another path.
    """
    owners: dict[str, str] = {}
    return [_settled(run, root, owners) if run.data.path and not run.folder else run for run in runs]


def _settled(run: Run, root: Path, owners: dict[str, str]) -> Run:
    path = str(run.data.path)
    former = run.name_with_path
    owner = owners.setdefault(run.name, _owner(run, root / run.name))
    if (root / former).is_dir() or owner != path:
        return replace(run, folder=former)
    return run


def _owner(run: Run, folder: Path) -> str:
    """The data.path that the folder belongs to; the run's own if nobody has it or its data are the same."""
    path = str(run.data.path)
    stored = store.find_json(folder / store.CONFIG) or {}
    there = (stored.get("data") or {}).get("path") or path
    same = there == path or _stored(folder).get("data") in (None, data_digest(run.data))
    return path if same else there


def data_digest(data: Data) -> str | None:
    """SHA-256 of the files that `data.path` names; None if there are none."""
    files = sources.own_files(data)
    return plugins.joined(files) if files else None
