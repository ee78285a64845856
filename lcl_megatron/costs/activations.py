"""What a forward pass keeps for the backward pass, counted from the tensors that the ``torch`` layers save.

Per token of width w and MLP width f a layer keeps: its input, the LayerNorm's output, query, key and value (3 w), the
attention's output, the input of the second LayerNorm and its output (8 w in all); the MLP's hidden values (f before and
f after GELU, only f for ReLU); the two branches that LayerScale multiplies (2 w); and a few float32 values: mean and
spread of two LayerNorms, one log-sum-exp per head, two keep flags of drop-path. Tensor parallelism splits what lies
between the products, sequence parallelism the rest too. A test compares these numbers with the saved tensors of a model
that runs; TransformerEngine keeps about the same.

Recomputation of whole layers keeps their inputs only.
"""

from __future__ import annotations

from dataclasses import dataclass

from lcl_megatron.config import RunConfig
from lcl_megatron.costs.buffers import FLOAT32_BYTES
from lcl_megatron.costs.counts import MicroBatchCounts
from lcl_megatron.costs.traffic import ELEMENT_BYTES
from lcl_megatron.model.line import HEADS, LANGUAGE_EMBED, POOL, VISION_EMBED, Stage

HIDDEN_COPIES = {"relu": 1, "gelu": 2, "quick_gelu": 3}
"""Values of the MLP's hidden layer that an activation keeps, per value."""
INDEX_BYTES = 8
LOGIT_BYTES = 14
"""Bytes per logit of one chunk in flight: two of the product and of its gradient, and float32 logits, shifted logits
and exponentials, of which one overwrites another."""


@dataclass(frozen=True)
class Kept:
    """Values kept for one micro-batch on one rank."""

    elements: float = 0.0
    """Values in the precision of the run."""
    float32: float = 0.0
    """Values in float32."""
    indices: float = 0.0
    """Values in int64."""

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.elements + other.elements, self.float32 + other.float32, self.indices + other.indices)

    def times(self, factor: float) -> Kept:
        """Return so many of it."""
        return Kept(self.elements * factor, self.float32 * factor, self.indices * factor)

    def bytes(self, precision: str) -> float:
        """Return the bytes of all values."""
        return self.elements * ELEMENT_BYTES[precision] + self.float32 * FLOAT32_BYTES + self.indices * INDEX_BYTES


class StageActivations:
    """Activations of a pipeline stage.

    Args:
        config: the run.
        stage: its pieces.
        recompute: keep only the inputs of layers.
    """

    def __init__(self, config: RunConfig, stage: Stage, recompute: bool = False) -> None:
        self.config, self.stage, self.recompute = config, stage, recompute
        self.tp = config.parallel.tensor_model_parallel_size
        self.ways = self.tp if config.parallel.sequence_parallel else 1

    def micro_batch(self, counts: MicroBatchCounts) -> dict[str, float]:
        """Return the bytes that one micro-batch keeps until its backward pass, by part of the model."""
        precision = self.config.training.precision
        return {
            "vision": self.vision(counts).bytes(precision),
            "language": self.language(counts).bytes(precision),
            "heads": self.heads(counts).bytes(precision),
        }

    def vision(self, counts: MicroBatchCounts) -> Kept:
        """Return what patch embedding, vision layers, final LayerNorm and pool keep."""
        vision, stage, slots = self.config.vision, self.stage, counts.slots
        width, hidden, tokens = vision.hidden_size, self.config.language.hidden_size, slots * vision.num_tokens
        kept = self._vision_layer(counts).times(len(stage.layers("vision")))
        if stage.has(VISION_EMBED):
            patches = slots * vision.num_patches * 3 * vision.patch_size**2
            kept += Kept(patches + tokens * width, 2 * tokens)
        if stage.has(POOL):
            patches = slots * vision.num_patches
            heads = self.config.pool.num_attention_heads
            # Both sides of the final LayerNorm; keys and values behind two more; the query's are of one row.
            kept += Kept(2 * tokens * width + 2 * patches * (width + hidden) + slots * hidden + width + hidden)
            kept += Kept(0, 2 * tokens + 4 * patches + slots * heads + 2)
        return kept

    def language(self, counts: MicroBatchCounts) -> Kept:
        """Return what the token embedding and the language layers keep."""
        config, hidden = self.config, self.config.language.hidden_size
        tokens = config.training.micro_batch_size * config.data.seq_length
        kept = self._language_layer().times(len(self.stage.layers("language")))
        if self.stage.has(LANGUAGE_EMBED):
            latents = counts.images * config.vision.num_patches
            kept += Kept(latents * hidden, 0, 2 * tokens + latents)
        return kept

    def heads(self, counts: MicroBatchCounts) -> Kept:
        """Return what the vocabulary's and the contexts' heads keep, logits of the running chunk left out."""
        if not self.stage.has(HEADS):
            return Kept()
        hidden, targets, slots = self.config.language.hidden_size, max(1, counts.targets), counts.slots
        rows = targets + slots
        # Positions, labels; LayerNorms' inputs and outputs.
        return Kept(2 * rows * hidden, 2 * rows, 2 * targets + slots)

    def working_bytes(self, counts: MicroBatchCounts) -> float:
        """Return what exists beside that for a moment: a layer's gradients, or the logits of a chunk.

        A recomputed layer is there as a whole, and its gradients.
        """
        precision, config = self.config.training.precision, self.config
        layer = max(
            self._whole_vision_layer(counts).bytes(precision) if self.stage.layers("vision") else 0.0,
            self._whole_language_layer().bytes(precision) if self.stage.layers("language") else 0.0,
        )
        logits = 0.0
        if self.stage.has(HEADS):
            chunk = min(max(1, counts.targets), config.loss.cross_entropy_chunk_size)
            logits = chunk * config.language.padded_vocab_size / self.tp * LOGIT_BYTES
        return max(layer * (2 if self.recompute else 1), logits)

    def _vision_layer(self, counts: MicroBatchCounts) -> Kept:
        if self.recompute:
            return Kept(self._vision_rows(counts) * self.config.vision.hidden_size)
        return self._whole_vision_layer(counts)

    def _language_layer(self) -> Kept:
        if self.recompute:
            return Kept(self._language_rows() * self.config.language.hidden_size)
        return self._whole_language_layer()

    def _whole_vision_layer(self, counts: MicroBatchCounts) -> Kept:
        vision = self.config.vision
        branches = 0 if vision.layer_scale_init is None else 2
        copies = HIDDEN_COPIES[vision.activation]
        layer = self._layer(self._vision_rows(counts), (vision.hidden_size, vision.ffn_hidden_size), branches, copies)
        heads = self._vision_rows(counts) * self.ways * vision.num_attention_heads / self.tp
        keep = 2 * self._vision_rows(counts) * (vision.drop_path_rate > 0)
        return layer + Kept(keep, heads)

    def _whole_language_layer(self) -> Kept:
        language, rows = self.config.language, self._language_rows()
        copies = HIDDEN_COPIES[language.activation]
        layer = self._layer(rows, (language.hidden_size, language.ffn_hidden_size), 0, copies)
        return layer + Kept(0, rows * self.ways * language.num_attention_heads / self.tp)

    def _layer(self, rows: float, widths: tuple[int, int], branches: int, hidden_copies: int) -> Kept:
        """Return what any layer keeps.

        Args:
            rows: rows of the residual stream on this rank.
            widths: of the residual stream and of the MLP's hidden layer.
            branches: outputs of branches that are kept.
            hidden_copies: values kept per hidden value.
        """
        width, ffn_width = widths
        outside = rows * (4 + branches) * width
        inside = rows * self.ways / self.tp * (4 * width + hidden_copies * ffn_width)
        return Kept(outside + inside, 4 * rows)

    def _vision_rows(self, counts: MicroBatchCounts) -> float:
        return -(-counts.slots * self.config.vision.num_tokens // self.ways)

    def _language_rows(self) -> float:
        return self.config.training.micro_batch_size * self.config.data.seq_length / self.ways
