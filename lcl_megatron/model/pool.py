"""From patch features to latents: one attention pool makes the global latent and the language model's image tokens.

Shape letters: N images, P patches = latents L, C vision width, H language width = contrastive width D, A heads.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional as F

from lcl_megatron.config import LanguageConfig, PoolConfig, VisionConfig
from lcl_megatron.model.specs import Runtime, vision_transformer_config


class AttentionPool(MegatronModule):
    """Multi-head attention of one learned query over the patches.

        q = W_q LN_q(query) + b_q,   k_p = W_k LN_k(x_p) + b_k,   v_p = W_v LN_v(x_p) + b_v
        pooled = W_o sum_p softmax_p(q . k_p / sqrt(d)) v_p          (global latent, contrasted)
        latent_p = W_o v_p                                          (p-th image token of the language model)

    As in the released code: the value and output projections are shared by both.
    Parallel: replicated over tp; every rank computes the same from the gathered patches.
    """

    def __init__(self, vision: VisionConfig, pool: PoolConfig, language: LanguageConfig, runtime: Runtime) -> None:
        super().__init__(config=vision_transformer_config(vision, runtime))
        self.num_heads = pool.num_attention_heads
        dtype, eps = runtime.params_dtype, vision.layernorm_epsilon
        width, hidden = vision.hidden_size, language.hidden_size
        self.query = nn.Parameter(torch.empty(width, dtype=dtype))
        self.query_layernorm = nn.LayerNorm(width, eps=eps, dtype=dtype)
        self.key_layernorm = nn.LayerNorm(width, eps=eps, dtype=dtype)
        self.value_layernorm = nn.LayerNorm(width, eps=eps, dtype=dtype)
        self.query_projection = nn.Linear(width, hidden, dtype=dtype)
        self.key_projection = nn.Linear(width, hidden, dtype=dtype)
        self.value_projection = nn.Linear(width, hidden, dtype=dtype)
        self.output_projection = nn.Linear(hidden, hidden, bias=False, dtype=dtype)

    def forward(self, features_NPC: Tensor) -> tuple[Tensor, Tensor]:
        """Return image latents (N, L, H) and pooled latents (N, D) of patch features (N, P, C)."""
        values_NPH = self.value_projection(self.value_layernorm(features_NPC))
        keys_NPH = self.key_projection(self.key_layernorm(features_NPC))
        query_H = self.query_projection(self.query_layernorm(self.query))
        query_N1H = query_H.expand(features_NPC.shape[0], 1, -1)
        heads_first = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query_N1H, keys_NPH, values_NPH)]
        attended_NA1d = F.scaled_dot_product_attention(*heads_first)
        pooled_ND = self.output_projection(attended_NA1d.flatten(1))
        return self.output_projection(values_NPH), pooled_ND
