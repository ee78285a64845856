"""Core attention of the ``transformer_engine`` backend, also where keys are fetched from several ranks.

TransformerEngine's own context parallelism cuts every packed document into 2 x cp equal chunks, for which documents
would have to be padded: rows, and so what is trained, would depend on the layout. Here keys and values are fetched
first (``PackedSequences.exchange``). What is left is attention of runs of queries to longer runs of keys, causal from
the bottom right, which its flash and cuDNN kernels do without padding; for these, context parallelism is off.
"""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from torch import Tensor

from lcl_megatron.model.attention import PackedSequences


class FetchingTEAttention(TEDotProductAttention):
    """megatron-core's ``TEDotProductAttention``; with ``packed_seq_params.exchange``, TransformerEngine's of runs.

    Parallel: as ``TorchCoreAttention``.
    """

    def forward(
        self,
        query_TAD: Tensor,
        key_TAD: Tensor,
        value_TAD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any,
        packed_seq_params: PackedSequences,
        **kwargs: Any,
    ) -> Tensor:
        """Attend within each packed sequence.

        Args:
            query_TAD: (T, A, D); key and value alike.
            attention_mask: None; the borders say everything.
            attn_mask_type: causal or none, read where nothing is fetched; fetched keys are for causal attention only.
            packed_seq_params: borders of the sequences.
            kwargs: of megatron-core's, for where nothing is fetched.

        Returns:
            (T, A * D).
        """
        sequences = packed_seq_params
        if sequences.exchange is None:
            return super().forward(
                query_TAD,
                key_TAD,
                value_TAD,
                attention_mask,
                attn_mask_type,
                packed_seq_params=sequences,
                **kwargs,
            )
        key_TAD, value_TAD = sequences.exchange(key_TAD, value_TAD)
        # TransformerEngine's own: megatron-core 0.16.1 has no name for this mask.
        return super(TEDotProductAttention, self).forward(
            query_TAD,
            key_TAD,
            value_TAD,
            attention_mask,
            qkv_format="thd",
            cu_seqlens_q=sequences.cu_seqlens_q,
            cu_seqlens_kv=sequences.cu_seqlens_kv,
            max_seqlen_q=sequences.max_seqlen_q,
            max_seqlen_kv=sequences.max_seqlen_kv,
            attn_mask_type="padding_causal_bottom_right",
        )
