"""Typed configuration: frozen dataclasses read strictly from plain data.

A config holds only numbers, strings, booleans, tuples, string-keyed mappings and nested configs; never a
device, a path that must exist, or a tensor. Checks sit in `__post_init__` of each config, raise
`RequestError`, and are the last time that anybody checks.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from armchair.errors import RequestError

C = TypeVar("C")


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest valid one, or the list of them."""
    valid = list(valid)
    begun = [v for v in valid if name and v.startswith(name)]
    close = begun if len(begun) == 1 else difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid names: {', '.join(valid)}"


def check_name(field: str, name: str, valid: Iterable[str]) -> None:
    """Raises RequestError, with the nearest right one, for a name that is none of `valid`."""
    if name not in (valid := list(valid)):
        raise RequestError(f"{field}: unknown {name!r}: {nearest(name, valid)}")


def from_dict(cls: type[C], data: Any, where: str = "") -> C:
    """Build the config dataclass `cls` from nested mappings.

    Raises RequestError naming the full dotted field for an unknown field (with the nearest right name), a
    missing one, or a value of the wrong type.
    """
    if not isinstance(data, Mapping):
        raise RequestError(f"{where or cls.__name__}: expected a mapping of fields, got {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise RequestError(f"unknown field {_dotted(where, key)!r}: {nearest(str(key), fields)}")
    values = {}
    for name, f in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], _dotted(where, name))
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise RequestError(f"missing field {_dotted(where, name)!r}")
    try:
        return cls(**values)
    except RequestError as error:
        raise RequestError(f"{where}: {error}" if where else str(error)) from None


def to_dict(config: Any) -> Any:
    """Plain data of a config (tuples become lists), the inverse of `from_dict`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {k: to_dict(v) for k, v in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_dict(v) for v in config]
    return config


def with_overrides(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested `data` with dotted names set, `{"prior.n_layer": 4}`; `from_dict` checks the names."""
    out = {k: dict(v) if isinstance(v, Mapping) else v for k, v in data.items()}
    for dotted, value in overrides.items():
        node: Any = out
        *path, last = dotted.split(".")
        for part in path:
            child = node.get(part)
            node[part] = dict(child) if isinstance(child, Mapping) else {}
            node = node[part]
        node[last] = value
    return out


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with `above` said over it: mappings in both are merged, anything else of `above` stands instead."""
    out = dict(below)
    for name, value in above.items():
        old = below.get(name)
        out[name] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def _dotted(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        options = tuple(o for o in options if o is not type(None))
        for option in options[:-1]:
            try:
                return _convert(option, value, where)
            except RequestError:
                continue
        return _convert(options[-1], value, where)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RequestError(f"{where}: expected a list, got {value!r}")
        inner = typing.get_args(hint)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_convert(inner[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(inner) != len(value):
            raise RequestError(f"{where}: expected {len(inner)} values, got {value!r}")
        return tuple(
            _convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True))
        )
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise RequestError(f"{where}: expected a mapping, got {value!r}")
        return {str(k): _convert(typing.get_args(hint)[1], v, _dotted(where, k)) for k, v in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-4 as a string
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise RequestError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
