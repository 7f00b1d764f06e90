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
from collections.abc import Iterable, Mapping, Sequence
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
    missing one, or a value of the wrong type. A field declared with `by_kind_of` has the class that the kind of
    another field says.
    """
    if not isinstance(data, Mapping):
        raise RequestError(f"{where or cls.__name__}: expected a mapping of fields, got {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            kind = f" for kind {own!r}" if (own := getattr(cls, "kind", None)) else ""
            raise RequestError(f"unknown field {_dotted(where, key)!r}{kind}: {nearest(str(key), fields)}")
    values: dict[str, Any] = {}
    for name, f in fields.items():
        if name in data and "by_kind_of" in f.metadata:
            values[name] = _by_kind_of_other(f, data[name], values, fields, where)
        elif name in data:
            values[name] = _convert(hints[name], data[name], _dotted(where, name))
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise RequestError(f"missing field {_dotted(where, name)!r}")
    try:
        return cls(**values)
    except RequestError as error:
        raise RequestError(f"{where}: {error}" if where else str(error)) from None


def from_kind(options: Sequence[type[C]], data: Any, where: str = "") -> C:
    """`from_dict` of the one of several config dataclasses whose `kind` the data names, of the first if it names none.

    Raises RequestError, with the nearest right name, for an unknown kind.
    """
    kinds = {option.kind: option for option in options}  # type: ignore[attr-defined]
    first = next(iter(kinds))
    kind = data.get("kind", first) if isinstance(data, Mapping) else first
    if not isinstance(kind, str) or kind not in kinds:
        raise RequestError(f"{where}: kind: unknown {kind!r}: {nearest(str(kind), kinds)}")
    return from_dict(kinds[kind], data, where)


def by_kind_of(other: str, classes: Mapping[str, type]) -> dict[str, Any]:
    """Metadata of a dataclass field whose class is one of `classes`: that of the `kind` of the field `other`.

    `other` comes before it in the class.
    """
    return {"by_kind_of": other, "classes": classes}


def _by_kind_of_other(
    f: dataclasses.Field, data: Any, values: dict[str, Any], fields: dict[str, dataclasses.Field], where: str
) -> Any:
    other, classes = f.metadata["by_kind_of"], f.metadata["classes"]
    otherwise: Any = fields[other].default_factory
    kind = (values[other] if other in values else otherwise()).kind
    try:
        return _convert(classes[kind], data, _dotted(where, f.name))
    except RequestError as error:
        why = "" if kind == next(iter(classes)) else f" ({_dotted(where, other)}.kind is {kind!r})"
        raise RequestError(f"{error}{why}") from None


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
        if len(options) > 1 and all(dataclasses.is_dataclass(o) for o in options):
            return value if isinstance(value, options) else from_kind(options, value, where)
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
