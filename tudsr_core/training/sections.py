"""Settings in a TOML file of sections, read into frozen dataclasses that hold defaults and ranges."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..untrusted import Fields, UntrustedError, read_text, shown, some

if typing.TYPE_CHECKING:
    from collections.abc import Callable


class ConfigError(UntrustedError):
    """A configuration that cannot be used; the message names the file, the setting and what it may be."""


def read_sections(whole: type, path: Path, defaults: dict[str, dict[str, Any]]) -> Any:
    """Return the TOML file as the frozen dataclass `whole`, whose fields are sections or plain values.

    `defaults` replace those of the sections. Raises ConfigError for anything unknown, missing, of another
    kind or out of range.
    """
    tables = parse_toml(path)
    where = str(path)
    kinds = {one.name: one.type for one in fields(whole)}
    sections = get_type_hints(whole)
    _only(tables, kinds, where)
    values: dict[str, Any] = {}
    for name, kind in sections.items():
        if not isinstance(kind, type) or not hasattr(kind, "__dataclass_fields__"):
            if name in tables:
                values[name] = _value(kind, tables[name], f"{where}: {name}", path.parent)
            continue
        own = defaults.get(name, {})
        if name in tables or own or name in _required(whole):
            values[name] = _section(kind, tables.get(name, {}), own, f"{where}, [{name}]", path.parent)
    return _made(whole, values, where)


def parse_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file; raises ConfigError."""
    try:
        import tomllib
    except ModuleNotFoundError:  # before Python 3.11
        import tomli as tomllib
    try:
        return tomllib.loads(read_text(path, ConfigError))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error


def _only(table: dict[str, Any], known: typing.Iterable[str], where: str) -> None:
    if strange := sorted(table.keys() - set(known)):
        raise ConfigError(f"{where} has {some(strange)}, which is unknown; known are: {', '.join(known)}")


def _required(kind: type) -> set[str]:
    return {one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING}


def _section(kind: type, table: Any, defaults: dict[str, Any], where: str, folder: Path) -> Any:
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a section, not {shown(table)}")
    hints = get_type_hints(kind)
    _only(table, hints, where)
    values = {name: _value(hints[name], value, f"{where}: {name}", folder) for name, value in table.items()}
    return _made(kind, defaults | values, where)


def _made(kind: type, values: dict[str, Any], where: str) -> Any:
    if missing := _required(kind) - values.keys():
        raise ConfigError(f"{where} lacks {some(sorted(missing))}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _value(kind: Any, value: Any, where: str, folder: Path) -> Any:
    """Return `value` as `kind`: a plain type, Path, Literal, or a tuple of these."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # Path | None: "" says none
        return None if value == "" else _value(inner[0], value, where, folder)
    if origin is Literal:
        if value not in inner:
            raise ConfigError(f"{where} is {shown(value)}; it must be one of: {', '.join(inner)}")
        return value
    if origin is tuple:
        many = inner[-1] is ...
        if not isinstance(value, list) or not (many or len(value) == len(inner)):
            raise ConfigError(f"{where} is {shown(value)}; it must be a list{'' if many else f' of {len(inner)}'}")
        return tuple(_value(inner[0], item, where, folder) for item in value)
    return folder / _text(value, where) if kind is Path else _PLAIN[kind](value, where)


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{where} is {shown(value)}; it must be true or false")
    return value


def _reader(kind: str) -> Callable[[Any, str], Any]:
    def read(value: Any, where: str) -> Any:
        place, _, name = where.rpartition(": ")
        return getattr(Fields({name: value}, place, ConfigError), kind)(name)

    return read


_text = _reader("text")
_PLAIN = {bool: _flag, int: _reader("whole"), float: _reader("number"), str: _text}
