"""The language model: an OPT-style causal transformer over text embeddings and image latents.

Shape letters: B rows, S positions, T = B * S flattened positions (of these, under context parallelism, the ones that
this rank holds), H width, N image slots, L latents per image, K text targets, V vocabulary (this rank's part under
tensor parallelism), D contrastive width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lcl_megatron.config import LanguageConfig
from lcl_megatron.model.layers import LayerStack
from lcl_megatron.model.parts import mark, present
from lcl_megatron.model.row_edge import RowEdge, WholeRows
from lcl_megatron.model.specs import Runtime, language_layer_spec, language_transformer_config

if TYPE_CHECKING:
    from lcl_megatron.data.batch import PackedBatch


TIED_WEIGHT = "language.embedding.word_embeddings.weight"
"""Name of the token embedding in the whole model; both copies of a tied matrix are saved and drawn under it."""


class TokenEmbedding(MegatronModule):
    """Token and learned position embeddings, with image latents put in place of the placeholders.

    Parallel: the token table is split over tp by vocabulary; positions are replicated. The result is whole on every
    tp rank before the sequence edge splits it; each cp rank embeds the positions that it holds.
    """

    def __init__(self, language: LanguageConfig, runtime: Runtime) -> None:
        super().__init__(config=language_transformer_config(language, runtime))
        self.rows = runtime.rows
        self.word_embeddings = VocabParallelEmbedding(
            language.padded_vocab_size,
            language.hidden_size,
            init_method=nn.init.normal_,
            config=self.config,
            tp_group=runtime.collection.tp,
        )
        self.position_embeddings = nn.Parameter(
            torch.empty(language.max_position_embeddings, language.hidden_size, dtype=runtime.params_dtype)
        )

    def forward(self, batch: PackedBatch, latents_NLH: Tensor) -> Tensor:
        """Return input embeddings (T, 1, H) of a micro-batch; positions are added to text and latents alike."""
        embeddings_TH = self.word_embeddings(self.rows.own(batch.tokens)).flatten(0, 1)
        embeddings_TH = place_latents(embeddings_TH, latents_NLH[: batch.num_images], batch.image_slots, self.rows)
        position_ids_T = self.rows.own(batch.position_ids).flatten()
        embeddings_TH = embeddings_TH + F.embedding(position_ids_T, self.position_embeddings)
        return embeddings_TH[:, None]


def place_latents(
    embeddings_TH: Tensor, latents_NLH: Tensor, image_slots: Tensor, rows: RowEdge | None = None
) -> Tensor:
    """Return the embeddings with each image's latents at ``image_slots[n], image_slots[n] + 1, ...``.

    Args:
        embeddings_TH: text embeddings.
        latents_NLH: latents of the real images; N may be 0, the result then still depends on them (with gradient 0).
        image_slots: (N,) int64, flat position of each image's first latent.
        rows: which positions are here; None = all.

    Raises:
        ValueError: the counts differ, so latents would land on the wrong images.
    """
    if latents_NLH.shape[0] != image_slots.shape[0]:
        raise ValueError(f"{latents_NLH.shape[0]} images have latents, {image_slots.shape[0]} have a place in the rows")
    offsets_L = torch.arange(latents_NLH.shape[1], device=image_slots.device)
    positions = (image_slots[:, None] + offsets_L).flatten()
    return (rows or WholeRows()).place(embeddings_TH, latents_NLH.flatten(0, 1).to(embeddings_TH.dtype), positions)


class LanguageHeads(MegatronModule):
    """Final LayerNorm and vocabulary projection for text targets; LayerNorm and projection for contexts.

    Parallel: the vocabulary projection is split over tp; the rest is replicated, on rows that every rank holds.
    """

    def __init__(self, language: LanguageConfig, runtime: Runtime, chunk_size: int) -> None:
        super().__init__(config=language_transformer_config(language, runtime))
        self.chunk_size = chunk_size
        hidden, eps, dtype = language.hidden_size, language.layernorm_epsilon, runtime.params_dtype
        tp_size = runtime.tensor_parallel_size
        rows = language.padded_vocab_size // tp_size
        first_row = rows * runtime.collection.tp.rank()
        self.padded_from = min(max(language.vocab_size - first_row, 0), rows)
        self.final_layernorm = nn.LayerNorm(hidden, eps=eps, dtype=dtype)
        self.context_layernorm = nn.LayerNorm(hidden, eps=eps, dtype=dtype)
        self.context_projection = nn.Linear(hidden, hidden, bias=language.context_bias, dtype=dtype)

    def logits(self, hidden_KH: Tensor, weight_VH: Tensor) -> Tensor:
        """Return logits (K, V) of this rank's part of the vocabulary; padded ids can not be predicted."""
        logits_KV = F.linear(hidden_KH, weight_VH).float()
        if self.padded_from < logits_KV.shape[1]:
            logits_KV[:, self.padded_from :] = torch.finfo(torch.float32).min
        return logits_KV

    def normalized(self, hidden_KH: Tensor) -> Tensor:
        """Return the input (K, H) of the vocabulary projection; backward sums its gradient over tp."""
        return copy_to_tensor_model_parallel_region(self.final_layernorm(hidden_KH))

    def token_losses(self, hidden_KH: Tensor, labels_K: Tensor, weight_VH: Tensor) -> Tensor:
        """Return the cross-entropy (K,) float32 of each target.

        Logits exist for one chunk at a time, in the forward pass and again in the backward pass.

        Args:
            hidden_KH: LM output at positions that have a target, K >= 1, whole on every rank.
            labels_K: int64 target ids.
            weight_VH: this rank's part of the output projection.
        """
        losses = [
            checkpoint(self._chunk_losses, hidden, labels, weight_VH, use_reentrant=False, preserve_rng_state=False)
            for hidden, labels in zip(
                self.normalized(hidden_KH).split(self.chunk_size), labels_K.split(self.chunk_size), strict=True
            )
        ]
        return torch.cat(losses)

    def _chunk_losses(self, hidden_KH: Tensor, labels_K: Tensor, weight_VH: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(self.logits(hidden_KH, weight_VH), labels_K)

    def context_features(self, hidden_NH: Tensor) -> Tensor:
        """Return context features (N, D) of the LM's outputs (N, H) at ``<BoI>``."""
        return self.context_projection(self.context_layernorm(hidden_NH))


class OutputProjection(MegatronModule):
    """The vocabulary projection as a matrix of its own: an untied one, or a later stage's copy of the tied one.

    Called, and not read as an attribute, because megatron-core gathers a module's parameters when the module is called.
    Parallel: split over tp by vocabulary.
    """

    def __init__(self, language: LanguageConfig, runtime: Runtime) -> None:
        super().__init__(config=language_transformer_config(language, runtime))
        self.tp_group = runtime.collection.tp
        self.tied = language.tie_embeddings
        rows = language.padded_vocab_size // runtime.tensor_parallel_size
        self.weight = nn.Parameter(torch.empty(rows, language.hidden_size, dtype=runtime.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
        mark(self.weight, shared=self.tied)

    def forward(self) -> Tensor:
        """Return this rank's part of the matrix, (V, H)."""
        return self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Return the matrix for a distributed checkpoint; a copy of the tied one is a replica of the embedding."""
        dp_cp_group = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
        name = f"{prefix}weight"
        sharded = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.weight,
            key=TIED_WEIGHT if self.tied else name,
            replica_id=(1, 0, dp_cp_group.rank()) if self.tied else None,
            allow_shape_mismatch=True,
            prepend_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=dp_cp_group,
        )
        return {name: sharded}


class LanguageModel(MegatronModule):
    """The parts of the language model that one pipeline stage holds; absent parts are None."""

    def __init__(
        self,
        language: LanguageConfig,
        runtime: Runtime,
        layers: range | None = None,
        has_embedding: bool = True,
        heads_chunk_size: int | None = 4096,
    ) -> None:
        super().__init__(config=language_transformer_config(language, runtime))
        self.edge = runtime.edge
        self.rows = runtime.rows
        self.language = language
        layers = range(language.num_layers) if layers is None else layers
        self.embedding = TokenEmbedding(language, runtime) if has_embedding else None
        spec = language_layer_spec(language, runtime)
        self.layers = LayerStack(self.config, spec, layers, runtime.collection, language)
        self.heads = LanguageHeads(language, runtime, heads_chunk_size) if heads_chunk_size else None
        self.output_projection = None
        if self.heads is not None and not (language.tie_embeddings and has_embedding):
            self.output_projection = OutputProjection(language, runtime)
        if language.tie_embeddings and has_embedding != (self.heads is not None):
            mark(self.vocabulary_weight, shared_embedding=True)

    @property
    def vocabulary_weight(self) -> nn.Parameter:
        """(V, H), this rank's part of the output projection; to look at between steps."""
        if self.output_projection is not None:
            return self.output_projection.weight
        return present(self.embedding).word_embeddings.weight

    def vocabulary_matrix(self) -> Tensor:
        """Return ``vocabulary_weight`` for use in a forward pass, after its update has been gathered."""
        return self.vocabulary_weight if self.output_projection is None else self.output_projection()

    def embed(self, batch: PackedBatch, latents_NLH: Tensor) -> Tensor:
        """Return this rank's rows of the input embeddings, (T, 1, H); takes the latents of all images, (N, L, H)."""
        return self.edge.scatter(present(self.embedding)(batch, latents_NLH))

    def decode(self, hidden_T1H: Tensor, batch: PackedBatch) -> Tensor:
        """Run this stage's layers on this rank's rows, (T, 1, H); attention stays within each document."""
        sequences = self.rows.sequences(batch)
        for _, layer in self.layers.items():
            hidden_T1H, _ = layer(hidden_T1H, attention_mask=None, packed_seq_params=sequences)
        return hidden_T1H

    def pick_rows(self, hidden_T1H: Tensor, positions_K: Tensor) -> Tensor:
        """Return rows (K, H) at flat positions on every tp rank; where another cp rank holds one, some other row."""
        return self.edge.pick_rows(hidden_T1H, self.rows.local(positions_K))
