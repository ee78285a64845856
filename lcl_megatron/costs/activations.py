"""What a forward pass keeps for the backward pass, counted from the tensors that the ``torch`` layers save.

Per token of width w and MLP width f a layer keeps: its input, the LayerNorm's output, query, key and value (3 w), the
attention's output, the input of the second LayerNorm and its output (8 w in all); the MLP's hidden values (f before and
f after GELU, only f for ReLU); the two branches that LayerScale multiplies (2 w); and a few float32 values: mean and
spread of two LayerNorms, one log-sum-exp per head, two flags of drop-path. Tensor parallelism splits what lies between
the products, sequence parallelism the rest too. A test compares these numbers with the saved tensors of a model that
runs; TransformerEngine keeps about the same.

- ``selective`` recomputation drops the LayerNorms' outputs, means and spreads, and the MLP activation's output
  (``model/recompute.py``); ``full`` keeps the input of a layer, and what drop-path decided.
- ``drop_path_mode = subset`` computes, and keeps, branches of some images only.
- Context parallelism leaves a rank its own positions and images, and keeps beside its keys and values those that its
  queries attend to, which other ranks hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from lcl_megatron.config import RunConfig
from lcl_megatron.costs.buffers import FLOAT32_BYTES
from lcl_megatron.costs.counts import MicroBatchCounts
from lcl_megatron.costs.portions import Portion, recomputed_layers
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
        cp_rank: context-parallel rank; None = the last one, which never encodes fewer images than another.
    """

    def __init__(self, config: RunConfig, stage: Stage, cp_rank: int | None = None) -> None:
        self.config, self.stage = config, stage
        self.cp = config.parallel.context_parallel_size
        self.cp_rank = self.cp - 1 if cp_rank is None else cp_rank
        self.tp = config.parallel.tensor_model_parallel_size
        self.ways = self.tp if config.parallel.sequence_parallel else 1
        self.again = {tower: recomputed_layers(config, tower, stage.layers(tower)) for tower in ("vision", "language")}

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
        vision, stage, portion = self.config.vision, self.stage, Portion(self.config, counts, self.cp_rank)
        width, hidden, images = vision.hidden_size, self.config.language.hidden_size, portion.images
        tokens, patches = images * vision.num_tokens, images * vision.num_patches
        kept = Kept()
        for layer in stage.layers("vision"):
            if layer in self.again["vision"]:
                kept += Kept(portion.vision_tokens / self.ways * width) + self._drop_path(portion, layer)
            else:
                kept += self._vision_layer(portion, layer)
        if stage.has(VISION_EMBED):
            kept += Kept(patches * 3 * vision.patch_size**2 + tokens * width, 2 * tokens)
            kept += self._others_rows(portion.vision_tokens * width)
        if stage.has(POOL):
            heads = self.config.pool.num_attention_heads
            # Both sides of the final LayerNorm; keys and values behind two more; the query's are of one row.
            kept += Kept(2 * tokens * width + 2 * patches * (width + hidden) + images * hidden + width + hidden)
            kept += Kept(0, 2 * tokens + 4 * patches + images * heads + 2)
        return kept

    def language(self, counts: MicroBatchCounts) -> Kept:
        """Return what the token embedding and the language layers keep."""
        config, hidden, portion = self.config, self.config.language.hidden_size, Portion(self.config, counts, 0)
        again, layers = len(self.again["language"]), len(self.stage.layers("language"))
        kept = Kept(portion.positions / self.ways * hidden).times(again)
        kept += self._language_layer(portion).times(layers - again)
        if layers:
            # Where each fetched key comes from: once for all layers.
            kept += Kept(0, 0, counts.fetched_keys)
        if self.stage.has(LANGUAGE_EMBED):
            latents = counts.images * config.vision.num_patches
            kept += Kept(latents * hidden, 0, 2 * portion.positions + latents)
            kept += self._others_rows(portion.positions * hidden)
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

        A recomputed layer is there as a whole, and its gradients; keys and values of whole rows under context
        parallelism, and their gradients.
        """
        precision, config, portion = self.config.training.precision, self.config, Portion(self.config, counts, 0)
        busy = [0.0]
        vision, language = self.stage.layers("vision"), self.stage.layers("language")
        if vision:
            # The first layer leaves out no image.
            busy.append(self._vision_layer(portion, vision[0]).bytes(precision) * (2 if self.again["vision"] else 1))
        if language:
            size = self._language_layer(portion).bytes(precision) * (2 if self.again["language"] else 1)
            fetched = 4 * portion.positions * self.cp * config.language.hidden_size / self.tp
            busy.append(size + (Kept(fetched).bytes(precision) if self.cp > 1 else 0.0))
        if self.stage.has(HEADS):
            chunk = min(max(1, counts.targets), config.loss.cross_entropy_chunk_size)
            busy.append(chunk * config.language.padded_vocab_size / self.tp * LOGIT_BYTES)
        return max(busy)

    def _others_rows(self, elements: int) -> Kept:
        """The first layer's input is a view of the whole sequence, where the sequence is split: no row is freed."""
        return Kept(elements * (1 - 1 / self.ways))

    def _vision_layer(self, portion: Portion, layer: int) -> Kept:
        vision = self.config.vision
        rows = portion.branch_tokens(layer) / self.ways
        branches = 0 if vision.layer_scale_init is None else 2
        is_selective = vision.recompute_granularity == "selective"
        copies = 1 if is_selective else HIDDEN_COPIES[vision.activation]
        kept = self._layer(rows, (vision.hidden_size, vision.ffn_hidden_size), branches, copies, is_selective)
        heads = rows * self.ways * vision.num_attention_heads / self.tp
        return kept + Kept(0, heads) + self._drop_path(portion, layer)

    def _drop_path(self, portion: Portion, layer: int) -> Kept:
        """Two flags per token, or two lists of the images that are kept, each at both ends of its branch."""
        flags = 2 * portion.vision_tokens if portion.has_flags(layer) else 0
        return Kept(0, flags, 2 * portion.branch_images(layer) if portion.is_subset(layer) else 0)

    def _language_layer(self, portion: Portion) -> Kept:
        language, rows = self.config.language, portion.positions / self.ways
        is_selective = language.recompute_granularity == "selective"
        copies = HIDDEN_COPIES["relu" if is_selective else language.activation]
        kept = self._layer(rows, (language.hidden_size, language.ffn_hidden_size), 0, copies, is_selective)
        fetched = 2 * portion.counts.fetched_keys * language.hidden_size / self.tp
        return kept + Kept(fetched, rows * self.ways * language.num_attention_heads / self.tp)

    def _layer(
        self, rows: float, widths: tuple[int, int], branches: int, hidden_copies: int, is_selective: bool
    ) -> Kept:
        """Return what any layer keeps.

        Args:
            rows: rows of the residual stream on this rank.
            widths: of the residual stream and of the MLP's hidden layer.
            branches: outputs of branches that are kept.
            hidden_copies: values kept per hidden value.
            is_selective: whether the LayerNorms' outputs are made again.
        """
        width, ffn_width = widths
        outside = rows * ((2 if is_selective else 4) + branches) * width
        inside = rows * self.ways / self.tp * (4 * width + hidden_copies * ffn_width)
        return Kept(outside + inside, 0 if is_selective else 4 * rows)
