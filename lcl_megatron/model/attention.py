"""Core attention on ``F.scaled_dot_product_attention``: the ``torch`` backend's, on CPU and on any GPU.

megatron-core's own ``DotProductAttention`` builds the whole (T, T) matrix and refuses packed sequences.

Shape letters: T tokens of all packed documents, A heads on this rank, D head width, B rows, S positions of a row. Keys
and values may have more tokens than queries (see ``PackedSequences.exchange``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from lcl_megatron.data.batch import AttentionRuns

KeyExchange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes keys and values (T, A, D) of the positions that this rank holds; returns those that its queries attend to."""


@dataclass
class PackedSequences(PackedSeqParams):
    """Sequences that lie one behind the other in rows of equal length; no sequence crosses the end of a row."""

    row_length: int = 0
    """Positions of a row. T may exceed a whole number of rows by a few positions of padding."""
    one_per_row: bool = False
    """Every row is one sequence (images), so that rows form a plain batch without a mask."""
    block_mask: Tensor | None = None
    """(B, 1, S, S) bool, made by the first layer that needs it and used by all."""
    exchange: KeyExchange | None = None
    """Fetches keys and values that other ranks hold; None = queries attend to what is here. With it, attention is
    causal from the bottom right of each sequence: its last query sees all of its keys."""
    lengths: Sequence[tuple[int, int]] | None = None
    """Queries and keys of each sequence, on the host; None = as ``cu_seqlens_q`` says, keys like queries."""

    @classmethod
    def of(cls, cu_seqlens: Tensor, max_seqlen: int, row_length: int, one_per_row: bool = False) -> PackedSequences:
        """Describe packed sequences.

        Args:
            cu_seqlens: (sequences + 1,) int32, borders; the last entry is T.
            max_seqlen: length of the longest sequence.
            row_length: positions of a row.
            one_per_row: True when every row is one sequence.
        """
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            row_length=row_length,
            one_per_row=one_per_row,
        )

    @classmethod
    def of_runs(cls, runs: AttentionRuns, row_length: int, exchange: KeyExchange) -> PackedSequences:
        """Describe runs of queries whose keys are fetched from several ranks.

        Args:
            runs: queries and keys.
            row_length: positions of a row that this rank holds.
            exchange: fetches the keys.
        """
        return cls(
            qkv_format="thd",
            cu_seqlens_q=runs.query_borders,
            cu_seqlens_kv=runs.key_borders,
            max_seqlen_q=max(queries for queries, _ in runs.lengths),
            max_seqlen_kv=max(keys for _, keys in runs.lengths),
            row_length=row_length,
            exchange=exchange,
            lengths=runs.lengths,
        )


class TorchCoreAttention(MegatronModule):
    """Attention confined to each packed sequence, causal (language) or full (vision).

    Takes and returns what megatron-core's ``SelfAttention`` expects of ``core_attention`` in THD format.
    Parallel: each tensor-parallel rank computes its own heads; under context parallelism
    ``packed_seq_params.exchange`` fetches keys and values from the cp group.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
            raise ValueError(f"attention mask type {attn_mask_type}; expected causal or no_mask")
        self.causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_TAD: Tensor,
        key_TAD: Tensor,
        value_TAD: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSequences,
        **unused: Any,
    ) -> Tensor:
        """Attend within each packed sequence.

        Args:
            query_TAD: (T, A, D); key and value alike.
            attention_mask: must be None; the borders say everything.
            packed_seq_params: borders of the sequences.

        Returns:
            (T, A * D).
        """
        assert attention_mask is None, "packed attention takes its mask from packed_seq_params"
        sequences = packed_seq_params
        if sequences.exchange is not None:
            key_TAD, value_TAD = sequences.exchange(key_TAD, value_TAD)
            assert sequences.lengths is not None
            output_TAD = self._attend_each(query_TAD, key_TAD, value_TAD, sequences.lengths)
        elif sequences.one_per_row:
            output_TAD = self._attend_rows(query_TAD, key_TAD, value_TAD, sequences.row_length, mask_B1SS=None)
        elif query_TAD.is_cuda:
            if sequences.block_mask is None:
                sequences.block_mask = _block_mask(sequences, query_TAD.shape[0], query_TAD.device, self.causal)
            output_TAD = self._attend_rows(query_TAD, key_TAD, value_TAD, sequences.row_length, sequences.block_mask)
        else:
            # On CPU this does the least work, and reading the borders waits for nothing.
            lengths = [(length, length) for length in sequences.cu_seqlens_q.diff().tolist()]
            output_TAD = self._attend_each(query_TAD, key_TAD, value_TAD, lengths)
        return output_TAD.flatten(1)

    def _attend_rows(
        self, query_TAD: Tensor, key_TAD: Tensor, value_TAD: Tensor, row_length: int, mask_B1SS: Tensor | None
    ) -> Tensor:
        """Run all rows as one batch; padding behind the last whole row gets zeros."""
        rows = query_TAD.shape[0] // row_length
        padding = query_TAD.shape[0] - rows * row_length
        query, key, value = (
            x[: rows * row_length].unflatten(0, (rows, row_length)).transpose(1, 2)
            for x in (query_TAD, key_TAD, value_TAD)
        )
        causal = self.causal and mask_B1SS is None
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=mask_B1SS, is_causal=causal, scale=self.softmax_scale
        )
        output_TAD = output.transpose(1, 2).flatten(0, 1)
        return torch.nn.functional.pad(output_TAD, (0, 0, 0, 0, 0, padding)) if padding else output_TAD

    def _attend_each(
        self, query_TAD: Tensor, key_TAD: Tensor, value_TAD: Tensor, lengths: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Run each sequence alone; ``lengths`` are its queries and keys."""
        queries, keys = [list(column) for column in zip(*lengths, strict=True)]
        outputs = []
        for query, key, value in zip(query_TAD.split(queries), key_TAD.split(keys), value_TAD.split(keys), strict=True):
            query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
            is_square = query.shape[2] == key.shape[2]
            output = scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=causal_lower_right(query.shape[2], key.shape[2]) if self.causal and not is_square else None,
                is_causal=self.causal and is_square,
                scale=self.softmax_scale,
            )
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)


def _block_mask(sequences: PackedSequences, num_tokens: int, device: torch.device, causal: bool) -> Tensor:
    """Return the (B, 1, S, S) bool mask of attention within each sequence, made on the device without waiting."""
    positions_T = torch.arange(num_tokens, device=device, dtype=torch.int32)
    sequence_T = torch.searchsorted(sequences.cu_seqlens_q, positions_T, right=True)
    sequence_BS = sequence_T.unflatten(0, (-1, sequences.row_length))
    mask_BSS = sequence_BS[:, :, None] == sequence_BS[:, None, :]
    if causal:
        mask_BSS = mask_BSS.tril()
    return mask_BSS[:, None]
