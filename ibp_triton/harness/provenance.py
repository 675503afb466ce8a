"""What a run came from beside its config: digests of the files at data.path and of the code behind network.import."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ibp_triton.harness import sources, store
from ibp_triton.harness.config import Data
from ibp_triton.harness.grid import Run

Digests = dict[str, str]
KEYS = {"data": "the files at data.path", "code": "the code behind network.import"}
_IN_USE: dict[str, str | None] = {}  # by module: its digest when this process imported it


def digests(run: Run) -> Digests:
    """Of the files as they are now; nothing for what the run does not use or what is not there."""
    found = {"data": data_digest(run.data), "code": code_digest(run.network.target)}
    return {key: value for key, value in found.items() if value}


def config(run: Run) -> dict[str, Any]:
    """What config.json says of a run that this process trains: with the digest of the code it has imported."""
    found = digests(run)
    if run.network.target and (used := code_in_use(run.network.target)):
        found["code"] = used
    return {**run.config(), **({"digests": found} if found else {})}


def changes(run: Run, folder: Path) -> list[str]:
    """What is other now than when the run in `folder` was trained: keys of KEYS; none where that is not known."""
    if not (run.data.path or run.network.target):
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
    return _joined({name: _digest(path) for name, path in files.items()}) if files else None


def code_digest(target: str | None) -> str | None:
    """SHA-256 of the module of "package.module:function" and of what it imports from its package or folder."""
    files = code_files(target) if target else {}
    return _joined({name: _digest(path) for name, path in files.items()}) if files else None


def code_in_use(target: str) -> str | None:
    """The same, as it was when this process first asked: just before it imported the module."""
    return _IN_USE.setdefault(target.partition(":")[0], code_digest(target))


def imported() -> dict[str, str]:
    """Module → file of the users' code that this process has imported."""
    found = {module: sys.modules.get(module) for module in _IN_USE}
    return {module: str(getattr(loaded, "__file__", "")) for module, loaded in found.items() if loaded}


def _joined(parts: dict[str, str]) -> str:
    text = "".join(f"{digest} {name}\n" for name, digest in sorted(parts.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(path: Path) -> str:
    about = path.stat()
    return _digest_of(path, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


@lru_cache(maxsize=100_000)
def _digest_of(path: Path, *_: int) -> str:
    return store.digest(path)


def code_files(target: str) -> dict[str, Path]:
    """Name → file of the module and of all it imports, directly or not, that lies in its package or folder."""
    module = target.partition(":")[0]
    root = next((root for root in _roots() if _file_of(root, module)), None)
    if root is None:
        return {}
    own = module.partition(".")[0] if _is_installed(root) else None
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file_of(root, name)
        if path is None or name in found or (own and name.partition(".")[0] != own):
            continue
        found[name] = path
        waiting += [name.rpartition(".")[0], *_imports(path, name)]
    return found


def _roots() -> Iterator[Path]:
    return (Path(entry or ".").absolute() for entry in sys.path)


def _is_installed(root: Path) -> bool:
    return root.name in ("site-packages", "dist-packages", "lib-dynload") or (root / "ast.py").is_file()


def _file_of(root: Path, module: str) -> Path | None:
    if not all(part.isidentifier() for part in module.split(".")) or module.partition(".")[0] == "ibp_triton":
        return None
    base = root.joinpath(*module.split("."))
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


def _imports(path: Path, module: str) -> list[str]:
    about = path.stat()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return _imports_of(path, package, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


@lru_cache(maxsize=10_000)
def _imports_of(path: Path, package: str, *_: int) -> list[str]:
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError, RecursionError):
        return []
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    relative = [_absolute(node, package) for node in nodes if isinstance(node, ast.ImportFrom)]
    members = [f"{_absolute(n, package)}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names]
    return [*plain, *relative, *members]


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    above = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])
