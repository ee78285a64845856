"""The LCL model: images to latents, latents into the token sequence, next-token losses and contrast features out.

LCL (arXiv:2406.07543), section 3: a vision encoder, a causal language model, and two losses that tie them.

Shape letters: N image slots, L latents per image, C vision width, H language width, D contrastive width (= H),
T flattened positions, K text targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from lcl_megatron.config import RunConfig
from lcl_megatron.model.drop_path import DropPath
from lcl_megatron.model.language import LanguageModel
from lcl_megatron.model.line import HEADS, LANGUAGE_EMBED, POOL, Stage, whole_model
from lcl_megatron.model.parts import present
from lcl_megatron.model.pool import AttentionPool
from lcl_megatron.model.specs import Runtime, language_transformer_config, mark_split_weights
from lcl_megatron.model.vision import VisionTower

if TYPE_CHECKING:
    from lcl_megatron.data.batch import PackedBatch


@dataclass
class Activations:
    """What flows along the line of pieces; only what the next piece needs is set."""

    patches_T1C: Tensor | None = None
    """Patch features between vision pieces; this rank's rows under sequence parallelism, of the images that it encodes
    under context parallelism."""
    latents_NLH: Tensor | None = None
    """Image latents between the pool and the token embedding; to the heads where they are regressed. Of the images
    that this rank encodes."""
    pooled_ND: Tensor | None = None
    """Global image latents, from the pool to the heads; of the images that this rank encodes."""
    hidden_T1H: Tensor | None = None
    """Hidden states between language pieces; this rank's rows under sequence and context parallelism."""


@dataclass(frozen=True)
class LCLOutput:
    """What the losses read; whole and alike on every tensor-parallel and, but for token losses, context-parallel rank.

    Losses made of what is alike are computed by every context-parallel rank, and each passes the whole gradient back:
    what belongs to other ranks is taken out behind this interface, so that summing parameters' gradients over all
    context-parallel ranks counts nothing twice. That holds for ``logit_scale`` only as it is given here.
    """

    token_losses_K: Tensor
    """(K,) float32 next-token cross-entropy of each text target (under context parallelism, of this rank's targets);
    empty where only features were asked for."""
    pooled_ND: Tensor
    """(N, D) global latent of each image slot."""
    context_ND: Tensor
    """(N, D) the LM's output at the ``<BoI>`` before each image, normalised and projected."""
    logit_scale: Tensor
    """Scalar float32, log of the inverse temperature."""
    latent_errors_N: Tensor | None = None
    """(N,) float32, mean squared error of each image slot's latents; None while their regression is off, and where only
    features were asked for."""


class LCLModel(MegatronModule):
    """One pipeline stage of the model, or all of it. Absent parts are None and are passed through."""

    def __init__(self, config: RunConfig, runtime: Runtime, stage: Stage | None = None) -> None:
        super().__init__(config=language_transformer_config(config.language, runtime))
        self.run_config = config
        self.stage = stage = stage or whole_model(config.vision, config.language)
        self.vision = self.pool = self.language = None
        if stage.has_vision:
            self.vision = VisionTower(
                config.vision, runtime, stage.layers("vision"), stage.is_first, has_final_layernorm=stage.has(POOL)
            )
        if stage.has(POOL):
            self.pool = AttentionPool(config.vision, config.pool, config.language, runtime)
        if stage.has_language:
            chunk_size = config.loss.cross_entropy_chunk_size if stage.has(HEADS) else None
            self.language = LanguageModel(
                config.language, runtime, stage.layers("language"), stage.has(LANGUAGE_EMBED), chunk_size
            )
        self.register_parameter("logit_scale", None)
        if stage.has(HEADS):
            # One entry and not a scalar, so that weight decay's rule for 1-D parameters spares it; at least float32.
            dtype = torch.promote_types(runtime.params_dtype, torch.float32)
            self.logit_scale = nn.Parameter(torch.empty(1, dtype=dtype))
        mark_split_weights(self)

    def forward(
        self,
        batch: PackedBatch,
        activations: Activations | None = None,
        step: int = 0,
        features_only: bool = False,
    ) -> Activations | LCLOutput:
        """Run this stage's pieces.

        Args:
            batch: the micro-batch; pixels are read by the first stage only.
            activations: what the stage before sent; None on the first stage.
            step: optimizer step, seeds drop-path (in training mode).
            features_only: leave out the token losses, and with them the vocabulary projection.

        Returns:
            ``LCLOutput`` on the last stage, else the activations for the next stage.
        """
        state = activations or Activations()
        if self.vision is not None:
            state = self._see(batch, state, step)
        if self.language is not None:
            state = self._read(batch, state)
        return self._finish(batch, state, features_only) if self.stage.is_last else state

    def _see(self, batch: PackedBatch, state: Activations, step: int) -> Activations:
        """Run the stage's vision pieces."""
        vision = present(self.vision)
        patches_T1C = vision.embed(present(batch.images)) if self.stage.is_first else present(state.patches_T1C)
        patches_T1C = vision.encode(patches_T1C, batch.image_keys, self._drop_path(step))
        if self.pool is None:
            return Activations(patches_T1C=patches_T1C)
        latents_NLH, pooled_ND = self.pool(vision.finish(patches_T1C, batch.num_encoded))
        return Activations(latents_NLH=latents_NLH, pooled_ND=pooled_ND)

    def _read(self, batch: PackedBatch, state: Activations) -> Activations:
        """Run the stage's language pieces."""
        language = present(self.language)
        if self.stage.has(LANGUAGE_EMBED):
            latents_NLH = language.rows.gather_latents(present(state.latents_NLH), batch.num_image_slots)
            hidden_T1H = language.embed(batch, latents_NLH)
        else:
            hidden_T1H = present(state.hidden_T1H)
        hidden_T1H = language.decode(hidden_T1H, batch)
        regressed_NLH = state.latents_NLH if self._regresses_latents else None
        return Activations(latents_NLH=regressed_NLH, pooled_ND=state.pooled_ND, hidden_T1H=hidden_T1H)

    def _finish(self, batch: PackedBatch, state: Activations, features_only: bool) -> LCLOutput:
        """Compute token losses and context features."""
        language, hidden_T1H = present(self.language), present(state.hidden_T1H)
        rows, losses_K = language.rows, hidden_T1H.new_empty(0)
        if not features_only:
            losses_K = self._token_losses(batch, hidden_T1H)
        context_hidden_NH = language.pick_rows(hidden_T1H, batch.context_slots)
        context_ND = present(language.heads).context_features(context_hidden_NH)
        context_ND = rows.of_holders(context_ND, batch.context_slots)
        pooled_ND = rows.gather_pooled(present(state.pooled_ND), batch.num_image_slots)
        errors_N = self._latent_errors(batch, state) if self._regresses_latents and not features_only else None
        return LCLOutput(losses_K, pooled_ND, context_ND, rows.once(present(self.logit_scale)[0]), errors_N)

    def _token_losses(self, batch: PackedBatch, hidden_T1H: Tensor) -> Tensor:
        """Return the loss of each target, (K,) float32; a micro-batch without targets has one of weight 0."""
        language = present(self.language)
        has_targets = batch.label_positions.shape[0] > 0
        positions_K = batch.label_positions if has_targets else batch.label_positions.new_zeros(1)
        target_hidden_KH = language.pick_rows(hidden_T1H, positions_K)
        labels_K = batch.labels.flatten().index_select(0, positions_K)
        losses_K = present(language.heads).token_losses(target_hidden_KH, labels_K, language.vocabulary_matrix())
        return losses_K if has_targets else losses_K * 0.0

    @property
    def _regresses_latents(self) -> bool:
        return self.run_config.loss.latent_regression_loss_weight > 0

    def _latent_errors(self, batch: PackedBatch, state: Activations) -> Tensor:
        """Return how far each image's latents are from what the language model expected in their place, (N,) float32.

            error_n = 1 / (L H) sum_l || head(h[b_n + l]) - latent_{n,l} ||^2,    l = 0 .. L - 1

        b_n is the position of the image's ``<BoI>``, h the LM's output and ``head`` the context head: what has been
        read up to ``<BoI>`` foretells the first latent, what has been read up to a latent the next one. The gradient
        flows to both sides, prediction and latent, as in Eq. (2) of the paper: the encoder may make its latents easy
        to foretell, and does, by making them all alike.
        """
        language, latents_NLH = present(self.language), present(state.latents_NLH)
        num_latents = latents_NLH.shape[1]
        offsets_L = torch.arange(num_latents, device=batch.context_slots.device)
        positions = (batch.context_slots[:, None] + offsets_L).flatten()
        hidden = language.pick_rows(present(state.hidden_T1H), positions)
        predicted_NLH = present(language.heads).context_features(hidden).unflatten(0, (-1, num_latents))
        return (predicted_NLH.float() - latents_NLH.float()).square().mean(dim=(1, 2))

    def target_logits(self, batch: PackedBatch) -> Tensor:
        """Return logits (K, V) float32 of every text target; for inspection, needs the whole model."""
        state = self._read(batch, self._see(batch, Activations(), step=0))
        language = present(self.language)
        hidden_KH = language.pick_rows(present(state.hidden_T1H), batch.label_positions)
        heads = present(language.heads)
        return heads.logits(heads.normalized(hidden_KH), language.vocabulary_matrix())

    def _drop_path(self, step: int) -> DropPath | None:
        vision = self.run_config.vision
        if not self.training or vision.drop_path_rate == 0.0:
            return None
        return DropPath(vision.drop_path_rate, vision.num_layers, self.run_config.training.seed, step)

    def clamp_logit_scale(self) -> None:
        """Keep the temperature within [1 / exp(max), 1]; called after each optimizer step."""
        if self.logit_scale is not None:
            with torch.no_grad():
                self.logit_scale.clamp_(0.0, self.run_config.loss.logit_scale_max)
