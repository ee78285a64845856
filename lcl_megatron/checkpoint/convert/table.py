"""Tables of names between this model and a stock library's, read in both directions.

A rule says for one of our parameters which tensors of the other library hold it, and in which layout. All rules only
copy entries, so that they serve weights of any dtype and are bit-exact both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lcl_megatron.checkpoint.manifest import CheckpointError

Table = tuple["Rule", ...]


@dataclass(frozen=True)
class Rule:
    """One of our parameters and where another library keeps it."""

    ours: str
    """Name in ``LCLModel``."""
    theirs: tuple[str, ...]
    """Names in the other library."""
    to_theirs: Callable[[Tensor], Sequence[Tensor]] = lambda tensor: [tensor]
    """From our layout to the tensors of ``theirs``."""
    to_ours: Callable[[Sequence[Tensor]], Tensor] = lambda tensors: tensors[0]
    """From the tensors of ``theirs`` to our layout."""


@dataclass(frozen=True)
class LayerNames:
    """What a stock library calls the parts of a pre-norm transformer layer."""

    attention_norm: str
    """LayerNorm before attention."""
    qkv: tuple[str, ...]
    """One linear layer with rows [q; k; v], or three."""
    attention_output: str
    """Linear layer behind attention."""
    mlp_norm: str
    """LayerNorm before the MLP."""
    fc1: str
    """First linear layer of the MLP."""
    fc2: str
    """Second linear layer of the MLP."""
    layer_scales: tuple[str, str] | None = None
    """LayerScale of attention and of the MLP; None = the library has none."""


def interleave_qkv(tensor: Tensor, num_heads: int) -> Tensor:
    """Turn rows [q of all heads; k; v] into megatron-core's [head][q, k, v]; weight or bias, 3 C rows."""
    return tensor.unflatten(0, (3, num_heads, -1)).transpose(0, 1).reshape(tensor.shape)


def split_qkv(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo ``interleave_qkv``."""
    return tensor.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).reshape(tensor.shape)


def export_tensors(table: Table, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the other library's tensors of a state under our names; what the table does not name is left out.

    Raises:
        CheckpointError: the state lacks a parameter of the table.
    """
    if missing := [rule.ours for rule in table if rule.ours not in state]:
        raise CheckpointError(f"the model lacks {', '.join(missing)}; its configuration says that it has them")
    exported = {}
    for rule in table:
        for name, tensor in zip(rule.theirs, rule.to_theirs(state[rule.ours]), strict=True):
            # A copy of its own: safetensors refuses tensors that share memory.
            exported[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return exported


def import_tensors(table: Table, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return another library's tensors under our names.

    Raises:
        CheckpointError: the names are not exactly those of the table, so that a weight would be lost or stay random.
    """
    expected = {name for rule in table for name in rule.theirs}
    missing, unknown = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or unknown:
        raise CheckpointError(
            f"the tensors are not those of the configured model: absent {_listed(missing)}, "
            f"unknown {_listed(unknown)}; compare depth, class token and LayerScale with the configuration"
        )
    return {rule.ours: rule.to_ours([tensors[name] for name in rule.theirs]).contiguous() for rule in table}


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def under(table: Table, prefix: str) -> Table:
    """Return the table of a library that keeps the same tensors under a prefix."""
    return tuple(replace(rule, theirs=tuple(prefix + name for name in rule.theirs)) for rule in table)


def affine(ours: str, theirs: str) -> Iterator[Rule]:
    """Yield the rules of weight and bias."""
    for leaf in ("weight", "bias"):
        yield Rule(f"{ours}.{leaf}", (f"{theirs}.{leaf}",))


def layer_rules(ours: str, theirs: str, num_layers: int, num_heads: int, names: LayerNames) -> Iterator[Rule]:
    """Yield the rules of a stack of layers.

    Args:
        ours: our name of the stack (``vision.layers``).
        theirs: the library's (``blocks``).
        num_layers: number of layers.
        num_heads: attention heads; our rows of ``linear_qkv`` are [head][q, k, v].
        names: what the library calls the parts.
    """
    for index in range(num_layers):
        here, there = f"{ours}.{index}", f"{theirs}.{index}"
        yield from affine(f"{here}.input_layernorm", f"{there}.{names.attention_norm}")
        yield from affine(f"{here}.self_attention.linear_proj", f"{there}.{names.attention_output}")
        yield from affine(f"{here}.pre_mlp_layernorm", f"{there}.{names.mlp_norm}")
        yield from affine(f"{here}.mlp.linear_fc1", f"{there}.{names.fc1}")
        yield from affine(f"{here}.mlp.linear_fc2", f"{there}.{names.fc2}")
        for leaf in ("weight", "bias"):
            yield Rule(
                f"{here}.self_attention.linear_qkv.{leaf}",
                tuple(f"{there}.{part}.{leaf}" for part in names.qkv),
                lambda tensor: split_qkv(tensor, num_heads).chunk(len(names.qkv)),
                lambda tensors: interleave_qkv(torch.cat(list(tensors)), num_heads),
            )
        if names.layer_scales is not None:
            attention, mlp = names.layer_scales
            yield Rule(f"{here}.self_attn_bda.gamma", (f"{there}.{attention}",))
            yield Rule(f"{here}.mlp_bda.gamma", (f"{there}.{mlp}",))
