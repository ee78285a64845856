"""What all tasks of one call share: ranks, folders, seeds, and how results are collected."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lcl_megatron.evaluation.transfer.fit import Curve, FitConfig, Loss, fit
from lcl_megatron.evaluation.transfer.report import write_results
from lcl_megatron.evaluation.transfer.results import TaskResult
from lcl_megatron.parallel.replicas import Replicas, replicas_of_launcher

Mode = Literal["frozen", "full"]
"""Whether the encoder stays as it is or is trained along."""


@dataclass(frozen=True)
class FitIdentity:
    """Which fit it is: no other fit of a call has all of this."""

    encoder: dict[str, Any]
    """``ImageEncoder.describe()``."""
    mode: Mode
    """Frozen or full."""
    seed: int
    """Of the fit."""
    trained_on: str
    """``digest`` of the task, the training data and the settings that ``fit`` does not know of."""

    @property
    def name(self) -> str:
        """``ENCODER-frozen-seed0``, with nothing in it that a file name cannot hold."""
        return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{self.encoder['name'][-100:]}-{self.mode}-seed{self.seed}")


@dataclass(frozen=True)
class Session:
    """One call of a transfer task."""

    replicas: Replicas
    """The processes."""
    output: Path
    """Folder of the results."""
    cache: Path
    """Folder of frozen features; may be shared by many calls."""
    say: Callable[[str], None]
    """Prints a line on the first rank."""
    results: list[TaskResult] = field(default_factory=list)
    """Finished encoders."""

    def state_file(self, of: FitIdentity) -> Path:
        """Return where a fit is saved until the call ends, on all ranks as the first one says.

        Parallel: one broadcast.
        """
        file = f"{of.name}-{of.encoder['fingerprint']}-{of.trained_on}.pt"
        return self.replicas.from_first(self.output / "states" / file)

    def fit(
        self,
        module: nn.Module,
        loss: Loss,
        num_examples: int,
        config: FitConfig,
        of: FitIdentity,
        pretrained: Iterable[nn.Parameter] = (),
    ) -> Curve:
        """Fit a module on all ranks; its state is saved until the call ends, and found again by the same fit.

        Args:
            module, loss, num_examples, config, pretrained: see ``fit.fit``.
            of: which fit it is.

        Raises:
            DivergenceError, NothingToLearnError, ConfigError, OSError: see there.
        """
        return fit(
            module,
            loss,
            num_examples,
            config,
            self.replicas,
            seed=of.seed,
            pretrained=pretrained,
            state_file=self.state_file(of),
        )

    def add(self, result: TaskResult) -> None:
        """Take a finished result; all files are written anew, so that a later failure loses nothing."""
        self.results.append(result)
        if self.replicas.is_first:
            write_results(self.results, self.output)
        name = f"{result.encoder['name']} {result.mode}".rstrip()
        for metric in result.metrics:
            unit = "%" if metric.percent else ""
            value = 100 * metric.mean if metric.percent else metric.mean
            self.say(f"{name}: {metric.name} {value:.2f}{unit}")


def digest(*parts: object) -> str:
    """Return 16 hex digits that change with the ``repr`` of any part.

    They name a saved state, which must not be taken up by a call with other data or settings: the fit would end as a
    mixture of both, or, if it had ended before, as that of the old ones.
    """
    return hashlib.sha256("\0".join(map(repr, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


@contextmanager
def open_session(output: Path, cache: Path | None, say: Callable[[str], None] = print) -> Iterator[Session]:
    """Yield a session; saved states are deleted when it ends without an error.

    Args:
        output: folder of the results, made if it is missing.
        cache: folder of frozen features; None = ``output/features``.
        say: prints a line.
    """
    with replicas_of_launcher() as replicas:
        begin = time.monotonic()
        quiet: Callable[[str], None] = lambda _line: None  # noqa: E731
        session = Session(replicas, output, cache or output / "features", say if replicas.is_first else quiet)
        if replicas.is_first:
            output.mkdir(parents=True, exist_ok=True)
        yield session
        replicas.barrier()
        if replicas.is_first:
            shutil.rmtree(output / "states", ignore_errors=True)
        session.say(f"wrote {output}/results.json, results.md and results.png in {time.monotonic() - begin:.0f} s")
