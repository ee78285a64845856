"""LayerScale and drop-path on a residual branch; enters megatron-core's layers through their ``*_bda`` slots.

    x <- x + keep * gamma * (f(x) + bias)

LayerScale: Touvron et al. (arXiv:2103.17239). megatron-core has neither.

Shape letters: N image slots, M of them kept, P tokens of one image, C width, T = N * P flattened tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from lcl_megatron.model.attention import PackedSequences
from lcl_megatron.model.parts import mark

BiasDropoutAdd = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


@dataclass(frozen=True)
class KeptImages:
    """The images of a micro-batch that a residual branch is computed for."""

    images_M: Tensor
    """(M,) int64, ascending."""
    num_images: int
    """N, of the micro-batch."""
    sequences: PackedSequences
    """Borders of M images."""

    @property
    def scale(self) -> float:
        """N / M, which makes up for the images left out."""
        return self.num_images / self.images_M.shape[0]


Drop = Tensor | KeptImages | None
"""How a branch is dropped: what each token's branch is multiplied by, (T, 1, 1); or for which images it is computed;
or not at all."""


class _PutImages(torch.autograd.Function):
    """Put images back among all others.

    torch's ``index_copy`` keeps what it puts, only to learn its shape again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, all_NPC: Tensor, images_M: Tensor, some_MPC: Tensor) -> Tensor:
        ctx.save_for_backward(images_M)
        return all_NPC.index_copy(0, images_M, some_MPC)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        (images_M,) = ctx.saved_tensors
        return gradients[0].index_fill(0, images_M, 0.0), None, gradients[0].index_select(0, images_M)


class ResidualBranch(nn.Module):
    """Add a branch's output to the residual stream.

    Parallel: ``gamma`` acts on this rank's part of the sequence, so under sequence parallelism its gradient is summed
    over the tensor-parallel ranks with those of the LayerNorms.
    """

    def __init__(self, config: TransformerConfig, layer_scale_init: float | None) -> None:
        super().__init__()
        self.keep: Tensor | float | None = None
        self.register_parameter("gamma", None)
        if layer_scale_init is not None:
            self.gamma = nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype))
            mark(self.gamma, sequence_parallel=config.sequence_parallel)

    def forward(self, training: bool, fused: bool) -> BiasDropoutAdd:
        """Return the function that megatron-core calls with (output, bias), residual and dropout probability."""
        return self._add

    def _add(self, output_with_bias: tuple[Tensor, Tensor | None], residual_T1C: Tensor, dropout: float) -> Tensor:
        output_T1C, bias_C = output_with_bias
        if bias_C is not None:
            output_T1C = output_T1C + bias_C
        if self.gamma is not None:
            output_T1C = output_T1C * self.gamma
        if self.keep is not None:
            keep = self.keep
            output_T1C = output_T1C * (keep.to(output_T1C.dtype) if isinstance(keep, Tensor) else keep)
        return residual_T1C + output_T1C


class VisionLayer(TransformerLayer):
    """A transformer layer whose two residual branches can be left out per image."""

    def forward(
        self, hidden_states: Tensor, *, drop: tuple[Drop, Drop], packed_seq_params: PackedSequences, **kwargs: Any
    ) -> Any:
        """Run the layer.

        Args:
            hidden_states: (T, 1, C), T tokens of all images, or this rank's part of them.
            drop: how the attention and the MLP branch are dropped. Passed at every call, so that a recomputed
                forward pass drops the same again.
            packed_seq_params: borders of all images.
            kwargs: as for megatron-core's layer.

        Returns:
            Hidden states (T, 1, C) and megatron-core's unused context.
        """

        def attend(hidden_T1C: Tensor, sequences: PackedSequences) -> Tensor:
            return self._forward_attention(hidden_T1C, packed_seq_params=sequences, **kwargs)[0]

        def transform(hidden_T1C: Tensor, sequences: PackedSequences) -> Tensor:
            return self._forward_mlp(hidden_T1C)

        hidden_states = _run_branch(attend, self.self_attn_bda, hidden_states, packed_seq_params, drop[0])
        return _run_branch(transform, self.mlp_bda, hidden_states, packed_seq_params, drop[1]), None


def _run_branch(
    branch: Callable[[Tensor, PackedSequences], Tensor],
    residual: ResidualBranch,
    hidden_T1C: Tensor,
    sequences: PackedSequences,
    drop: Drop,
) -> Tensor:
    """Return the residual stream behind a branch, which adds itself to what it is given."""
    if not isinstance(drop, KeptImages):
        residual.keep = drop
        return branch(hidden_T1C, sequences)
    residual.keep = drop.scale
    all_NPC = hidden_T1C[:, 0].unflatten(0, (drop.num_images, -1))
    kept_T1C = branch(all_NPC.index_select(0, drop.images_M).flatten(0, 1)[:, None], drop.sequences)
    kept_MPC = kept_T1C[:, 0].unflatten(0, (drop.images_M.shape[0], -1))
    return _PutImages.apply(all_NPC, drop.images_M, kept_MPC).flatten(0, 1)[:, None]
