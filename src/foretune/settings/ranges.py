"""What a setting may be: declared once, beside its field, and checked in one place for every group of settings.

Imports nothing heavy: the command line builds its help from the annotations.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from math import inf
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from foretune.errors import ConfigError, shown


@dataclass(frozen=True)
class Range:
    """Between which numbers a setting may lie.

    Attributes:
        least: Smallest value.
        most: Largest value.
        words: What it must be, where the ends do not say it well.
    """

    least: float = -inf
    most: float = inf
    words: str = ""

    def check(self, name: str, value: float) -> None:
        """Refuse a number that lies outside.

        Args:
            name: Name of the setting.
            value: Number.

        Raises:
            ConfigError: Naming the setting, its value and what it may be.
        """
        if self.least <= value <= self.most:  # NaN is in no range
            return
        if self.words:
            must = self.words
        elif value > self.most:
            must = f"at most {self.most:,}" if isinstance(self.most, int) else f"at most {self.most:g}"
        else:
            must = f"at least {self.least:g}"
        raise ConfigError(f"{name} = {shown(value)}: must be {must}")


LARGEST = 2**31 - 1  # what every library takes for a number of things
_FEW = 10_000  # redraws that each cost memory or a pass
Count = Annotated[int, Range(1, LARGEST)]
CountOrNone = Annotated[int, Range(0, LARGEST)]
Few = Annotated[int, Range(1, _FEW)]
Rank = Annotated[int, Range(1, 2**16)]
Layer = Annotated[int, Range(0, LARGEST)]
Seed = Annotated[int, Range(0, 2**32 - 1, f"from 0 to {2**32 - 1}")]
Number = Annotated[int, Range(-LARGEST, LARGEST)]
# within single precision, with room for products
Scale = Annotated[float, Range(1e-30, 1e30, "positive and finite, from 1e-30 to 1e30")]
Decay = Annotated[float, Range(0.0, 1e30, "finite and at least 0")]
Regularisation = Annotated[float, Range(1e-300, 1e300, "positive and finite, from 1e-300 to 1e300")]
Share = Annotated[float, Range(0.0, 1 - 2**-53, "at least 0 and below 1")]


@dataclass(frozen=True)
class Settings:
    """A group of settings, checked against the types and ranges of its fields."""

    def __post_init__(self) -> None:
        """Check every field, by its annotation; lists become tuples. A `ConfigError` names the setting and its value.

        Groups of frozen dataclasses inherit it: a new field needs no check of its own.
        """
        group: Any = type(self)
        kinds = _kinds(group)
        for field in fields(self):
            given = getattr(self, field.name)
            value = fitting(field.name, given, kinds[field.name])
            if value is not given:
                object.__setattr__(self, field.name, value)


@cache
def _kinds(group: type) -> dict[str, Any]:
    return get_type_hints(group, include_extras=True)


def fitting(name: str, value: Any, kind: Any) -> Any:
    """Take a value for a setting.

    Args:
        name: Name of the setting.
        value: What was given.
        kind: Annotation of its field.

    Returns:
        The value, in the type of the field.

    Raises:
        ConfigError: Naming the setting, its value and what it may be.
    """
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = fitting(name, value, inside[0])
        for bound in inside[1:]:
            if isinstance(bound, Range):
                bound.check(name, value)
        return value
    if origin in (Union, UnionType):
        (only,) = (one for one in inside if one is not NoneType)
        return None if value is None else fitting(name, value, only)
    if origin is Literal:
        if not isinstance(value, str) or value not in inside:
            raise ConfigError(f"{name} = {shown(value)}: use one of {', '.join(inside)}")
        return value
    if origin is tuple:
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise ConfigError(f"{name} = {shown(value)}: must be a list")
        return tuple(fitting(name, one, inside[0]) for one in value)
    return _plain(name, value, kind)


def _plain(name: str, value: Any, kind: type) -> Any:
    if kind is str and isinstance(value, str):
        return _text(name, value)
    if kind is Path and isinstance(value, str | os.PathLike):
        _text(name, str(value))
        return Path(value)
    exact = type(value) is int or type(value) is float
    if isinstance(value, bool):  # no number, though Python takes it for one
        if kind is bool:
            return value
    elif kind is int and isinstance(value, Integral):
        return int(value)
    elif kind is float and isinstance(value, Real):
        return value if exact else float(value)
    if kind not in _WORDS:  # a group of settings within another checks itself
        return value
    raise ConfigError(f"{name} = {shown(value)}: must be {_WORDS[kind]}")


_WORDS = {str: "a text", Path: "a path", bool: "true or false", int: "a whole number", float: "a number"}


def _text(name: str, value: str) -> str:
    if not value:
        raise ConfigError(f"{name} = '': must not be empty")
    if "\0" in value:
        raise ConfigError(f"{name} = {shown(value)}: holds a NUL character")
    return value
