"""The lanes of the campaign, in order, and how many cases of each a full and a short run have."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos import checkpoints, corpora, elastic, hangs, kills, numbers, payloads, plain, storage, torchrun
from benchmarks.chaos.findings import Findings
from benchmarks.chaos.processes import call_in_child, wait_until_alone

BASELINE_S = 900.0


@dataclass(frozen=True)
class Sizes:
    """Cases of each lane."""

    kills: int
    """SIGKILLs."""
    checkpoints: int
    """Damaged checkpoints."""
    starts: int
    """Whole starts of runs on damaged checkpoints."""
    corpora: int
    """Damaged corpora."""
    payload_stride: int
    """Every so many-th payload is tried."""
    storage: int
    """Failures of storage."""
    elastic: int
    """Runs that change their layout twice."""
    numbers: int
    """Steps whose numbers go wrong."""
    hangs: int
    """Ranks that hang or are slow."""
    faults: tuple[str, ...]
    """What is done to a run under torchrun."""
    baseline: int
    """Damages of megatron-core's checkpoints, and as many of its indexed data."""


FULL = Sizes(
    kills=1000,
    checkpoints=6000,
    starts=60,
    corpora=6000,
    payload_stride=1,
    storage=20,
    elastic=14,
    numbers=24,
    hangs=8,
    faults=torchrun.FAULTS,
    baseline=240,
)
SHORT = Sizes(
    kills=12,
    checkpoints=36,
    starts=2,
    corpora=100,
    payload_stride=37,
    storage=2,
    elastic=1,
    numbers=2,
    hangs=1,
    faults=("rank 1",),
    baseline=4,
)


@dataclass(frozen=True)
class Places:
    """Scratch folders of a lane."""

    disk: Path
    """On a disk, where flushing takes its time."""
    memory: Path
    """In memory where the system has that: for many small files."""


@dataclass(frozen=True)
class Job:
    """What a lane is asked for."""

    seed: int
    """Seed of the campaign."""
    sizes: Sizes
    """How many cases."""
    places: Places
    """Where."""
    only: Sequence[int] | None
    """Numbers of the cases to repeat; None = all."""
    number_of_kills: int | None
    """Kills instead of those of ``sizes``."""

    def cases(self, number: int) -> list[int]:
        """Return the numbers of the cases of a lane that has so many."""
        return list(range(number)) if self.only is None else list(self.only)


def cases_of(only: str | None) -> list[int] | None:
    """Return the case numbers in ``LANE:CASE`` or ``LANE:FIRST-LAST``; None = all."""
    _, _, cases = (only or "").partition(":")
    if not cases or not cases[0].isdigit():
        return None
    first, _, last = cases.partition("-")
    return list(range(int(first), int(last or first) + 1))


@contextmanager
def memory_folder() -> Iterator[Path]:
    """Yield a temporary folder, in memory where the system has that."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


def _kills(job: Job) -> Findings:
    only = job.only[0] if job.only else None
    return kills.run(job.seed, job.number_of_kills or job.sizes.kills, job.places.disk, only)


def _checkpoints(job: Job) -> Findings:
    cases = job.cases(job.sizes.checkpoints)
    starts = cases if job.only else cases[: job.sizes.starts]
    return checkpoints.run(job.seed, cases, starts, job.places.memory)


def _corpora(job: Job) -> Findings:
    return corpora.run(job.seed, job.cases(job.sizes.corpora), job.places.memory)


def _payloads(job: Job) -> Findings:
    return payloads.run(job.seed, job.only, job.sizes.payload_stride, job.places.memory)


def _storage(job: Job) -> Findings:
    return storage.run(job.seed, job.cases(job.sizes.storage), job.places.disk)


def _elastic(job: Job) -> Findings:
    return elastic.run(job.seed, job.cases(job.sizes.elastic), job.places.disk)


def _numbers(job: Job) -> Findings:
    return numbers.run(job.seed, job.cases(job.sizes.numbers), job.places.disk)


def _hangs(job: Job) -> Findings:
    return hangs.run(job.seed, job.cases(job.sizes.hangs), job.places.disk)


def _torchrun(job: Job) -> Findings:
    return torchrun.run(job.seed, job.sizes.faults, job.places.disk)


def _baseline(job: Job) -> Findings:
    found = Findings("baseline", job.seed)
    # In a child: what multiprocessing starts for itself would stay with this process to its end.
    found.baseline = call_in_child(plain.run, job.seed, job.sizes.baseline, job.places.disk, timeout=BASELINE_S)
    wait_until_alone()
    return found


LANES: dict[str, Callable[[Job], Findings]] = {
    "corpora": _corpora,
    "checkpoints": _checkpoints,
    "payloads": _payloads,
    "storage": _storage,
    "elastic": _elastic,
    "numbers": _numbers,
    "hangs": _hangs,
    "torchrun": _torchrun,
    "baseline": _baseline,
    "kills": _kills,
}
"""Name on the command line -> what runs it."""
