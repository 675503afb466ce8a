"""Reading a YAML file into an Experiment: overrides, presets, and errors that name file, key path and nearest key."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ibp_triton.errors import ConfigError, YamlError
from ibp_triton.harness import presets, yamltext
from ibp_triton.harness.config import Evaluate, Experiment
from ibp_triton.harness.space import Range

LIMIT = 10 << 20  # bytes of a YAML file
CHAIN = 20  # files that extend each other
Lines = dict[tuple[str, ...], int]
COMMON: tuple[str, ...] = ("name", "title", "output", "runs", "variants", "extends")
COMMON += ("select", "evaluate", "compare", "workers", "search")


@dataclass(frozen=True)
class ExperimentFile:
    """A validated experiment beside the tree it came from (overrides applied, preset not filled in)."""

    experiment: Experiment
    tree: dict[str, Any]
    where: str
    lines: Lines = field(default_factory=dict)  # where keys stand in the file, as far as that is known

    def variants(self) -> list[tuple[str, Experiment]]:
        """The experiment once for each variant, its overrides applied; once, nameless, where there is none."""
        return self._variants

    @cached_property
    def _variants(self) -> list[tuple[str, Experiment]]:
        if not self.experiment.variants:
            return [("", self.experiment)]
        return [(label, self._variant(label, overrides)) for label, overrides in self.experiment.variants.items()]

    def _variant(self, label: str, overrides: dict[str, Any]) -> Experiment:
        tree = {key: value for key, value in self.tree.items() if key != "variants"}
        where, lines = f"{self.where}: variants.{label}", Lines()
        for dotted, value in overrides.items():
            key = dotted.partition(".")[0]
            if key in COMMON:
                raise ConfigError(f"{where}: {dotted}: {key} is one for the whole experiment; set it beside variants:")
            override(tree, dotted, value, where)
            keys, line = tuple(dotted.split(".")), self.lines.get(("variants", label, dotted), 0)
            lines |= {keys[:length]: line for length in range(1, len(keys) + 1)}
        return validate(tree, where, lines)

    def trial(self, row: str, values: Mapping[str, Any]) -> ExperimentFile:
        """One run of a search: that row under the first seed, with these values by their dotted keys."""
        tree = {key: value for key, value in self.tree.items() if key != "search"}
        tree["methods"] = {row: self.tree["methods"][row]}
        where, lines = f"{self.where}: search.space", Lines()
        for dotted, value in values.items():
            override(tree, dotted, value, where)
            keys, line = tuple(dotted.split(".")), self.lines.get(("search", "space", dotted), 0)
            lines |= {keys[:length]: line for length in range(1, len(keys) + 1)}
        experiment = validate(tree, where, lines)
        several = experiment.methods[row].axes
        if several:
            raise ConfigError(f"{where}: {row} has several values of {several[0]}: name it in the space, or leave one")
        return ExperimentFile(experiment.model_copy(update={"seeds": experiment.seeds[:1]}), tree, where)

    def text(self) -> str:
        """YAML that `load` reads back to the same plan."""
        return yamltext.dump(self.tree)


def load(path: Path, overrides: Iterable[str] = ()) -> ExperimentFile:
    """Read, override ("a.b=c"), fill the preset and validate, variants too; raises ConfigError."""
    tree, given = read_tree(path), list(overrides)
    apply(tree, given)
    lines = _lines(path, given)
    plan = ExperimentFile(validate(tree, str(path), lines), tree, str(path), lines)
    plan.variants()
    _check_space(plan)
    return plan


def _check_space(plan: ExperimentFile) -> None:
    """Every value at the end of a range, and every choice, makes a run."""
    search = plan.experiment.search
    for row, space in search.rows(list(plan.experiment.methods)).items() if search else ():
        values = {key: one.ends if isinstance(one, Range) else one for key, one in space.items()}
        for key, own in values.items():
            for value in own:
                plan.trial(row, {**{name: first for name, (first, *_) in values.items()}, key: value})


def _lines(path: Path, overrides: list[str]) -> Lines:
    """Where the keys of a file stand, 0 for those that something overrides."""
    given = [tuple(text.partition("=")[0].strip().split(".")) for text in overrides]
    found = yamltext.lines(_content(path)) | dict.fromkeys(given, 0)
    return {keys: 0 if any(keys[: len(g)] == g for g in given) else line for keys, line in found.items()}


def evaluation(path: Path, overrides: Iterable[str]) -> Evaluate:
    """The `evaluate` section of a YAML file (defaults if there is no such file), overridden; raises ConfigError."""
    experiment = load(path).experiment if path.exists() else None
    tree = experiment.evaluate.model_dump() if experiment else {}
    apply(tree, overrides)
    try:
        return Evaluate.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(faults(error, "--set", Evaluate)) from error


def apply(tree: dict[str, Any], overrides: Iterable[str]) -> None:
    """Carry out "a.b=c" overrides in place; raises ConfigError."""
    for text in overrides:
        dotted, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--set {text}: write key.path=value")
        override(tree, dotted.strip(), parse(value, f"--set {dotted}"), "--set")


def read_tree(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, laid over the one it `extends`, if any; raises ConfigError."""
    tree = parse(_content(path), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top, got {type(tree).__name__}")
    base = tree.pop("extends", None)
    if base is None:
        return _named_network(tree)
    chain = (*extended_by, Path(os.path.realpath(path)))
    if not isinstance(base, str) or Path(os.path.realpath(path.parent / base)) in chain or len(chain) > CHAIN:
        raise ConfigError(
            f"{path}: extends: expected the name of another YAML file beside this one, got {base!r}; "
            f"files must not extend each other in a ring, and at most {CHAIN} in a chain"
        )
    return presets.merge(read_tree(path.parent / base, chain), _named_network(tree))


def _content(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(LIMIT + 1)
        if len(raw) > LIMIT:
            raise ConfigError(f"{path}: larger than {LIMIT >> 20} MB; give the path of an experiment's YAML file")
        return raw.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path!s}: not a text file in UTF-8; give the path of a YAML file") from error


def parse(text: str, where: str) -> Any:
    """YAML text as plain Python values; raises ConfigError naming `where` and the line."""
    try:
        return yamltext.parse(text)
    except YamlError as error:
        raise ConfigError(f"{where}: {error}") from error


def override(tree: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    """Set tree[a][b] = value for "a.b"; raises ConfigError where a path runs through a plain value.

    The mappings on the way are replaced by copies, for other trees may share them.
    """
    *parents, last = dotted.split(".")
    for name in parents:
        below = {} if tree.get(name) is None else tree[name]
        if not isinstance(below, dict):
            raise ConfigError(f"{where}: {dotted}: {name} holds a plain value, so it has no key under it")
        tree[name] = dict(below)
        tree = tree[name]
    tree[last] = value
    if last == "network":
        _named_network(tree)


def validate(tree: dict[str, Any], where: str, lines: Lines | None = None) -> Experiment:
    """The tree with its preset as an Experiment; raises ConfigError with one line for each fault.

    `lines`: where its keys stand in the file `where`, as far as that is known.
    """
    filled = presets.fill(tree)
    try:
        return Experiment.model_validate(filled)
    except ValidationError as error:
        raise ConfigError(faults(error, where, lines=lines)) from error


def faults(error: ValidationError, where: str, model: type[BaseModel] = Experiment, lines: Lines | None = None) -> str:
    """One line for each fault: the file, its line where that is known, the key and the cure."""
    every = error.errors()
    places = [where + _line_of(fault["type"], [str(part) for part in fault["loc"]], lines or {}) for fault in every]
    return "\n".join(dict.fromkeys(_explain(*pair, model) for pair in zip(every, places, strict=True)))


def _line_of(kind: str, path: list[str], lines: Lines) -> str:
    """The line of a key where the file itself has it, of the section that lacks one; a list may stand as one entry."""
    keys: tuple[str, ...] = ()
    for part in path:
        if (*keys, part) in lines:
            keys = (*keys, part)
        elif kind != "missing" and not part.isdigit() and not _is_type_tag(part):
            return ""  # it stands in a file that this one extends
    return f": line {lines[keys]}" if lines.get(keys) else ""


def _named_network(tree: dict[str, Any]) -> dict[str, Any]:
    if isinstance(tree.get("network"), str):
        tree["network"] = {"name": tree["network"]}
    return tree


def _explain(fault: Any, where: str, model: type[BaseModel] = Experiment) -> str:
    path = [str(part) for part in fault["loc"] if not _is_type_tag(str(part))]
    dotted = ".".join(path) or "(top)"
    if fault["type"] == "extra_forbidden":
        return f"{where}: {dotted}: unknown key{_nearest(path, model)}"
    if fault["type"] == "missing":
        return f"{where}: {dotted}: this key is missing"
    message = str(fault["msg"]).removeprefix("Value error, ")
    told = isinstance(fault["input"], dict | list) or repr(fault["input"]) in message
    got = "" if told else f", got {fault['input']!r}"
    return f"{where}: {dotted}: {message}{got}"


def _is_type_tag(part: str) -> bool:
    """Pydantic names the member of a union it tried, as in methods.bp.Method or seeds.0.int."""
    return part in {"Seeds", "Span", "Augment", "int", "float", "constrained-float"} or "[" in part


def _nearest(path: list[str], model: type[BaseModel]) -> str:
    known = list(_keys_at(path[:-1], model))
    close = difflib.get_close_matches(path[-1], known, 1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}"


def _keys_at(path: list[str], model: type[BaseModel]) -> Iterable[str]:
    for part in path:
        if part in model.model_fields:
            model = _section(model.model_fields[part].annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _section(annotation.model_fields["root"].annotation) if "root" in annotation.model_fields else annotation
    return next((found for part in get_args(annotation) if (found := _section(part))), None)
