"""What a user sees when a run cannot start or go on: one message and exit status 2, instead of tracebacks by rank."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from lcl_megatron.checkpoint.native import CheckpointError
from lcl_megatron.config import ConfigError
from lcl_megatron.data.storage.indexed_file import CorpusError
from lcl_megatron.training.bad_images import TooManyBadImagesError
from lcl_megatron.training.step import NonFiniteError

EXPLAINED = (ConfigError, CorpusError, CheckpointError, TooManyBadImagesError, NonFiniteError)
"""Errors whose message says all there is to say. Any other keeps its traceback."""
STATUS = 2
SECONDS_FOR_RANK_0 = 10.0
"""A launcher ends all processes when the first one fails, so the others leave rank 0 this time to speak first."""


def exit_status(main: Callable[[], None], seconds_for_rank_0: float = SECONDS_FOR_RANK_0) -> int:
    """Call ``main`` and return 0, or 2 after an explained error, whose message goes to standard error.

    Most such errors are found on all ranks alike, and rank 0 alone says so. A rank that is still alive some seconds
    later met an error of its own (a node without the corpus, say) and says it with its rank in front.

    Args:
        main: the program.
        seconds_for_rank_0: how long the other ranks wait before they speak.
    """
    try:
        main()
    except EXPLAINED as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(seconds_for_rank_0)
        sys.stderr.write(f"{f'[rank {rank}] ' if rank else ''}error: {error}\n")
        sys.stderr.flush()
        return STATUS
    return 0
