"""Writing checkpoints while training goes on.

``begin`` copies what this rank has to write into memory that it shares with its writer process, and returns. From then
on every step's agreement (``parallel/agreement.py``) carries whether some rank is still writing, and whether some rank
failed; so all ranks know in the same step that

1. all files are on disk: rank 0 learns their hashes and has the checkpoint completed (index, manifest, rename), or
2. the checkpoint is complete, or
3. it failed: it is given up, and the one before stays the newest.

No rank waits for a disk, unless it begins a checkpoint before the one before is complete. ``finish`` waits; a run
cannot end without it. Collective over all ranks, on the host.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lcl_megatron.checkpoint.folders import step_folder
from lcl_megatron.checkpoint.lease import Lease, LeaseError
from lcl_megatron.checkpoint.manifest import CheckpointError, read_manifest
from lcl_megatron.checkpoint.shard_writer import PRUNED_PREFIX, STAGING_PREFIX
from lcl_megatron.checkpoint.writer_process import NewFile, WriteError, WriterProcess
from lcl_megatron.config import CheckpointConfig
from lcl_megatron.parallel.groups import ProcessGroups

logger = logging.getLogger(__name__)

_WAIT_S = 2.0
"""Longest wait between two agreements while a run does nothing but wait for its checkpoint."""
_NAMED_RANKS = 8
"""Ranks whose errors are told; on a full disk all have the same."""


class SaveError(CheckpointError):
    """A checkpoint could not be written; the one before is whole."""


@dataclass(kw_only=True)
class _Prepared:
    """What rank 0 finds when a checkpoint is to begin, and tells all ranks."""

    staging: str = ""
    """The folder that was made for it; empty = none was."""
    exists: bool = False
    """It has been saved before."""
    taken_over: str = ""
    """Another run holds the folder of checkpoints: why this one may not write."""
    error: str = ""
    """Why the staging folder could not be made."""


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    step: int
    staging: Path | None
    """None = it could not even be made."""
    began: float
    stall_s: float = 0.0
    """How long training stood still for it."""
    is_completing: bool = False
    """All files are on disk; rank 0 completes it."""
    answer: dict[str, Any] | None = None
    """What this rank's writer process has answered to its present task."""
    error: str = ""
    """Why this rank could not do its part."""


class Saver:
    """Writes the checkpoints of one run into one folder.

    Args:
        config: where to, what stays, and what happens on failure.
        groups: process groups.
        attempt: name of this start of the run, the same on all ranks.
        lease: rank 0's right to the folder; None elsewhere.
    """

    def __init__(self, config: CheckpointConfig, groups: ProcessGroups, attempt: str, lease: Lease | None) -> None:
        self.root = Path(config.save)
        self.writer = WriterProcess()
        self.durable_step: int | None = None
        """Step of the last checkpoint that this run has completed."""
        self.failures = 0
        """Checkpoints that have failed since then."""
        self._config = config
        self._groups = groups
        self._attempt = attempt
        self._lease = lease
        self._pending: _Pending | None = None

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._pending is not None

    def begin(self, step: int, make_files: Callable[[], Sequence[NewFile]]) -> None:
        """Begin to write a checkpoint; returns when this rank's part is copied.

        Nothing happens if this step has been saved before: a checkpoint is never written in place.

        Args:
            step: optimizer steps done.
            make_files: this rank's files; called only if they are needed.

        Raises:
            LeaseError: another run has taken over the folder.
            SaveError: it failed, and ``checkpoint.on_save_error`` is ``stop``.
        """
        began = time.monotonic()
        self.finish()
        prepared = _Prepared(**json.loads(self._groups.first_rank_text(json.dumps(asdict(self._prepare(step))))))
        if prepared.taken_over:
            raise LeaseError(prepared.taken_over)
        if prepared.exists:
            return
        self._pending = pending = _Pending(step, None, began)
        if prepared.error:
            pending.error = "" if self._groups.rank else prepared.error
            self._give_up(pending)
            return
        pending.staging = Path(prepared.staging)
        try:
            self.writer.submit(pending.staging, make_files())
        except WriteError as error:
            pending.error = str(error)
        pending.stall_s = time.monotonic() - began

    def poll(self, wait_s: float = 0.0) -> tuple[bool, bool]:
        """Return whether this rank is still writing, and whether it failed; for the step's agreement.

        Args:
            wait_s: wait so long for the writer process.
        """
        pending = self._pending
        if pending is None:
            return False, False
        if pending.answer is None and not pending.error:
            try:
                pending.answer = self.writer.answer(wait_s)
                if pending.answer is None and self.writer.busy_s > 60 * self._config.save_timeout_minutes:
                    self.writer.kill()
                    raise WriteError(
                        f"it was not written within checkpoint.save_timeout_minutes = "
                        f"{self._config.save_timeout_minutes:g}"
                    )
            except WriteError as error:
                pending.error = str(error)
        return pending.answer is None and not pending.error, bool(pending.error)

    def advance(self, writing: bool, failed: bool) -> None:
        """Take the next step of a checkpoint when all ranks are ready for it.

        Args:
            writing: some rank is still writing, as agreed.
            failed: some rank failed, as agreed.

        Raises:
            SaveError: it failed, and ``checkpoint.on_save_error`` is ``stop``.
        """
        pending = self._pending
        if pending is None or (writing and not failed):
            return
        if failed:
            self._give_up(pending)
        elif not pending.is_completing:
            self._complete(pending)
        else:
            self._pending = None
            self.durable_step, self.failures = pending.step, 0
            if self._groups.rank == 0:
                answer = pending.answer or {}
                pruned = ", ".join(answer.get("pruned", ()))
                logger.info(
                    "saved %s in %.1f s (training waited %.2f s)%s",
                    step_folder(self.root, pending.step),
                    time.monotonic() - pending.began,
                    pending.stall_s,
                    f"; deleted {pruned}" if pruned else "",
                )
                for reason in answer.get("not_pruned", ()):
                    logger.warning("an old checkpoint could not be deleted: %s", reason)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if there is one, is complete or has failed.

        Raises:
            SaveError: it failed, and ``checkpoint.on_save_error`` is ``stop``.
        """
        while self._pending is not None:
            writing, failed = self._groups.any_rank(*self.poll(_WAIT_S))
            self.advance(writing, failed)

    def require_success(self) -> None:
        """Raise SaveError if the last checkpoint failed."""
        if self.failures:
            count = "checkpoint" if self.failures == 1 else f"{self.failures} checkpoints"
            last = "none" if self.durable_step is None else f"step {self.durable_step}"
            raise SaveError(
                f"the last {count} could not be written to {self.root} (messages above); last one that this run "
                f"completed: {last}. See to the folder, and start the run again"
            )

    def close(self) -> None:
        """End the writer process; a checkpoint that is not complete is lost."""
        self.writer.close()

    def _prepare(self, step: int) -> _Prepared:
        """Make the staging folder, on rank 0, which decides for all: file systems show nodes different things."""
        if self._groups.rank:
            return _Prepared()
        try:
            if self._lease is not None:
                self._lease.renew()
            final = step_folder(self.root, step)
            if final.exists():
                # Else the run would end well, and with nothing saved.
                read_manifest(final)
                return _Prepared(exists=True)
            staging = self.root / f"{STAGING_PREFIX}{final.name}-{self._attempt}"
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        except LeaseError as error:
            return _Prepared(taken_over=str(error))
        except CheckpointError as error:
            return _Prepared(error=f"{error}; it is in the way: move it away")
        except OSError as error:
            return _Prepared(error=str(error))
        return _Prepared(staging=str(staging))

    def _complete(self, pending: _Pending) -> None:
        """Have rank 0's writer process complete a checkpoint whose files are all on disk."""
        pending.is_completing = True
        assert pending.answer is not None
        told = self._groups.gather_texts(json.dumps(pending.answer["files"]))
        if self._groups.rank:
            return
        pending.answer = None
        try:
            self.writer.complete(
                staging=str(pending.staging),
                final=str(step_folder(self.root, pending.step)),
                step=pending.step,
                attempt=self._attempt,
                files={name: entry for text in told for name, entry in json.loads(text).items()},
                lease=self._lease.identity if self._lease is not None else None,
                keep=(self._config.keep_last, self._config.keep_every),
            )
        except WriteError as error:
            pending.error = str(error)

    def _give_up(self, pending: _Pending) -> None:
        """Forget a checkpoint that some rank could not write."""
        self._pending = None
        self.failures += 1
        if pending.staging is not None and pending.answer is None and not pending.error:
            self.writer.kill()
        own = f"{self._groups.describe()}: {pending.error}" if pending.error else ""
        told = list(filter(None, self._groups.gather_texts(own)))
        more = len(told) - _NAMED_RANKS
        reasons = "; ".join([*told[:_NAMED_RANKS], *([f"and {more} more ranks"] if more > 0 else [])])
        if self._groups.rank == 0 and pending.staging is not None:
            shutil.rmtree(pending.staging, ignore_errors=True)
        message = f"the checkpoint of step {pending.step} could not be written to {self.root}: {reasons}"
        if self._config.on_save_error == "stop":
            raise SaveError(f"{message}. The one before is whole; --on-save-error continue trains on")
        if self._groups.rank == 0:
            logger.error("%s; training goes on, and the next one is written after the next interval", message)


def remove_remains(root: Path) -> None:
    """Delete what runs that were killed have left; whoever holds the folder's lease may."""
    for prefix in (STAGING_PREFIX, PRUNED_PREFIX):
        # Of checkpoints: other things, such as weights that somebody exports to here, are made under such names too.
        for path in root.glob(f"{prefix}step-*"):
            shutil.rmtree(path, ignore_errors=True)
