"""A preset of the experiment: the sections of a training run, and how much of it there is.

A preset is a TOML file: the tables of ``pretrain_lcl.py --config`` and one more, ``[experiment]``.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from methods import Method

from lcl_megatron.config import ConfigError, RunConfig
from lcl_megatron.config.errors import require
from lcl_megatron.config.toml import SectionValues, build, convert_value, sections_of

PRESETS = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """How much is run, and on which documents."""

    images_seen: int
    """Images that every encoder sees in its run, repetitions counted."""
    pairs_images_seen: int
    """The same for the runs of the control on pairs: generation alone learns late, and pairs cost little."""
    images_per_step: int
    """Images of a step on average, as nearly as whole rows allow."""
    seeds: tuple[int, ...]
    """Seeds of weights, order and crops; one run of every method for each."""
    documents: str
    """Documents of the main table, by the name of their folder."""
    control_documents: str
    """Documents that only a model that looks can foretell: here generation alone must learn."""
    vocab_size: int
    """Token ids of the tokenizer, which is trained on all documents used."""

    def __post_init__(self) -> None:
        seen = min(self.images_seen, self.pairs_images_seen)
        require(
            0 < self.images_per_step <= seen,
            f"experiment.images_per_step = {self.images_per_step}; expected 1 to {seen}, the images of a whole run",
        )
        require(
            len(self.seeds) >= 2 and len(set(self.seeds)) == len(self.seeds),
            f"experiment.seeds = {list(self.seeds)}; at least two different seeds are needed for an interval",
        )

    def images_of(self, method: Method) -> int:
        """Return how many images an encoder sees in its run."""
        is_control_on_pairs = method.role == "control" and method.documents == "main"
        return self.pairs_images_seen if is_control_on_pairs else self.images_seen


@dataclass(frozen=True)
class Preset:
    """A preset that has been read."""

    name: str
    """``small``, or the path of a file of one's own."""
    experiment: ExperimentConfig
    """Table ``[experiment]``."""
    run: SectionValues
    """The other tables: settings of every run."""

    def run_config(self, *changes: SectionValues) -> RunConfig:
        """Return the configuration of a run with some settings changed, the last ones win."""
        values = {section: dict(fields) for section, fields in self.run.items()}
        for change in changes:
            for section, fields in change.items():
                values.setdefault(section, {}).update(fields)
        return build(values)


def read_preset(name: str) -> Preset:
    """Read a preset.

    Args:
        name: one beside this file, or the path of a TOML file.

    Raises:
        ConfigError: there is no such preset, or it is damaged.
    """
    path = Path(name) if name.endswith(".toml") else PRESETS / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.toml")))
        raise ConfigError(f"--preset {name}: there is no file {path}; known: {known}, or give a file NAME.toml")
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    experiment = _experiment(tables.pop("experiment", {}), str(path))
    return Preset(path.stem, experiment, sections_of(tables, str(path)))


def _experiment(table: dict[str, Any], source: str) -> ExperimentConfig:
    """Return the table ``[experiment]``, which must be complete and of the right types."""
    example = [field.name for field in dataclasses.fields(ExperimentConfig)]
    missing, unknown = sorted(set(example) - table.keys()), sorted(table.keys() - set(example))
    if missing or unknown:
        raise ConfigError(
            f"{source}: [experiment] lacks {', '.join(missing) or 'nothing'} and has unknown fields "
            f"{', '.join(unknown) or 'none'}; expected {', '.join(example)}"
        )
    hints = get_type_hints(ExperimentConfig)
    values = {name: convert_value(value, hints[name], f"{source}: experiment.{name}") for name, value in table.items()}
    return ExperimentConfig(**values)
