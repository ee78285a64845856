"""A configuration as TOML text, and back: files for ``--config``, presets, and the copy inside a checkpoint.

A file has one table per section of ``RunConfig``; what it leaves out keeps the value that came before.
TOML has no null, so a field that may be None is written ``"none"``.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.config.run import RunConfig

SectionValues = dict[str, dict[str, Any]]
"""Field values by section and field; sections and fields may be absent."""

NONE = "none"
"""How a TOML file says None."""


@cache
def section_types() -> dict[str, type]:
    """Return the class of every section of ``RunConfig``, by name, in declaration order."""
    return dict(get_type_hints(RunConfig))


@cache
def field_types(section: str) -> dict[str, Any]:
    """Return the type of every field of a section, by name, in declaration order."""
    return dict(get_type_hints(section_types()[section]))


def to_toml(config: RunConfig) -> str:
    """Return the whole configuration as TOML; ``from_toml`` of it equals ``config`` exactly."""
    lines: list[str] = []
    for section in section_types():
        lines.append(f"[{section}]")
        values = getattr(config, section)
        lines += [f"{name} = {_to_toml_value(getattr(values, name))}" for name in field_types(section)]
        lines.append("")
    return "\n".join(lines)


def from_toml(text: str, source: str) -> RunConfig:
    """Return the configuration that a TOML text describes, on top of the defaults.

    Args:
        text: TOML with one table per section.
        source: where the text comes from; every error starts with it.

    Raises:
        ConfigError: the text is not TOML, names an unknown section or field, or holds a value that does not fit.
    """
    return build(read_sections(text, source))


def build(values: SectionValues) -> RunConfig:
    """Return the configuration with the given values and defaults elsewhere; sections check themselves here."""
    return RunConfig(**{name: cls(**values.get(name, {})) for name, cls in section_types().items()})


def read_sections(text: str, source: str) -> SectionValues:
    """Return the values a TOML text sets, checked against the fields' types but not yet against each other.

    Raises:
        ConfigError: see ``from_toml``.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from error
    return sections_of(tables, source)


def sections_of(tables: Mapping[str, Any], source: str) -> SectionValues:
    """Return the values that parsed TOML sets, for files that hold more than a configuration; see ``read_sections``.

    Raises:
        ConfigError: a section or field is unknown, or a value does not fit.
    """
    values: SectionValues = {}
    for section, table in tables.items():
        if section not in section_types():
            raise ConfigError(f"{source}: {_unknown('section', section, section_types())}")
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: {section} = {table!r} is not a table; write [{section}] and its fields below")
        known = field_types(section)
        for name in table:
            if name not in known:
                raise ConfigError(f"{source}: {_unknown('field', f'{section}.{name}', _all_fields())}")
        values[section] = {
            name: convert_value(value, known[name], f"{source}: {section}.{name}") for name, value in table.items()
        }
    return values


def _all_fields() -> list[str]:
    return [f"{section}.{name}" for section in section_types() for name in field_types(section)]


def _unknown(kind: str, name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """Return a message about a name that does not exist, with what may have been meant."""
    own = name.rpartition(".")[2]
    matches = [full for full in known if full.rpartition(".")[2] == own]
    matches += [full for full in difflib.get_close_matches(name, known, n=3, cutoff=0.6) if full not in matches]
    if matches:
        return f"unknown {kind} {name!r}; did you mean {' or '.join(matches)}?"
    section = name.partition(".")[0] + "."
    shown = [full for full in known if kind != "field" or full.startswith(section)]
    return f"unknown {kind} {name!r}; known: {', '.join(shown)}"


def convert_value(value: Any, hint: Any, where: str) -> Any:
    """Return a TOML value as the field's type.

    Args:
        value: what ``tomllib`` read.
        hint: the field's annotation: a scalar, ``Literal``, tuple of these, or any of them or None.
        where: starts the error.

    Raises:
        ConfigError: it does not fit.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        raise ConfigError(f"{where} = {value!r}; expected one of {', '.join(map(repr, arguments))}")
    if origin in (Union, types.UnionType):
        if value == NONE:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return convert_value(value, inner, where)
    if origin is tuple:
        return _convert_tuple(value, arguments, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is a subclass of int, so the exact type is compared.
    if type(value) is not hint:
        raise ConfigError(
            f"{where} = {value!r} is of type {type(value).__name__}; expected {_type_name(hint)}"
            + (f", e.g. {value.lower()} without quotes" if _looks_quoted(value, hint) else "")
        )
    return value


def _convert_tuple(value: Any, arguments: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{where} = {value!r}; expected a list, e.g. [a, b]")
    if arguments[-1] is Ellipsis:
        hints = (arguments[0],) * len(value)
    elif len(value) == len(arguments):
        hints = arguments
    else:
        raise ConfigError(f"{where} = {value!r} has {len(value)} entries; expected {len(arguments)}")
    return tuple(
        convert_value(item, hint, f"{where}[{i}]") for i, (item, hint) in enumerate(zip(value, hints, strict=True))
    )


def _type_name(hint: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[hint]


def _looks_quoted(value: Any, hint: type) -> bool:
    """Whether a string would have been right without its quotes."""
    if not isinstance(value, str):
        return False
    try:
        return type(tomllib.loads(f"x = {value.lower()}")["x"]) is hint
    except tomllib.TOMLDecodeError:
        return False


def _to_toml_value(value: Any) -> str:
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is and TOML refuses.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(map(_to_toml_value, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return repr(value)
