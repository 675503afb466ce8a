"""YAML as an experiment may be written: safe, of bounded size, and nothing read as other than it looks."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import yaml

from ibp_triton.errors import YamlError

_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_SEXAGESIMAL = re.compile(r"^[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?$")
_OCTAL = re.compile(r"^[-+]?0[0-7_]+$")
ALIASED = 100_000  # nodes that aliases may add


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that also reads 1e-3 as a number."""


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Writes what the loader reads back: the text "1e-3" in quotes, nothing as an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_TAG + "float", _EXPONENT, list("-+0123456789."))


def dump(value: Any) -> str:
    """Text that `parse` reads back to the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse(text: str) -> Any:
    """Plain Python values; raises YamlError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        last = text.count("\n", 0, len(text) - 1) + 1
        line = f"line {min(mark.line + 1, last)}" if mark else "this"
        raise YamlError(f"{line} is not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise YamlError("this is nested too deeply for a configuration") from error
    except (ValueError, OverflowError) as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError(f"this holds a value that cannot be read: {error}") from error
    finally:
        loader.dispose()


def lines(text: str) -> dict[tuple[str, ...], int]:
    """The line (from 1) of each key and list entry of text that `parse` reads, by the keys that lead to it."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        return {} if root is None else dict(_places(root, ()))
    finally:
        loader.dispose()


def _places(node: yaml.Node, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    pairs: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        pairs = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        pairs = [(str(number), value, value) for number, value in enumerate(node.value)]
    for name, place, below in pairs:
        yield (*above, name), place.start_mark.line + 1
        yield from _places(below, (*above, name))


def _check(root: yaml.Node) -> None:
    """Every node once, and how many there are once the aliases are written out."""
    sizes: dict[int, int] = {}
    _measure(root, sizes, set())
    if sizes[id(root)] > len(sizes) + ALIASED:
        raise YamlError(
            f"{_line(root)}: its aliases (*name) stand for {sizes[id(root)]} values; write out what is meant"
        )


def _measure(node: yaml.Node, sizes: dict[int, int], open_nodes: set[int]) -> int:
    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in open_nodes:
        raise YamlError(f"{_line(node)}: an alias (*name) stands for what it is a part of; write out what is meant")
    open_nodes.add(id(node))
    _check_one(node)
    sizes[id(node)] = 1 + sum(_measure(child, sizes, open_nodes) for child in _children(node))
    open_nodes.discard(id(node))
    return sizes[id(node)]


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _check_one(node: yaml.Node) -> None:
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
    elif node.tag not in _PLAIN:
        raise YamlError(f"{_line(node)}: {_name(node.tag)} has no place in a configuration; write a list or keys")
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise YamlError(f"{_line(key)}: a list or mapping stands for a key; put text with {{{{ }}}} in quotes")
        if key.tag not in (_TAG + "str", _TAG + "merge"):
            _check_scalar(key)
            raise YamlError(f"{_line(key)}: the key {key.value!r} is read as {_name(key.tag)}; put it in quotes")
        if key.value in seen:
            raise YamlError(f"{_line(key)}: key {key.value!r} is given twice")
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in key.value):
            raise YamlError(f"{_line(key)}: the key {key.value!r} holds a character that cannot be shown; leave it out")
        seen.add(key.value)


def _check_scalar(node: yaml.ScalarNode) -> None:
    shown = node.value if len(node.value) < 40 else f"{node.value[:40]}…"
    if node.tag == _TAG + "merge":
        return
    if node.tag not in _PLAIN:
        cure = "put it in quotes" if node.tag in (_TAG + "timestamp", _TAG + "value") else "leave the tag out"
        raise YamlError(f"{_line(node)}: {shown} is read as {_name(node.tag)}; {cure}")
    if node.tag in (_TAG + "int", _TAG + "float") and _SEXAGESIMAL.match(node.value):
        raise YamlError(f"{_line(node)}: {shown} is read as a number to base 60; write it plainly, or in quotes")
    if node.tag == _TAG + "int" and _OCTAL.match(node.value):
        raise YamlError(f"{_line(node)}: {shown} is read as a number to base 8; write it without the 0, or in quotes")
    if "\0" in node.value or any(unicodedata.category(letter) == "Cs" for letter in node.value):
        raise YamlError(f"{_line(node)}: {shown!r} holds a character that no file can; leave it out")


def _name(tag: str) -> str:
    names = {"timestamp": "a date", "bool": "true or false", "int": "a number", "float": "a number", "null": "nothing"}
    kind = tag.removeprefix(_TAG)
    return names.get(kind, f"!!{kind}" if tag.startswith(_TAG) else tag)


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
