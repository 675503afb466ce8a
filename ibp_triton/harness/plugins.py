"""What other packages and the user's own code bring: by import path or entry point, with digests of their files."""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from ibp_triton.errors import ConfigError
from ibp_triton.harness import store

TARGET = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
SCHEMA = {"type": "string", "pattern": TARGET.pattern}
_IN_USE: dict[str, str | None] = {}  # by module: its digest when this process imported it


def offered(group: str) -> dict[str, str]:
    """What installed packages offer of a group of entry points, such as ibp_triton.methods: name → module:attribute."""
    return {point.name: point.value.replace(" ", "") for point in _points(group, tuple(sys.path))}


@lru_cache
def _points(group: str, _: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=f"ibp_triton.{group}"))


def target_of(group: str, name: str) -> str | None:
    """package.module:attribute that a name stands for: itself, or an entry point's; None for any other name."""
    return name if TARGET.fullmatch(name) else offered(group).get(name)


def load(target: str) -> Any:
    """What package.module:attribute names; raises ConfigError."""
    code_in_use(target)
    module, _, attribute = target.partition(":")
    try:
        found = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
    except (Exception, SystemExit) as error:  # whatever that code does
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"cannot import {target} ({reason}); install its package, or mend it") from error
    return found


def code_digest(target: str | None) -> str | None:
    """SHA-256 of the module of "package.module:function" and of what it imports from its package or folder."""
    files = code_files(target) if target else {}
    return joined(files) if files else None


def code_in_use(target: str) -> str | None:
    """The same, as it was when this process first asked: just before it imported the module."""
    return _IN_USE.setdefault(target.partition(":")[0], code_digest(target))


def imported() -> dict[str, str]:
    """Module → file of the users' code that this process has imported."""
    found = {module: sys.modules.get(module) for module in _IN_USE}
    return {module: str(getattr(loaded, "__file__", "")) for module, loaded in found.items() if loaded}


def joined(files: dict[str, Path]) -> str:
    """SHA-256 of files and of the names they go by."""
    text = "".join(f"{_digest(path)} {name}\n" for name, path in sorted(files.items()))
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
