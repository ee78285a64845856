"""What a rank computes in a forward pass, and how long that takes: products, attention, element-wise kernels, launches.

A backward pass is taken as twice the forward pass in every respect.
"""

from __future__ import annotations

from dataclasses import dataclass

from lcl_megatron.config import RunConfig
from lcl_megatron.costs.assumptions import Assumptions
from lcl_megatron.costs.counts import MicroBatchCounts, RowMeans
from lcl_megatron.costs.devices import Device
from lcl_megatron.costs.traffic import ELEMENT_BYTES
from lcl_megatron.model.line import HEADS, POOL, VISION_EMBED, Stage
from lcl_megatron.training.flops import pool_forward_flops

HEAD_PASSES = 4 / 3
"""Passes over the vocabulary's product per pass over others: its logits are computed again in the backward pass."""
LOGIT_PASS_BYTES = 33
"""Bytes that the cross-entropy moves per logit and pass: bf16 logits, four float32 passes forward, again in the
backward pass, and the gradient; 98 in all three."""
OUTSIDE_SHARE = 0.4
"""Share of a layer's element-wise traffic on the residual stream: LayerNorms, residuals, LayerScale, drop-path."""


@dataclass(frozen=True)
class Work:
    """A forward pass on one rank."""

    product_flops: float = 0.0
    """Matrix products, in operations at the rate of a very wide product."""
    attention_flops: float = 0.0
    """Attention."""
    moved_bytes: float = 0.0
    """Element-wise traffic."""
    kernels: float = 0.0
    """Launches."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.product_flops + other.product_flops,
            self.attention_flops + other.attention_flops,
            self.moved_bytes + other.moved_bytes,
            self.kernels + other.kernels,
        )

    def times(self, factor: float) -> Work:
        """Return so many of it."""
        return Work(
            self.product_flops * factor, self.attention_flops * factor, self.moved_bytes * factor, self.kernels * factor
        )

    def seconds(self, device: Device, assumed: Assumptions) -> float:
        """Return the time on a device."""
        peak = device.peak_tflops * 1e12
        products = self.product_flops / (peak * assumed.product_share)
        attention = self.attention_flops / (peak * assumed.attention_share)
        moved = self.moved_bytes / (device.memory_tb_s * 1e12 * assumed.memory_share)
        return max(products + attention + moved, self.kernels * assumed.kernel_us * 1e-6)


@dataclass(frozen=True)
class Tower:
    """Layers of one width, and how a rank shares them."""

    width: int
    """Of the residual stream."""
    ffn_width: int
    """Of the MLP's hidden layer."""
    element_bytes: int = 2
    """Bytes of an activation."""
    tensor: int = 1
    """Tensor-parallel ranks."""
    is_split: bool = False
    """Whether they also split the sequence."""

    def layer(self, tokens: float, squared_lengths: float, is_causal: bool, assumed: Assumptions) -> Work:
        """Return the work of one layer.

        Args:
            tokens: positions that are computed, padding included.
            squared_lengths: sum over sequences of length squared; half of it is attended where it is causal.
            is_causal: language, and not vision.
            assumed: rates.
        """
        products = 2 * tokens * (4 * self.width**2 + 2 * self.width * self.ffn_width) / self.tensor
        attention = 4 * squared_lengths * self.width / (2 if is_causal else 1) / self.tensor
        moved = assumed.elementwise_passes * tokens * self.width * self.element_bytes
        outside = OUTSIDE_SHARE / (self.tensor if self.is_split else 1)
        inside = (1 - OUTSIDE_SHARE) / self.tensor
        wide = at_full_rate(products, self.width // self.tensor, assumed)
        return Work(wide, attention, moved * (outside + inside), assumed.kernels_per_layer)


def at_full_rate(flops: float, narrowest: int, assumed: Assumptions) -> float:
    """Return the operations that a very wide product would do in the time of one whose narrowest side is given."""
    return flops * (narrowest + assumed.product_half_width) / narrowest


@dataclass(frozen=True)
class StageWork:
    """The forward pass of one micro-batch on a pipeline stage."""

    layers: Work
    """Layers, patch embedding, pool and context head: what features need."""
    token_losses: Work
    """The vocabulary's head."""


def stage_work(
    config: RunConfig, stage: Stage, counts: MicroBatchCounts, means: RowMeans, assumed: Assumptions
) -> StageWork:
    """Return what a rank of a stage computes for one micro-batch.

    Args:
        config: the run.
        stage: its pieces.
        counts: images and targets of the micro-batch.
        means: lengths of the documents of a row.
        assumed: rates.
    """
    vision, language, parallel = config.vision, config.language, config.parallel
    size = ELEMENT_BYTES[config.training.precision]
    shared = (size, parallel.tensor_model_parallel_size, parallel.sequence_parallel)
    rows, slots = config.training.micro_batch_size, counts.slots
    seen = Tower(vision.hidden_size, vision.ffn_hidden_size, *shared)
    read = Tower(language.hidden_size, language.ffn_hidden_size, *shared)
    work = seen.layer(slots * vision.num_tokens, slots * vision.num_tokens**2, False, assumed).times(
        len(stage.layers("vision"))
    )
    work += read.layer(rows * config.data.seq_length, rows * means.squared_lengths, True, assumed).times(
        len(stage.layers("language"))
    )
    if stage.has(VISION_EMBED):
        flops = 2.0 * slots * vision.num_patches * vision.hidden_size * 3 * vision.patch_size**2
        pixels = slots * 3 * vision.image_size**2
        work += Work(at_full_rate(flops, vision.hidden_size, assumed), 0.0, pixels * (1 + 4 * 4 + 4 * size), 20)
    if stage.has(POOL):
        flops = slots * pool_forward_flops(config)
        moved = 12 * slots * vision.num_patches * (vision.hidden_size + language.hidden_size) * size
        work += Work(at_full_rate(flops, language.hidden_size, assumed), 0.0, moved, 30)
    losses = Work()
    if stage.has(HEADS):
        logits = counts.targets * language.padded_vocab_size / shared[1]
        flops = HEAD_PASSES * 2 * logits * language.hidden_size
        chunks = counts.targets / config.loss.cross_entropy_chunk_size
        losses = Work(at_full_rate(flops, language.hidden_size, assumed), 0.0, LOGIT_PASS_BYTES * logits, 20 * chunks)
    return StageWork(work, losses)
