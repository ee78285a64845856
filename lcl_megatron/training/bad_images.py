"""Images that could not be decoded while training: named, counted, and too many of them end the run."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from lcl_megatron.parallel.agreement import AgreedStep

logger = logging.getLogger(__name__)


class TooManyBadImagesError(RuntimeError):
    """The share of undecodable images is above the set rate."""


class BadImageWatch:
    """Counts undecodable images among the last ones of all ranks.

    Args:
        max_rate: largest share that is tolerated.
        window: images over which the share is taken.
    """

    def __init__(self, max_rate: float, window: int = 1000) -> None:
        self.max_rate = max_rate
        self.total = 0
        self._window = window
        self._steps: deque[tuple[int, int]] = deque()

    def add(self, agreed: AgreedStep, sources: Sequence[str]) -> None:
        """Count a step; every rank counts the same images, so that all of them stop at the same step.

        Args:
            agreed: the step.
            sources: this rank's bad images, with source and reason.

        Raises:
            TooManyBadImagesError: within a full window, more than ``max_rate`` of the images were bad.
        """
        for source in sources:
            logger.warning("image left out: %s", source)
        self.total += agreed.num_bad_images
        self._steps.append((len(agreed.image_ok), agreed.num_bad_images))
        while sum(images for images, _ in self._steps) - self._steps[0][0] >= self._window:
            self._steps.popleft()
        images, bad = (sum(column) for column in zip(*self._steps, strict=True))
        if images >= self._window and bad > self.max_rate * images:
            raise TooManyBadImagesError(
                f"{bad} of the last {images} images could not be decoded, more than data.max_bad_image_rate = "
                f"{self.max_rate:g}; the warnings above name them. Preprocess the corpus again from intact images, "
                "or raise --max-bad-image-rate"
            )
