"""Settings of a transfer task from a shipped preset or a TOML file, with single values set on top.

A preset ``NAME`` of a task is ``lcl_megatron/evaluation/presets/TASK-NAME.toml``. Fields of the task's settings stand
at the top of the file, those of a nested section in its table.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.config.toml import convert_value

S = TypeVar("S")


def preset_names(task: str) -> list[str]:
    """Return the names of the shipped presets of a task."""
    files = resources.files("lcl_megatron.evaluation").joinpath("presets").iterdir()
    return sorted(
        file.name.removeprefix(f"{task}-").removesuffix(".toml")
        for file in files
        if file.name.startswith(f"{task}-") and file.name.endswith(".toml")
    )


def read_settings(settings: type[S], task: str, preset: str, overrides: Sequence[str] = ()) -> S:
    """Return the settings of a task.

    Args:
        settings: frozen dataclass; its fields are scalars, tuples of scalars or such dataclasses.
        task: name of the task.
        preset: name of a shipped preset, or a path that ends in ``.toml``.
        overrides: ``fit.steps=100``, values as TOML writes them; strings need no quotes.

    Raises:
        ConfigError: no such preset, no TOML, an unknown field, or a value that does not fit; names file and field.
    """
    source, text = _read(task, preset)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from error
    built = _convert_section(settings, values, source, "")
    for override in overrides:
        _merge(built, _convert_section(settings, _parse_override(override), "--set", ""))
    return cast(S, _build(settings, built, source))


def _read(task: str, preset: str) -> tuple[str, str]:
    """Return what the preset is called in messages, and its text."""
    if preset.endswith(".toml"):
        try:
            return preset, Path(preset).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"there is no preset file {preset}") from None
    file = resources.files("lcl_megatron.evaluation").joinpath("presets", f"{task}-{preset}.toml")
    if not file.is_file():
        raise ConfigError(
            f"there is no preset {preset!r} of {task}; choose {' or '.join(preset_names(task))}, or give a .toml file"
        )
    return f"preset {preset} of {task}", file.read_text(encoding="utf-8")


def _parse_override(override: str) -> dict[str, Any]:
    """Return ``a.b=3`` as ``{"a": {"b": 3}}``."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--set {override}: expected NAME=VALUE, e.g. fit.steps=100")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text
    for part in reversed(name.strip().split(".")):
        value = {part: value}
    return cast("dict[str, Any]", value)


def _convert_section(section: type, values: dict[str, Any], source: str, prefix: str) -> dict[str, Any]:
    """Return values as their fields' types; nested dataclasses stay dictionaries."""
    hints = get_type_hints(section)
    converted: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{source}: {prefix}{name}"
        if name not in hints:
            raise ConfigError(f"{where} is no setting; known: {', '.join(prefix + known for known in hints)}")
        if not dataclasses.is_dataclass(hints[name]):
            converted[name] = convert_value(value, hints[name], where)
        elif isinstance(value, dict):
            converted[name] = _convert_section(cast(type, hints[name]), value, source, f"{prefix}{name}.")
        else:
            raise ConfigError(f"{where} = {value!r} is not a table; set its fields, e.g. {name}.FIELD=VALUE")
    return converted


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict):
            _merge(values.setdefault(name, {}), value)
        else:
            values[name] = value


def _build(section: type, values: dict[str, Any], source: str) -> Any:
    hints = get_type_hints(section)
    arguments = {
        name: _build(cast(type, hints[name]), value, source) if dataclasses.is_dataclass(hints[name]) else value
        for name, value in values.items()
    }
    try:
        return section(**arguments)
    except TypeError as error:  # a field without a default is missing
        raise ConfigError(f"{source}: {error}") from error
