"""From a preset to the list of runs: the same images seen and the same images per step for every method.

Documents and pairs fill rows differently, so rows per step and steps follow from the images that a row of each view
holds on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataset import ExperimentData, StyledDocuments
from jobs import Job
from methods import METHODS, Method
from settings import Preset

from lcl_megatron.config import RunConfig
from lcl_megatron.config.errors import require
from lcl_megatron.config.toml import SectionValues, to_toml
from lcl_megatron.training.setup import build_plan, open_corpora


def plan_jobs(preset: Preset, data: ExperimentData, folder: Path, methods: Sequence[str] = ()) -> list[Job]:
    """Return all runs, seed by seed, so that a look at the first third shows every method; the controls come last.

    Args:
        preset: what is run.
        data: on what.
        folder: folder that will hold the runs' folders.
        methods: names of the methods to run; empty = all.

    Raises:
        ConfigError: a name is unknown, or nothing of the main table is left.
    """
    known = [method.name for method in METHODS]
    unknown = [name for name in methods if name not in known]
    chosen = [method for method in METHODS if not methods or method.name in methods]
    require(not unknown, f"--methods {' '.join(unknown)}: unknown; known are {', '.join(known)}")
    main = [method for method in chosen if method.role != "control"]
    control = [method for method in chosen if method.role == "control"]
    require(len(main) > 0, f"--methods {' '.join(methods)}: the main table is empty; add one that is no control")
    planner = _Planner(preset, data, folder)
    return [
        planner.job(method, seed) for group in (main, control) for seed in preset.experiment.seeds for method in group
    ]


class _Planner:
    def __init__(self, preset: Preset, data: ExperimentData, folder: Path) -> None:
        self.preset, self.data, self.folder = preset, data, folder
        self.images_per_row: dict[tuple[str, tuple[str, ...]], float] = {}

    def job(self, method: Method, seed: int) -> Job:
        documents = self.data.control if method.documents == "control" else self.data.main
        return Job(
            method=method.name,
            seed=seed,
            kind=method.kind,
            config=to_toml(self._config(method, seed, documents)),
            labels=str(documents.labels.resolve()),
            image_root=str(documents.images.resolve()),
            shards=tuple(str(shard.resolve()) for shard in documents.shards),
            test_split=self.data.test_split,
            images_per_step=self.preset.experiment.images_per_step,
        )

    def _config(self, method: Method, seed: int, documents: StyledDocuments) -> RunConfig:
        run = (self.folder / f"{method.name}-{seed}").resolve()
        corpus = str(self.data.corpora[documents.style].resolve())
        own: SectionValues = {"training": {"seed": seed}, "data": {"data_path": (corpus,)}}
        places: SectionValues = {"checkpoint": {"save": str(run / "checkpoints")}, "logging": {"log_dir": str(run)}}
        values = (own, places, method.settings)
        return self.preset.run_config(*values, {"training": self._size(method, self.preset.run_config(*values))})

    def _size(self, method: Method, config: RunConfig) -> dict[str, int]:
        """Return rows per step and steps."""
        images, per_step = self.preset.experiment.images_of(method), self.preset.experiment.images_per_step
        if method.kind == "supervised":
            return {"train_iters": round(images / per_step)}
        mean = self._images_per_row(config)
        rows = max(1, round(per_step / mean))
        steps = max(1, round(images / (rows * mean)))
        return {"global_batch_size": rows, "micro_batch_size": rows, "train_iters": steps}

    def _images_per_row(self, config: RunConfig) -> float:
        key = (config.data.data_path[0], config.data.view)
        if key not in self.images_per_row:
            plan = build_plan(config, open_corpora(config), 1)
            self.images_per_row[key] = plan.sequence.sources[0].means[0]
        return self.images_per_row[key]
