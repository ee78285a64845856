"""The ledger of a run: which rows each data-parallel rank trained on at every step.

    LEDGER_DIR/rank-00003.jsonl        of data-parallel rank 3, over all attempts (starts) of the run
        {"attempt": "5f0c...", "resumed_at_step": 40, "consumed_rows": 160, "dp_size": 4, ...}      an attempt begins
        {"attempt": "5f0c...", "step": 40, "skipped": false, "rows": [[161, "9be1..."], ...]}       a step was trained

Steps count from 0, as a checkpoint's do: ``step-00000040`` holds the weights before step 40. A row is its number in the
order of all rows of the run, and the hash of what stood in it. Every line is one ``write`` behind the others, so that a
process that is killed leaves at most one unfinished line, which the next attempt closes. ``ledger_check`` reads it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcl_megatron.config.errors import ConfigError

if TYPE_CHECKING:
    from lcl_megatron.checkpoint.folders import Progress
    from lcl_megatron.config import RunConfig
    from lcl_megatron.data.batch import PackedBatch, StepBatch
    from lcl_megatron.parallel.groups import ProcessGroups

logger = logging.getLogger(__name__)

HASH_BYTES = 16
"""Length of a row's hash: among 10^12 rows two have the same one with a probability of 10^-15."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run, as the ledger announces it: the first line of its records, on every rank."""

    attempt: str
    """Its name, which no other attempt has."""
    resumed_at_step: int
    """Its first step."""
    consumed_rows: int
    """Rows consumed before that step: the number of the first row that it reads."""
    dp_size: int
    """Data-parallel ranks, each with a file."""
    global_batch_size: int
    """Rows of a step, over all ranks."""
    data: str
    """Fingerprint of the order of rows (``Plan.fingerprint``): numbers mean the same rows only under an equal one."""
    allow_data_change: bool
    """Whether it may go on with other data than the attempt before (``checkpoint.allow_data_change``)."""


def ledger_file(folder: Path, dp_rank: int) -> Path:
    """Return the file of a data-parallel rank."""
    return folder / f"rank-{dp_rank:05d}.jsonl"


def open_ledger(config: RunConfig, groups: ProcessGroups, progress: Progress, data: str, attempt: str) -> Ledger | None:
    """Begin an attempt in ``guard.ledger_dir``.

    All ranks of a model read the same rows; the first of them (tp 0, pp 0, cp 0) records them.

    Args:
        config: of the run.
        groups: process groups.
        progress: where the run begins.
        data: fingerprint of the order of rows.
        attempt: name of this start of the run.

    Returns:
        None where nothing is recorded.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if not config.guard.ledger_dir or groups.tp_rank or groups.pp_rank or groups.cp_rank:
        return None
    header = Attempt(
        attempt=attempt,
        resumed_at_step=progress.step,
        consumed_rows=progress.consumed_rows,
        dp_size=groups.dp_size,
        global_batch_size=config.training.global_batch_size,
        data=data,
        allow_data_change=config.checkpoint.allow_data_change,
    )
    return Ledger(Path(config.guard.ledger_dir), groups.dp_rank, header, config.checkpoint.save_interval)


def row_hashes(batch: PackedBatch) -> list[str]:
    """Return the hash of what stands in each of a micro-batch's B rows: token ids, and images in their places.

    It depends on nothing but the row, however rows are dealt to ranks and micro-batches. An image counts with its key
    (which image, in which epoch), from which crop and drop-path follow. Its pixels do not: key and the fingerprint of
    the data decide them, and image decoders differ in the last bit of a colour.

    Args:
        batch: a micro-batch as the loader made it, on the host.

    Returns:
        B times 32 hex digits.
    """
    num_rows, seq_length = batch.tokens.shape
    tokens = batch.tokens.numpy().astype("<i8", copy=False)
    slots = batch.image_slots.numpy()
    keys = batch.image_keys.numpy()[: len(slots)]
    images = np.stack([slots % seq_length, keys], axis=1).astype("<i8")
    owners = slots // seq_length
    content = (tokens[row].tobytes() + images[owners == row].tobytes() for row in range(num_rows))
    return [hashlib.blake2b(part, digest_size=HASH_BYTES).hexdigest() for part in content]


class Ledger:
    """Appends the records of one attempt to the file of a data-parallel rank.

    Lines go to the operating system at once, where the death of the process cannot reach them; to the disk, which
    matters when the machine dies, at the begin, whenever a checkpoint is due, and at the end.

    Args:
        folder: of the ledger; is made.
        dp_rank: data-parallel rank.
        attempt: what begins.
        sync_interval: steps between checkpoints.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, folder: Path, dp_rank: int, attempt: Attempt, sync_interval: int) -> None:
        self.path = ledger_file(folder, dp_rank)
        self._attempt = attempt.attempt
        self._sync_interval = sync_interval
        self._line_is_open = False
        self._has_failed = False
        self._file: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            size = os.fstat(self._file).st_size
            self._line_is_open = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
            self._append(asdict(attempt))
            os.fsync(self._file)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"the ledger cannot be written: {error}; make room or give another folder with --ledger-dir"
            ) from error

    def record(self, batch: StepBatch, skipped: bool) -> None:
        """Append a step. One that cannot be written is missed by ``ledger_check``; training goes on.

        Args:
            batch: the step's rows on this rank, on the host.
            skipped: whether the step left the weights as they were.
        """
        numbers = [number for rows in batch.row_numbers for number in rows]
        hashes = [value for micro_batch in batch.micro_batches for value in row_hashes(micro_batch)]
        rows = list(zip(numbers, hashes, strict=True))
        try:
            self._append({"attempt": self._attempt, "step": batch.step, "skipped": skipped, "rows": rows})
            if self._file is not None and (batch.step + 1) % self._sync_interval == 0:
                os.fsync(self._file)
        except OSError as error:
            if not self._has_failed:
                logger.error(
                    "step %d is not in the ledger: %s: %s; training goes on, and tools/check_ledger.py will miss every "
                    "step that cannot be written",
                    batch.step,
                    self.path,
                    error,
                )
            self._has_failed = True

    def close(self) -> None:
        """Bring what was written to the disk and close the file."""
        if self._file is not None:
            try:
                os.fsync(self._file)
            except OSError as error:
                logger.error("the ledger may not be on disk: %s: %s", self.path, error)
            os.close(self._file)
            self._file = None

    def _append(self, entry: dict[str, Any]) -> None:
        """Write one line at once."""
        if self._file is None:
            raise ValueError(f"{self.path} is closed; a ledger records nothing after the end of its run")
        line = json.dumps(entry, separators=(", ", ": ")) + "\n"
        data = (("\n" if self._line_is_open else "") + line).encode("ascii")
        written = os.write(self._file, data)
        # Of a line that did not fit, the begin stands there; the next one must not join it.
        self._line_is_open = written < len(data) if written else self._line_is_open
        if written < len(data):
            raise OSError(f"only {written} of {len(data)} bytes could be written; the disk is full")
