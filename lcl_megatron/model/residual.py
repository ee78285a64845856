"""LayerScale and drop-path on a residual branch; enters megatron-core's layers through their ``*_bda`` slots.

    x <- x + keep * gamma * (f(x) + bias)

LayerScale: Touvron et al. (arXiv:2103.17239). megatron-core has neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from lcl_megatron.model.parts import mark

BiasDropoutAdd = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class ResidualBranch(nn.Module):
    """Add a branch's output to the residual stream.

    Parallel: ``gamma`` acts on this rank's part of the sequence, so under sequence parallelism its gradient is summed
    over the tensor-parallel ranks with those of the LayerNorms.
    """

    def __init__(self, config: TransformerConfig, layer_scale_init: float | None) -> None:
        super().__init__()
        self.keep_T11: Tensor | None = None
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
        if self.keep_T11 is not None:
            output_T1C = output_T1C * self.keep_T11.to(output_T1C.dtype)
        return residual_T1C + output_T1C


class VisionLayer(TransformerLayer):
    """A transformer layer whose two residual branches can be switched off per image."""

    def forward(self, hidden_states: Tensor, *, keep: tuple[Tensor | None, Tensor | None], **kwargs: Any) -> Any:
        """Run the layer.

        Args:
            hidden_states: (T, 1, C), T tokens of all images, or this rank's part of them.
            keep: what the attention and the MLP branch are multiplied by, (T, 1, 1) each, or None. Passed at
                every call, so that a recomputed forward pass sets the same values again.
            kwargs: as for megatron-core's layer.

        Returns:
            Hidden states (T, 1, C) and megatron-core's unused context.
        """
        self.self_attn_bda.keep_T11, self.mlp_bda.keep_T11 = keep
        return super().forward(hidden_states, **kwargs)
