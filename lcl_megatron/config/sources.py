"""Where a configuration comes from: defaults < ``--preset NAME`` < ``--config FILE.toml`` < flags.

Flags are derived from the dataclasses by tyro. Fields of ``vision``, ``language`` and ``pool`` carry their section
(``--vision.num-layers``), because towers share field names; all others do not, which is Megatron's spelling
(``--tensor-model-parallel-size``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import tyro

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.config.model import LanguageConfig, LossConfig, PoolConfig, VisionConfig
from lcl_megatron.config.run import (
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from lcl_megatron.config.toml import SectionValues, field_types, read_sections, section_types

_DESCRIPTION = (
    "Pre-train a vision encoder on interleaved image-text data. Precedence: defaults < --preset < --config < flags."
)
_NoPrefix = tyro.conf.arg(name="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Files:
    preset: str = ""
    """Name of a shipped configuration, the base of everything else; an unknown name lists the known ones."""
    config: str = ""
    """TOML file on top of the preset; a checkpoint's ``run.toml`` with another ``--save`` repeats its run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CommandLine(_Files):
    """The sections of ``RunConfig`` with the prefixes of their flags, as tyro wants to be told."""

    data: Annotated[DataConfig, _NoPrefix]
    training: Annotated[TrainingConfig, _NoPrefix]
    optimizer: Annotated[OptimizerConfig, _NoPrefix]
    parallel: Annotated[ParallelConfig, _NoPrefix]
    checkpoint: Annotated[CheckpointConfig, _NoPrefix]
    guard: Annotated[GuardConfig, _NoPrefix]
    logging: Annotated[LoggingConfig, _NoPrefix]
    loss: Annotated[LossConfig, _NoPrefix]
    vision: VisionConfig
    pool: PoolConfig
    language: LanguageConfig


def load_run_config(argv: Sequence[str], prog: str = "pretrain_lcl.py") -> RunConfig:
    """Return the configuration that a command line asks for.

    Args:
        argv: the arguments without the program's name.
        prog: the program's name in ``--help``.

    Raises:
        ConfigError: unknown preset, unreadable file, unknown field, or values that cannot be.
        SystemExit: after ``--help`` (status 0), and after printing what is wrong with a flag (status 2).
    """
    # --help is left to the second parser, which knows every flag and the values that preset and file gave them.
    first, _ = tyro.cli(_Files, prog=prog, args=list(argv), return_unknown_args=True, add_help=False)
    values: SectionValues = {}
    if first.preset:
        _update(values, read_sections(preset_text(first.preset), f"preset {first.preset}"))
    if first.config:
        _update(values, read_sections(_read_file(first.config), first.config))
    chosen = tyro.cli(
        _CommandLine, prog=prog, description=_DESCRIPTION, args=list(argv), default=_command_line(first, values)
    )
    return RunConfig(**{section: getattr(chosen, section) for section in section_types()})


def preset_names() -> list[str]:
    """Return the names that ``--preset`` knows."""
    folder = resources.files("lcl_megatron.config").joinpath("presets")
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def preset_text(name: str) -> str:
    """Return a preset's TOML text.

    Raises:
        ConfigError: there is no such preset; the message lists those there are.
    """
    if name not in preset_names():
        raise ConfigError(
            f"--preset {name}: there is no such preset; known: {', '.join(preset_names())} "
            "(a file of your own is given by --config FILE.toml)"
        )
    return resources.files("lcl_megatron.config").joinpath("presets", f"{name}.toml").read_text(encoding="utf-8")


def describe(config: RunConfig) -> str:
    """Return the resolved configuration for people: every field, and its default where the value differs from it."""
    default = RunConfig()
    lines: list[str] = []
    for section in section_types():
        lines.append(f"[{section}]")
        width = max(map(len, field_types(section)))
        for name in field_types(section):
            value, usual = (getattr(getattr(c, section), name) for c in (config, default))
            note = "" if value == usual else f"    (default {usual!r})"
            lines.append(f"  {name:{width}} = {value!r}{note}")
    return "\n".join(lines)


def _read_file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {error}; give the path of a TOML file") from error


def _update(values: SectionValues, newer: SectionValues) -> None:
    for section, fields in newer.items():
        values.setdefault(section, {}).update(fields)


def _command_line(files: _Files, values: SectionValues) -> _CommandLine:
    """Return the defaults of the flags: what preset and file say."""
    sections = {name: _unchecked(cls, values.get(name, {})) for name, cls in section_types().items()}
    return _CommandLine(**dataclasses.asdict(files), **sections)


def _unchecked(cls: type, values: dict[str, Any]) -> Any:
    """Return a section that has not checked itself.

    A file may set ``sequence_parallel`` and leave ``tensor_model_parallel_size`` to a flag: only the two together are
    right or wrong. tyro reads the defaults from here and calls the real constructor on the final values.
    """
    section: Any = object.__new__(cls)
    for field in dataclasses.fields(cls):
        object.__setattr__(section, field.name, values.get(field.name, field.default))
    return section
