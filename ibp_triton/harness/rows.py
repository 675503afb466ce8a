"""Rows of `methods`: the fields of a method's own dataclass, each a value or a list of values, an axis of the grid."""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cached_property, lru_cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

import ibp_triton as ibp
from ibp_triton.harness import plugins
from ibp_triton.harness.schedule import Schedule
from ibp_triton.methods import PAPER

MOST = 100_000  # combinations of a row's values
_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}


class FieldKind:
    """How a field of a method is read: strictly as its annotation says."""

    def __init__(self, annotation: Any, default: Any) -> None:
        self._words = _words(annotation)
        self._adapter = TypeAdapter[Any](annotation, config=ConfigDict(strict=True, allow_inf_nan=False))
        self.default = default if default is MISSING else self.read(default)

    def read(self, value: Any) -> Any:
        """The value, a whole number as a float where the field is one; raises ValueError."""
        try:
            return self._adapter.validate_python(value)
        except ValidationError:
            raise ValueError(f"expected {self._words}, or a list of such values, got {value!r:.80}") from None

    def schema(self) -> dict[str, Any]:
        """The JSON Schema of one value."""
        return self._adapter.json_schema()

    def read_all(self, value: Any) -> Any:
        """A value or a list of values, none of them twice; raises ValueError."""
        if not isinstance(value, list):
            return self.read(value)
        if not value:
            raise ValueError("give at least one value")
        return list(once(map(self.read, value)))


def methods() -> list[str]:
    """The keys of the package's methods and the names of those that installed packages offer."""
    return [*ibp.METHODS, *(name for name in plugins.offered("methods") if name not in ibp.METHODS)]


def method_class(name: str) -> type[ibp.Method]:
    """The method of that key or name, or of an import path; raises ValueError."""
    if name in ibp.METHODS:
        return ibp.METHODS[name]
    found = plugins.target_of("methods", name)
    if found is None:
        raise ValueError(f"{name!r} is no method; choose one of {', '.join(methods())}, or write package.module:Class")
    return _foreign(found)


def _foreign(target: str) -> type[ibp.Method]:
    cls = plugins.load(target)
    if not (isinstance(cls, type) and issubclass(cls, ibp.Method) and is_dataclass(cls)):
        raise ValueError(f"{target} is no dataclass derived from ibp_triton.Method")
    if ibp.METHODS.get(cls.key) is cls:
        raise ValueError(f"{target} is a method of the package; write {cls.key}")
    if cls.key in ibp.METHODS or not re.fullmatch(r"[A-Za-z0-9_-]+", cls.key):
        raise ValueError(f"{target}: its key {cls.key!r} is taken, or holds more than letters, digits, _ and -")
    return cls


def target(cls: type[ibp.Method]) -> str | None:
    """Where a method that is not the package's is imported from."""
    return None if ibp.METHODS.get(cls.key) is cls else f"{cls.__module__}:{cls.__qualname__}"


def _words(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(_words, get_args(annotation)))
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    return _WORDS.get(annotation, str(annotation))


def kinds(cls: type[ibp.Method]) -> dict[str, FieldKind]:
    """The fields of a method by name, but for those of every method, such as its criterion."""
    hashable: Any = cls  # mypy doubts that
    return _kinds(hashable)


@lru_cache
def _kinds(cls: Any) -> dict[str, FieldKind]:
    shared = {field.name for field in fields(ibp.Method)}
    hints = get_type_hints(cls)
    return {one.name: FieldKind(hints[one.name], one.default) for one in fields(cls) if one.name not in shared}


def once(values: Iterable[Any]) -> Iterator[Any]:
    """The values; raises ValueError where one comes again: it would be one run that counts as two."""
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{value} is given twice; give each once")
        seen.add(value)
        yield value


class MethodRow(BaseModel):
    """One row of the comparison: its `method` (key, entry point or import path; the label if left out), its fields."""

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> dict[str, Any]:
        if not isinstance(given, dict):
            raise ValueError("expected the method's fields, such as {beta: 0.03}")
        own = {name: value for name, value in given.items() if value is not None}
        key = own.pop("method")
        if not isinstance(key, str):
            raise ValueError(f"{key!r} is no method; choose one of {', '.join(methods())}")
        known = kinds(method_class(key))
        read = {name: kind.default for name, kind in known.items()} | _read_each(key, known, own)
        missing = [name for name, value in read.items() if value is MISSING]
        if missing:
            raise ValueError(f"{key} needs {' and '.join(missing)}")
        return {"method": key, **read}

    @model_validator(mode="after")
    def _in_range(self) -> MethodRow:
        count = math.prod(map(len, self._values))
        if count > MOST:
            raise ValueError(f"{count} combinations of values are more than {MOST}; shorten a list")
        try:
            assert self.points
        except TypeError as error:
            raise ValueError(str(error)) from error
        return self

    @cached_property
    def points(self) -> list[ibp.Method]:
        """One method for each combination of values; those of the last field change first."""
        cls = method_class(self.method)
        names = kinds(cls)
        return [cls(**dict(zip(names, values, strict=True))) for values in itertools.product(*self._values)]

    @property
    def axes(self) -> tuple[str, ...]:
        """The fields that have several values."""
        return tuple(name for name, values in zip(self._names, self._values, strict=True) if len(values) > 1)

    @property
    def _names(self) -> list[str]:
        return list(kinds(method_class(self.method)))

    @property
    def _values(self) -> list[list[Any]]:
        given = (getattr(self, name) for name in self._names)
        return [value if isinstance(value, list) else [value] for value in given]


def _read_each(key: str, known: dict[str, FieldKind], given: dict[str, Any]) -> dict[str, Any]:
    """The fields given of a method; raises a ValidationError that has a fault for each that cannot be read."""
    read, faults = {}, []
    for name, value in given.items():
        try:
            read[name] = _kind(key, known, name).read_all(value)
        except ValueError as error:
            faults.append(faulty(str(error), name))
    if faults:
        raise ValidationError.from_exception_data("MethodRow", faults)
    return read


def faulty(text: str, *keys: str) -> InitErrorDetails:
    """A fault of a ValidationError, at a key below what is validated."""
    return InitErrorDetails(type=PydanticCustomError("field", "{text}", {"text": text}), loc=keys, input={})


def numbers(method: ibp.Method) -> dict[str, float]:
    """The fields of a method that hold numbers."""
    found = {name: getattr(method, name) for name in kinds(type(method))}
    return {
        name: value for name, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def scheduled(method: ibp.Method, schedule: Schedule, epoch: int, epochs: int) -> ibp.Method:
    """The method with the numbers that the schedule gives it in an epoch (from 0); whole numbers stay whole.

    Raises:
        TypeError, ValueError: for a number out of the field's range.
    """
    own = {name: value for name, value in numbers(method).items() if name in schedule.root}
    values = {name: schedule.value(name, value, epoch, epochs) for name, value in own.items()}
    return method.at(**{name: round(value) if isinstance(own[name], int) else value for name, value in values.items()})


def _kind(key: str, known: dict[str, FieldKind], name: str) -> FieldKind:
    """How the field is read; raises ValueError for a name that is no field of the method."""
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    meant = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"{key} takes no {name}; {meant}its fields: {', '.join(known) or 'none'}")


def stored(method: ibp.Method) -> dict[str, Any]:
    """A method as config.json has it. Its text is a part of the run's name.

    The paper's methods are stored as when β or ε, norm and semantics were all there was, so that their runs keep
    their names: the strength under `parameter`, null for what a method has not.
    """
    own = {name: kind.read(getattr(method, name)) for name, kind in kinds(type(method)).items()}
    if method.key not in PAPER:
        place = target(type(method))
        return {"key": method.key, **({"import": place} if place else {}), **own}
    strength = own.pop(method.parameter) if method.parameter else None
    return {"key": method.key, "parameter": strength, "norm": None, "semantics": None, **own}


def from_stored(config: dict[str, Any]) -> ibp.Method:
    """The method that `stored` described; raises ValueError or KeyError for anything else."""
    own = dict(config)
    key = own.pop("key")
    key = own.pop("import", key)
    if key in PAPER:
        own[ibp.METHODS[key].parameter or "parameter"] = own.pop("parameter")
    (method,) = MethodRow.model_validate({"method": key, **own}).points
    return method
