"""What one rank computes of a micro-batch: images that it encodes, images that a branch is computed for, positions.

The same arithmetic as ``parallel/zigzag.py`` and ``model/vision.py``, on counts; tests of several ranks compare them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lcl_megatron.config import RunConfig
from lcl_megatron.costs.counts import MicroBatchCounts
from lcl_megatron.model.drop_rates import layer_rate, num_kept


@dataclass(frozen=True)
class Portion:
    """One rank's portion of a micro-batch."""

    config: RunConfig
    """The run."""
    counts: MicroBatchCounts
    """What the micro-batch holds."""
    cp_rank: int
    """Context-parallel rank."""

    @cached_property
    def images(self) -> int:
        """Image slots that this rank encodes: a contiguous part, and another rank's instead of none."""
        slots, size = self.counts.slots, self.config.parallel.context_parallel_size
        return max(1, slots * (self.cp_rank + 1) // size - slots * self.cp_rank // size)

    @property
    def gathered_images(self) -> int:
        """Image slots that a gather over the context-parallel ranks moves, padding included."""
        size = self.config.parallel.context_parallel_size
        return -(-self.counts.slots // size) * size

    @property
    def positions(self) -> int:
        """Positions of the rows that this rank holds."""
        rows, length = self.config.training.micro_batch_size, self.config.data.seq_length
        return rows * length // self.config.parallel.context_parallel_size

    @property
    def vision_tokens(self) -> int:
        """Tokens of the images, padded where tensor-parallel ranks divide them."""
        parallel = self.config.parallel
        ways = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        return -(-self.images * self.config.vision.num_tokens // ways) * ways

    def branch_images(self, layer: int) -> int:
        """Return for how many of the images a vision layer computes its branches."""
        if self.config.vision.drop_path_mode == "mask":
            return self.images
        return num_kept(self._rate(layer), self.images)

    def branch_tokens(self, layer: int) -> int:
        """Return for how many tokens a vision layer computes its branches, padding included."""
        if self.is_subset(layer):
            return self.branch_images(layer) * self.config.vision.num_tokens
        return self.vision_tokens

    def is_subset(self, layer: int) -> bool:
        """Return whether a vision layer's branches leave images out."""
        return self.branch_images(layer) < self.images

    def has_flags(self, layer: int) -> bool:
        """Return whether a vision layer multiplies its branches by a flag of each token."""
        return self.config.vision.drop_path_mode == "mask" and self._rate(layer) > 0

    def _rate(self, layer: int) -> float:
        vision = self.config.vision
        return layer_rate(vision.drop_path_rate, layer, vision.num_layers)


def recomputed_layers(config: RunConfig, tower: str, layers: range) -> range:
    """Return those of a stage's layers whose whole forward pass the backward pass repeats.

    Args:
        config: the run.
        tower: ``vision`` or ``language``.
        layers: the stage's layers of the tower.
    """
    section = config.vision if tower == "vision" else config.language
    if section.recompute_granularity != "full":
        return layers[:0]
    return layers[: section.recompute_num_layers or len(layers)]
