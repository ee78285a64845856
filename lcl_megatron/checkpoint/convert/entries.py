"""Tables between the names of ``LCLModel`` and another library's: one entry for every parameter, both ways.

Every map is a permutation of entries, so it serves weights and gradients alike and is bit-exact both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


class ConversionError(ValueError):
    """Weights that this model cannot hold as they are, or that another format cannot."""


Layout = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Entry:
    """One parameter: its two names and how its entries are laid out in each."""

    ours: str
    """Name in ``LCLModel``."""
    theirs: str
    """Name in the other library."""
    to_ours: Layout = lambda tensor: tensor
    """From their layout to ours."""
    to_theirs: Layout = lambda tensor: tensor
    """From our layout to theirs."""


def affine(ours: str, theirs: str) -> list[Entry]:
    """Return the entries of a weight and a bias that are laid out alike in both."""
    return [Entry(f"{ours}.{leaf}", f"{theirs}.{leaf}") for leaf in ("weight", "bias")]


def interleave_qkv(tensor: Tensor, num_heads: int) -> Tensor:
    """Turn rows [q of all heads; k; v] into megatron-core's [head][q, k, v]; weight or bias, 3 C rows."""
    return tensor.unflatten(0, (3, num_heads, -1)).transpose(0, 1).reshape(tensor.shape)


def split_qkv(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo ``interleave_qkv``."""
    return tensor.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).reshape(tensor.shape)


def to_ours(table: Sequence[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return another library's state dict under our names.

    Raises:
        ConversionError: the two sets of names differ, so that a weight would be lost or stay random.
    """
    _check_names(state, {entry.theirs for entry in table})
    return {entry.ours: entry.to_ours(state[entry.theirs]).contiguous() for entry in table}


def to_theirs(table: Sequence[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our state dict, or gradients under the same names, under the other library's names.

    Raises:
        ConversionError: the two sets of names differ.
    """
    _check_names(state, {entry.ours for entry in table})
    return {entry.theirs: entry.to_theirs(state[entry.ours]).contiguous() for entry in table}


def _check_names(state: Mapping[str, Tensor], expected: Collection[str]) -> None:
    missing, unknown = sorted(set(expected) - state.keys()), sorted(state.keys() - set(expected))
    if missing or unknown:
        raise ConversionError(
            f"the state dict lacks {_listed(missing)} and has unknown {_listed(unknown)}; "
            "it is not of this architecture"
        )


def _listed(names: Sequence[str]) -> str:
    """Return the names; of many, the first few and how many there are."""
    if len(names) > 8:
        return f"{', '.join(names[:8])}, ... ({len(names)} names)"
    return ", ".join(names) or "nothing"
