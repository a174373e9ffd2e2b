"""Checks of settings as users give them: known names, and values of the kind that the configuration declares.

Settings come from Python, YAML and flags, where a number is easily a text and a flag a word; what is refused here
would otherwise fail far from its cause, or silently count as true.
"""

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from molex.errors import ConfigError

_KINDS = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a name", NoneType: "None"}


def near_and_known(name: object, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest one, if any is near, and all there are."""
    names = list(known)
    near = get_close_matches(str(name), names, n=1)
    return f"; did you mean {near[0]!r}? Known: {', '.join(names)}" if near else f"; known: {', '.join(names)}"


def listed(names: list[str], limit: int = 3) -> str:
    """A few names for an error message, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises ConfigError unless a setting has one of the values it can have."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r}; choose from {', '.join(map(repr, choices))}")


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises ConfigError unless a number lies in low..high."""
    if not low <= value <= high:
        allowed = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ConfigError(f"{name}={value}; give a number {allowed}")


def check_settings(part: type[Any], settings: Mapping[str, Any]) -> None:
    """Raises ConfigError where a setting's value is of another kind than its configuration declares."""
    declared = get_type_hints(part)
    for name, value in settings.items():
        if not _fits(value, declared[name]):
            raise ConfigError(f"{name}={value!r}: give {_allowed(declared[name])}")


def _fits(value: object, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:  # which of the names is allowed is the configuration's own check
        return type(value) in map(type, arguments)
    if origin is tuple:
        one_name = arguments[0] is str and isinstance(value, str)
        return one_name or (isinstance(value, tuple | list) and all(_fits(item, arguments[0]) for item in value))
    if kind is float:
        return type(value) is int or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _allowed(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_allowed(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return f"a list, each {_allowed(arguments[0])}"
    return _KINDS[kind] if kind in _KINDS else str(kind.__name__)
