"""What the model is: vision tower, attention pool, language model, losses.

These sections alone decide the architecture, and so which checkpoints fit which run.
The ``paper`` and ``official`` recipes are values of these fields (see ``presets/``), not branches in the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lcl_megatron.config.errors import ConfigError, require, require_positive

RecomputeGranularity = Literal["none", "selective", "full"]
"""Values of ``vision.recompute_granularity`` and ``language.recompute_granularity``."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The Vision Transformer that is trained from scratch; it is the product of a run."""

    image_size: int = 224
    """Side of the square input image, in pixels."""
    patch_size: int = 16
    """Side of a square patch, in pixels; must divide ``image_size``."""
    num_layers: int = 12
    """Number of transformer layers."""
    hidden_size: int = 768
    """Width C of the patch features."""
    ffn_hidden_size: int = 3072
    """Width of the MLP's hidden layer."""
    num_attention_heads: int = 12
    """Attention heads; must divide ``hidden_size``."""
    class_token: bool = True
    """Prepend a learned class token. It attends with the patches and is dropped at the end, as in the released code."""
    layer_scale_init: float | None = 0.1
    """Initial value of LayerScale on both residual branches; None = no LayerScale (official recipe)."""
    drop_path_rate: float = 0.2
    """Stochastic depth of the last layer; rises linearly from 0 at the first layer. 0 = off."""
    drop_path_mode: Literal["mask", "subset"] = "mask"
    """How branches are dropped: ``mask`` = computed and multiplied by 0, each image for itself, whatever the layout;
    ``subset`` = computed for the kept images only (DINOv2), round((1 - rate) x images) of a micro-batch: less time and
    memory, but what is dropped depends on which images share a micro-batch. Not with ``sequence_parallel``."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every LayerNorm of the tower."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """MLP activation: erf-GELU, or x * sigmoid(1.702 x), with which OpenAI's CLIP weights were trained."""
    recompute_granularity: RecomputeGranularity = "none"
    """Activations that the backward pass computes again instead of keeping them: ``none``; ``selective`` = outputs of
    LayerNorm and of the MLP activation, a third of a layer's memory for next to no time; ``full`` = all of a layer
    but its input, for one more forward pass. Gradients do not change."""
    recompute_num_layers: int = 0
    """Layers of each pipeline stage that ``full`` recomputes, from the stage's first; 0 = all."""

    def __post_init__(self) -> None:
        require(
            self.patch_size > 0 and self.image_size % self.patch_size == 0,
            f"vision.image_size = {self.image_size} is not a multiple of vision.patch_size = {self.patch_size}; "
            "choose an image size that the patch size divides",
        )
        require_positive(self, "vision", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        require(
            self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads == 0,
            f"vision.hidden_size = {self.hidden_size} is not a multiple of "
            f"vision.num_attention_heads = {self.num_attention_heads}",
        )
        require(
            0.0 <= self.drop_path_rate < 1.0,
            f"vision.drop_path_rate = {self.drop_path_rate} is outside [0, 1); it is the share of dropped branches",
        )
        _check_recompute(self, "vision")
        require(
            self.layer_scale_init is None or self.layer_scale_init > 0,
            f"vision.layer_scale_init = {self.layer_scale_init}; give a positive number, or None for no LayerScale",
        )

    @property
    def num_patches(self) -> int:
        """Number of patches P of one image; also the number of latents L that the language model reads."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Sequence length of one image inside the tower: patches and, if there is one, the class token."""
        return self.num_patches + int(self.class_token)


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Attention pool with one learned query; its value and output projections also make the LM's image latents."""

    num_attention_heads: int = 12
    """Heads of the pool; must divide the language model's ``hidden_size``, which is the pool's output width."""

    def __post_init__(self) -> None:
        require_positive(self, "pool", "num_attention_heads")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """The causal language model that reads text and image latents."""

    num_layers: int = 12
    """Number of transformer layers."""
    hidden_size: int = 768
    """Width H of the hidden states, of the image latents and of the contrastive features."""
    ffn_hidden_size: int = 3072
    """Width of the MLP's hidden layer."""
    num_attention_heads: int = 12
    """Attention heads; must divide ``hidden_size``."""
    vocab_size: int = 0
    """Number of token ids. 0 = the size of the corpus's tokenizer, filled in when the corpus is opened."""
    max_position_embeddings: int = 2048
    """Learned positions; a document may not be longer. Positions restart at every document."""
    activation: Literal["relu", "gelu"] = "relu"
    """MLP activation: ReLU (OPT) or erf-GELU (official)."""
    tie_embeddings: bool = True
    """Use the token embedding as output projection (OPT); False = a separate matrix (official)."""
    context_bias: bool = True
    """Bias in the linear projection of the context features; False in the official recipe."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every LayerNorm of the language model."""
    make_vocab_size_divisible_by: int = 128
    """Rows of the embedding are padded to a multiple of this; padded ids are never predicted."""
    recompute_granularity: RecomputeGranularity = "none"
    """Activations that the backward pass computes again instead of keeping them: ``none``; ``selective`` = outputs of
    LayerNorm and, for GELU, of the MLP activation (what ReLU keeps is needed by the next product too); ``full`` = all
    of a layer but its input, for one more forward pass. Gradients do not change."""
    recompute_num_layers: int = 0
    """Layers of each pipeline stage that ``full`` recomputes, from the stage's first; 0 = all."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "language",
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "max_position_embeddings",
            "make_vocab_size_divisible_by",
        )
        require(
            self.vocab_size >= 0,
            f"language.vocab_size = {self.vocab_size}; give a number of token ids, or 0 to take the corpus's",
        )
        require(
            self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads == 0,
            f"language.hidden_size = {self.hidden_size} is not a multiple of "
            f"language.num_attention_heads = {self.num_attention_heads}",
        )
        _check_recompute(self, "language")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix: ``vocab_size`` rounded up; the same for every tensor-parallel size."""
        if self.vocab_size <= 0:
            raise ConfigError("language.vocab_size is not set; open the corpus first or give --language.vocab-size")
        step = self.make_vocab_size_divisible_by
        return (self.vocab_size + step - 1) // step * step


def _check_recompute(tower: VisionConfig | LanguageConfig, section: str) -> None:
    granularity, layers = tower.recompute_granularity, tower.recompute_num_layers
    require(
        0 <= layers <= tower.num_layers,
        f"{section}.recompute_num_layers = {layers}; give 1 to {section}.num_layers = {tower.num_layers}, or 0 for all",
    )
    require(
        layers == 0 or granularity == "full",
        f"{section}.recompute_num_layers = {layers} with {section}.recompute_granularity = {granularity!r}: only "
        f"'full' counts layers; set --{section}.recompute-granularity full, or leave the number out",
    )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """L = generation_loss_weight * L_gen + contrastive_loss_weight * L_con + latent_regression_loss_weight * L_reg."""

    contrastive_loss_weight: float = 0.1
    """Weight lambda of the contrastive loss. 0 = generation only."""
    generation_loss_weight: float = 1.0
    """Weight of the next-token loss. 0 = contrast only."""
    latent_regression_loss_weight: float = 0.0
    """Weight of the regression of image latents from what precedes them (Emu's objective, a baseline that collapses).
    0 = off, at no cost. Needs ``pipeline_model_parallel_size`` and ``context_parallel_size`` 1."""
    contrastive_scope: Literal["micro_batch", "global"] = "micro_batch"
    """Which images are each other's negatives: those of one micro-batch on all data-parallel ranks, or those of the
    whole global batch. With more than one micro-batch ``global`` runs the forward pass twice, up to 4/3 of the time;
    with one, both are the same."""
    contrastive_keep_graphs: bool = False
    """``global`` scope in one pass: keep the activations of all micro-batches until the loss is known, instead of the
    second forward pass. Costs their memory; needs ``pipeline_model_parallel_size`` 1."""
    mask_same_image: bool = False
    """Do not take pairs with the same image (equal source files) for each other's negatives. False = as in the paper:
    all other pairs are negatives."""
    mask_same_context: bool = False
    """Do not take pairs with the same context (equal text and images before ``<BoI>`` in the document, or none) for
    each other's negatives. False = as in the paper."""
    contrastive_tile_size: int = 4096
    """Columns of the similarity matrix that exist at one time, in images."""
    logit_scale_init: float = 2.6592600369327783
    """Initial log of the inverse temperature: ln(1 / 0.07)."""
    logit_scale_max: float = 4.605170185988092
    """Upper clamp of ``logit_scale`` after each step: ln(100). The lower clamp is 0."""
    cross_entropy_chunk_size: int = 4096
    """Text targets whose logits exist at one time, in tokens."""

    def __post_init__(self) -> None:
        weights = (self.contrastive_loss_weight, self.generation_loss_weight, self.latent_regression_loss_weight)
        require(
            min(weights) >= 0 and sum(weights) > 0,
            "loss.contrastive_loss_weight, loss.generation_loss_weight, loss.latent_regression_loss_weight = "
            f"{weights}; weights must not be negative, and at least one must be positive",
        )
        require_positive(self, "loss", "contrastive_tile_size", "cross_entropy_chunk_size")
        require(
            0 <= self.logit_scale_init <= self.logit_scale_max,
            f"loss.logit_scale_init = {self.logit_scale_init} is outside "
            f"[0, loss.logit_scale_max = {self.logit_scale_max}], to which it is clamped after each step",
        )
