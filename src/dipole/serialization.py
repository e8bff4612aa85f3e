"""Frozen dataclasses to and from JSON, strictly: an unknown or missing key is an error that names it.

Configurations hold plain values, tuples, dicts and other such dataclasses; nothing in a file ever names code to import.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from dipole.errors import DipoleError, unknown

T = TypeVar("T")


def to_dict(config: Any) -> Any:
    """Return a dataclass as JSON-able values (tuples become lists)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return config


def from_dict(cls: type[T], values: Any, where: str = "config") -> T:
    """Build the dataclass `cls` from JSON values.

    Args:
        cls: A dataclass; nested dataclasses, tuples, dicts, optionals and literals are followed by their types.
        values: What `to_dict` gave.
        where: Path named in errors.

    Raises:
        DipoleError: A key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise DipoleError(f"{where}: expected a table, found {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise unknown(f"key in {where}:", key, fields)
    missing = sorted(set(fields) - set(values))
    if missing:
        raise DipoleError(f"{where}: missing key '{missing[0]}': was the file written by another version of dipole?")
    built = {key: _value(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    return cls(**built)


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(args, value, where)
    if origin is Literal:
        if value not in args:
            raise unknown(f"value of {where}:", str(value), [str(arg) for arg in args])
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise DipoleError(f"{where}: expected a list, found {value!r}")
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise DipoleError(f"{where}: expected {len(kinds)} values, found {len(value)}")
        return tuple(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin in (dict, Mapping) or kind is dict:
        if not isinstance(value, Mapping):
            raise DipoleError(f"{where}: expected a table, found {value!r}")
        inner = args[1] if args else Any
        return {key: _value(inner, item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where)  # type: ignore[arg-type]
    return _plain(kind, value, where)


def _union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    rest = [kind for kind in kinds if kind is not type(None)]
    if len(rest) == 1:
        return _value(rest[0], value, where)
    for kind in rest:
        try:
            return _value(kind, value, where)
        except DipoleError:
            continue
    raise DipoleError(f"{where}: {value!r} fits none of {', '.join(str(kind) for kind in rest)}")


def _plain(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    accepted: dict[Any, Callable[[Any], bool]] = {
        float: lambda v: isinstance(v, int | float) and not isinstance(v, bool),
        int: lambda v: isinstance(v, int) and not isinstance(v, bool),
        bool: lambda v: isinstance(v, bool),
        str: lambda v: isinstance(v, str),
    }
    if kind not in accepted or not accepted[kind](value):
        raise DipoleError(f"{where}: expected {getattr(kind, '__name__', kind)}, found {value!r}")
    return float(value) if kind is float else value


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file.

    Raises:
        DipoleError: The file is missing, not UTF-8 or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DipoleError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DipoleError(f"{path}: not valid JSON ({error}): restore the file or write it again") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it, so that a reader never sees half a file."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically.

    Raises:
        DipoleError: The disk is full or the folder cannot be written; the old file is left as it was.
    """
    handle, temporary = -1, ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise DipoleError(
            f"{path}: cannot be written ({error.strerror}): free some space or choose another folder"
        ) from None
