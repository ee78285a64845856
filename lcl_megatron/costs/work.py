"""What a rank computes in a forward pass, and how long that takes: products, attention, element-wise kernels, launches.

A backward pass is taken as twice the forward pass in every respect, and once more what is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

from lcl_megatron.config import LanguageConfig, RunConfig, VisionConfig
from lcl_megatron.costs.assumptions import Assumptions
from lcl_megatron.costs.counts import MicroBatchCounts, RowMeans
from lcl_megatron.costs.devices import Device
from lcl_megatron.costs.portions import Portion, recomputed_layers
from lcl_megatron.costs.traffic import ELEMENT_BYTES
from lcl_megatron.model.line import HEADS, POOL, VISION_EMBED, Stage
from lcl_megatron.training.flops import pool_forward_flops

HEAD_PASSES = 4 / 3
"""Passes over the vocabulary's product per pass over others: its logits are computed again in the backward pass."""
LOGIT_PASS_BYTES = 33
"""Bytes that the cross-entropy moves per logit and pass: bf16 logits, four float32 passes forward, again in the
backward pass, and the gradient; 98 in all three."""
NORM_PASSES, ACTIVATION_PASSES, SELECTIVE_KERNELS = 4, 2, 3
"""What ``selective`` recomputation moves, reading and writing: two LayerNorms' activations of the residual stream's
size, one of the MLP's hidden layer."""
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

    def selective(self, tokens: float, with_activation: bool) -> Work:
        """Return what one layer makes again under ``selective`` recomputation.

        Args:
            tokens: positions that are computed.
            with_activation: whether the MLP activation's output is dropped too.
        """
        norms = NORM_PASSES * tokens * self.width / (self.tensor if self.is_split else 1)
        hidden = ACTIVATION_PASSES * tokens * self.ffn_width / self.tensor if with_activation else 0.0
        return Work(0.0, 0.0, (norms + hidden) * self.element_bytes, SELECTIVE_KERNELS)


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
    recomputed: Work
    """What of the layers the backward pass makes again."""


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
    portion = Portion(config, counts, parallel.context_parallel_size - 1)
    images = portion.images
    seen, seen_again = _vision_work(config, stage, portion, assumed)
    read, read_again = _language_work(config, stage, portion, means, assumed)
    work = seen + read
    if stage.has(VISION_EMBED):
        flops = 2.0 * images * vision.num_patches * vision.hidden_size * 3 * vision.patch_size**2
        pixels = images * 3 * vision.image_size**2
        work += Work(at_full_rate(flops, vision.hidden_size, assumed), 0.0, pixels * (1 + 4 * 4 + 4 * size), 20)
    if stage.has(POOL):
        flops = images * pool_forward_flops(config)
        moved = 12 * images * vision.num_patches * (vision.hidden_size + language.hidden_size) * size
        work += Work(at_full_rate(flops, language.hidden_size, assumed), 0.0, moved, 30)
    losses = Work()
    if stage.has(HEADS):
        logits = counts.targets * language.padded_vocab_size / parallel.tensor_model_parallel_size
        flops = HEAD_PASSES * 2 * logits * language.hidden_size
        chunks = counts.targets / config.loss.cross_entropy_chunk_size
        losses = Work(at_full_rate(flops, language.hidden_size, assumed), 0.0, LOGIT_PASS_BYTES * logits, 20 * chunks)
    return StageWork(work, losses, seen_again + read_again)


def _vision_work(config: RunConfig, stage: Stage, portion: Portion, assumed: Assumptions) -> tuple[Work, Work]:
    """Return the forward pass of a stage's vision layers, and what of it is made again."""
    vision, layers = config.vision, stage.layers("vision")
    tower, again = _tower(config, vision), recomputed_layers(config, "vision", layers)
    work = repeated = Work()
    for layer in layers:
        images = portion.branch_images(layer)
        tokens = images * vision.num_tokens
        one = tower.layer(tokens, tokens * vision.num_tokens, False, assumed)
        work += one
        if layer in again:
            repeated += one
        elif vision.recompute_granularity == "selective":
            repeated += tower.selective(tokens, True)
    return work, repeated


def _language_work(
    config: RunConfig, stage: Stage, portion: Portion, means: RowMeans, assumed: Assumptions
) -> tuple[Work, Work]:
    """Return the forward pass of a stage's language layers, and what of it is made again."""
    language, layers = config.language, stage.layers("language")
    tower, again = _tower(config, language), recomputed_layers(config, "language", layers)
    # Positions are dealt out so that attention costs all context-parallel ranks the same.
    squared = config.training.micro_batch_size * means.squared_lengths / config.parallel.context_parallel_size
    one = tower.layer(portion.positions, squared, True, assumed)
    repeated = one.times(len(again))
    if language.recompute_granularity == "selective":
        repeated = tower.selective(portion.positions, language.activation != "relu").times(len(layers))
    return one.times(len(layers)), repeated


def _tower(config: RunConfig, section: VisionConfig | LanguageConfig) -> Tower:
    size, parallel = ELEMENT_BYTES[config.training.precision], config.parallel
    shared = (parallel.tensor_model_parallel_size, parallel.sequence_parallel)
    return Tower(section.hidden_size, section.ffn_hidden_size, size, *shared)
