"""Tables between the names of ``LCLModel`` and another library's: one entry for every parameter, both ways.

Every map is a permutation of entries, so it serves weights and gradients alike and is bit-exact both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class ConversionError(ValueError):
    """Weights that this model cannot hold as they are, or that another format cannot."""


@dataclass(frozen=True)
class Entry:
    """One parameter: its name here, its name or names there, and how its entries are laid out in each."""

    ours: str
    """Name in ``LCLModel``."""
    theirs: tuple[str, ...]
    """Name in the other library; several if it keeps in parts what is one tensor here."""
    join: Callable[[Sequence[Tensor]], Tensor] = lambda parts: parts[0]
    """From their tensors, in order, to ours."""
    split: Callable[[Tensor], Sequence[Tensor]] = lambda tensor: (tensor,)
    """From our tensor to theirs, in order."""


def same(ours: str, theirs: str) -> Entry:
    """Return the entry of a parameter that is laid out alike in both."""
    return Entry(ours, (theirs,))


def affine(ours: str, theirs: str) -> list[Entry]:
    """Return the entries of a weight and a bias that are laid out alike in both."""
    return [same(f"{ours}.{leaf}", f"{theirs}.{leaf}") for leaf in ("weight", "bias")]


def interleave_qkv(tensor: Tensor, num_heads: int) -> Tensor:
    """Turn rows [q of all heads; k; v] into megatron-core's [head][q, k, v]; weight or bias, 3 C rows."""
    return tensor.unflatten(0, (3, num_heads, -1)).transpose(0, 1).reshape(tensor.shape)


def split_qkv(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo ``interleave_qkv``."""
    return tensor.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).reshape(tensor.shape)


def qkv_entry(ours: str, theirs: tuple[str, ...], num_heads: int) -> Entry:
    """Return the entry of an attention's input projection.

    Args:
        ours: name of the weight or the bias, rows [head][q, k, v].
        theirs: name of the tensor with rows [q; k; v], or the names of q, k and v.
        num_heads: attention heads.
    """
    return Entry(
        ours,
        theirs,
        lambda parts: interleave_qkv(torch.cat(list(parts)), num_heads),
        lambda tensor: split_qkv(tensor, num_heads).chunk(len(theirs)),
    )


def to_ours(table: Sequence[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return another library's state dict under our names.

    Raises:
        ConversionError: the two sets of names differ, so that a weight would be lost or stay random.
    """
    _check_names(state, {name for entry in table for name in entry.theirs})
    return {entry.ours: entry.join([state[name] for name in entry.theirs]).contiguous() for entry in table}


def to_theirs(table: Sequence[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our state dict, or gradients under the same names, under the other library's names.

    Raises:
        ConversionError: the two sets of names differ.
    """
    _check_names(state, {entry.ours for entry in table})
    return {
        name: tensor.contiguous()
        for entry in table
        for name, tensor in zip(entry.theirs, entry.split(state[entry.ours]), strict=True)
    }


def _check_names(state: Mapping[str, Tensor], expected: Collection[str]) -> None:
    missing, unknown = sorted(set(expected) - state.keys()), sorted(state.keys() - set(expected))
    if missing or unknown:
        raise ConversionError(
            f"the state dict lacks {_listed(missing)} and has unknown {_listed(unknown)}; "
            "it is not of this recipe with this configuration"
        )


def _listed(names: Sequence[str]) -> str:
    """Return the names; of many, the first few and how many there are."""
    if len(names) > 8:
        return f"{', '.join(names[:8])}, ... ({len(names)} names)"
    return ", ".join(names) or "nothing"
