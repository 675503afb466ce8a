"""`ibp-triton schema`: the JSON Schema of an experiment's or a suite's YAML: editors complete and check keys by it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from ibp_triton.bench import candidates
from ibp_triton.bench.suite import Suite
from ibp_triton.harness import optimizers, plugins, rows
from ibp_triton.harness.config import Experiment, data_sources, networks
from ibp_triton.harness.loading import COMMON
from ibp_triton.harness.schedule import RATE

Tree = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def show(bench: Annotated[bool, typer.Option("--bench", help="of a suite of benchmarks instead")] = False) -> None:
    """Print the JSON Schema of an experiment's YAML, for editors."""
    typer.echo(json.dumps(suite() if bench else experiment(), indent=2, ensure_ascii=False))


def experiment() -> Tree:
    """Of an experiment's YAML."""
    found = Experiment.model_json_schema(by_alias=True)
    keys, parts = found["properties"], found["$defs"]
    keys["methods"] = {**_rows(parts, empty={}), "minProperties": 1}
    keys["network"] = {"anyOf": [{"enum": networks()}, {"$ref": "#/$defs/NetworkChoice"}]}
    parts["NetworkChoice"]["properties"]["name"] = {"enum": [*networks(), None]}
    parts["Data"]["properties"]["source"] = {"anyOf": [{"enum": data_sources()}, plugins.SCHEMA]}
    parts["NetworkChoice"]["oneOf"] = [{"required": ["name"]}, {"required": ["import"]}]
    parts["Training"]["properties"]["optimizer"] = optimizers.schema()
    parts["Schedule"]["propertyNames"] = {"enum": [RATE, *_numbers()]}
    keys["variants"]["additionalProperties"]["propertyNames"] = {"pattern": _overrides(found)}
    return _finished(found)


def suite() -> Tree:
    """Of a suite of benchmarks."""
    found = Suite.model_json_schema(by_alias=True)
    keys, parts = found["properties"], found["$defs"]
    known = {**candidates.METHODS, **candidates.MORE}
    own = _rows(parts, empty={label: {"type": "null"} for label in known})
    keys["methods"] = {"anyOf": [{"type": "array", "items": {"enum": list(known)}, "minItems": 1}, own]}
    names = list(candidates.NETWORKS)
    parts["NetworkRow"]["properties"]["network"] = {"enum": names}
    row = {"anyOf": [{"$ref": "#/$defs/NetworkRow"}, {"type": "null"}]}
    named = {"type": "array", "items": {"enum": names}, "minItems": 1}
    keys["networks"] = {"anyOf": [named, {"type": "object", "additionalProperties": row, "minProperties": 1}]}
    return _finished(found)


def _finished(found: Tree) -> Tree:
    """With `extends`; only a file that extends no other one must have every key."""
    required = found.pop("required")
    for part in (found, *found["$defs"].values()):
        part.pop("title", None)
        for key in part.get("properties", {}).values():
            key.pop("title", None)
    found["properties"]["extends"] = {"type": "string", "description": "a YAML file beside this one, which it overlays"}
    return {"$schema": DIALECT, **found, "if": {"required": ["extends"]}, "else": {"required": required}}


def _rows(parts: Tree, empty: Tree) -> Tree:
    """Of `methods`: a row has the fields of the method it names or is called as; `empty` ones may be null."""
    parts.pop("MethodRow", None)
    for key in rows.methods():
        parts[f"row {key}"] = _row(key)
    named: Tree = {
        "type": "object",
        "required": ["method"],
        "properties": {"method": {"anyOf": [{"enum": rows.methods()}, plugins.SCHEMA]}},
        "allOf": [
            {"if": {"properties": {"method": {"const": key}}}, "then": {"$ref": f"#/$defs/row {key}"}}
            for key in rows.methods()
        ],
    }
    parts["named row"] = named
    has_name = {"type": "object", "required": ["method"]}
    labels = {
        key: {"if": has_name, "then": {"$ref": "#/$defs/named row"}, "else": {"$ref": f"#/$defs/row {key}"}}
        for key in rows.methods()
    }
    alone = {label: null for label, null in empty.items() if label not in labels}
    others = {label: {"anyOf": [null, {"$ref": "#/$defs/named row"}]} for label, null in alone.items()}
    return {
        "type": "object",
        "properties": {**labels, **others},
        "additionalProperties": {"$ref": "#/$defs/named row"},
    }


def _row(key: str) -> Tree:
    cls = rows.method_class(key)
    kinds = rows.kinds(cls)
    fields = {name: {"anyOf": [one, {"type": "array", "items": one}]} for name, one in _plain(kinds).items()}
    about = (cls.__doc__ or "").strip()
    return {
        "type": ["object", "null"],
        "description": about,
        "properties": {"method": {"const": key}, **fields},
        "additionalProperties": False,
    }


def _plain(kinds: dict[str, rows.FieldKind]) -> dict[str, Tree]:
    return {name: kind.schema() for name, kind in kinds.items()}


def _numbers() -> list[str]:
    """The fields of methods that may hold a number."""
    found = (
        (name, json.dumps(one))
        for key in rows.methods()
        for name, one in _plain(rows.kinds(rows.method_class(key))).items()
    )
    return list(dict.fromkeys(name for name, text in found if '"number"' in text or '"integer"' in text))


def _overrides(found: Tree) -> str:
    """The dotted keys that a variant may set, as a pattern: their first two names are known."""
    return f"^({'|'.join(_dotted(found))})$"


def _dotted(found: Tree) -> Iterable[str]:
    for name, key in found["properties"].items():
        section = found["$defs"].get(str(key.get("$ref")).rpartition("/")[2], {})
        below = "|".join(section.get("properties", {}))
        if name not in COMMON:
            yield rf"{name}(\.({below})(\..+)?)?" if below else rf"{name}(\..+)?"
