"""What a user sees when a run cannot start or go on: one message and an exit status, not a traceback from each rank."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from lcl_megatron.checkpoint.lease import LeaseError
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.config import ConfigError
from lcl_megatron.data.storage.indexed_file import CorpusError
from lcl_megatron.parallel.parameter_hash import ReplicaMismatchError
from lcl_megatron.training import launcher
from lcl_megatron.training.bad_images import TooManyBadImagesError
from lcl_megatron.training.ending import ExitStatus
from lcl_megatron.training.step import NonFiniteError

STATUSES: tuple[tuple[type[Exception], ExitStatus], ...] = (
    (NonFiniteError, ExitStatus.NUMBERS),
    (ReplicaMismatchError, ExitStatus.NUMBERS),
    (TooManyBadImagesError, ExitStatus.DATA),
    (CorpusError, ExitStatus.DATA),
    (LeaseError, ExitStatus.FOLDER_HELD),
    (CheckpointError, ExitStatus.CHECKPOINT),
    (ConfigError, ExitStatus.USAGE),
)
"""Errors whose message says all there is to say, and their exit statuses; the first class that fits counts, so a class
stands before those that it is derived from. Any other error keeps its traceback, and the status is 1."""
SECONDS_FOR_RANK_0 = 10.0
"""A launcher ends all processes when the first one fails, so the others leave rank 0 this time to speak first."""


def status_of(error: Exception) -> ExitStatus:
    """Return the exit status that an error is given, ``CRASHED`` for those that nobody foresaw."""
    return next((status for kind, status in STATUSES if isinstance(error, kind)), ExitStatus.CRASHED)


def exit_status(main: Callable[[], ExitStatus], seconds_for_rank_0: float = SECONDS_FOR_RANK_0) -> ExitStatus:
    """Call ``main`` and return its status, or that of an explained error, whose message goes to standard error.

    Most such errors are found on all ranks alike, and rank 0 alone says so. A rank that is still alive some seconds
    later met an error of its own (a node without the corpus, say) and says it with its rank in front.

    Args:
        main: the program.
        seconds_for_rank_0: how long the other ranks wait before they speak.
    """
    try:
        return main()
    except Exception as error:
        status = status_of(error)
        if status is ExitStatus.CRASHED:
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(seconds_for_rank_0)
        launcher.say(f"error: {error}")
        return status
