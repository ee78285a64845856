"""Streams of random decisions in transfer tasks, beside those of pre-training in ``data.order.Stream``."""

from __future__ import annotations

from enum import IntEnum


class TransferStream(IntEnum):
    """What a random number decides. Decisions in different streams are independent of each other."""

    EXAMPLE_ORDER = 101
    """Order of the examples in an epoch; pre-training numbers its streams from 1."""
    DROP_MASKS = 102
    """What drop-path and dropout draw in a step."""
    FLIP = 103
    """Whether an image is mirrored."""
    CAPTION_CHOICE = 104
    """Which caption of an image is read."""
