"""Errors that a caller may want to catch by class."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot run; raised before anything starts."""


def require(condition: bool, message: str) -> None:
    """Raise ``ConfigError(message)`` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(section: object, name: str, *fields: str) -> None:
    """Raise ``ConfigError`` unless the named fields of a section are at least 1; ``name`` is the section's."""
    for field in fields:
        value = getattr(section, field)
        require(value >= 1, f"{name}.{field} = {value}; it must be at least 1")
