"""Telling an error of a collective from any other: what torch raises when a rank is late or gone."""

from __future__ import annotations

import torch.distributed as dist

_GLOO_WORDS = (
    "third_party/gloo/",
    "Application timeout caused pair closure",
    "Connection closed by peer",
    "Connection reset by peer",
)
"""In every error of gloo seen with torch 2.13: a rank that waits too long reads ``[.../third_party/gloo/...] Timed out
waiting 3000ms for recv operation to complete``, later on the same connections ``Application timeout caused pair
closure``; the other ends read ``Connection closed by peer``, those of a killed process ``Read error [address]:
Connection reset by peer``. All are plain RuntimeErrors."""


def is_collective_error(error: BaseException) -> bool:
    """Return whether an error came out of a collective: gloo's by its words, nccl's (``DistBackendError``) by type."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _GLOO_WORDS)
