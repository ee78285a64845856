"""Pairs that stand as each other's negatives although they show the same: found, counted, and left out.

Slots that show the same image, or have the same context, form a *class*. Classes of all slots are found by one sort;
the matrix of all pairs of slots exists only in tiles, as the scores do. "The same class" is symmetric, so that both
directions of the loss, and the stream over columns in the backward pass, leave out the same entries.

Shape letters: M rows, G slots (columns), T columns of one tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlotClasses:
    """Slots by what they show."""

    ids_G: Tensor
    """(G,) int64, equal where the slots show the same; below G."""
    sizes_G: Tensor
    """(G,) int64, slots of the slot's class, itself included."""


@dataclass(frozen=True)
class LeftOut:
    """The columns that are left out of each row: other slots that share a class with it. Its own never is."""

    kinds: tuple[SlotClasses, ...]
    """One or two ways to be the same; one of them is enough."""
    first_row: int
    """Slot of the first row."""
    num_rows: int
    """M; row i is slot ``first_row + i``."""

    def tile(self, begin: int, size: int) -> Tensor:
        """Return which of the columns [begin, begin + size) are left out, (M, T) bool.

        Args:
            begin: first column.
            size: columns; less if there are no more.
        """
        rows, columns = slice(self.first_row, self.first_row + self.num_rows), slice(begin, begin + size)
        first, *others = (kind.ids_G[rows, None] == kind.ids_G[columns] for kind in self.kinds)
        for other in others:
            first.logical_or_(other)
        first.diagonal(self.first_row - begin).fill_(False)
        return first

    def count(self) -> Tensor:
        """Return how many columns are left out of each row, (M,) int64, without a look at the matrix."""
        first, *others = self.kinds
        sizes_G = first.sizes_G
        for other in others:
            both = find_classes(first.ids_G * len(first.ids_G) + other.ids_G)
            sizes_G = sizes_G + other.sizes_G - both.sizes_G
        return sizes_G[self.first_row : self.first_row + self.num_rows] - 1


def find_classes(keys_G: Tensor) -> SlotClasses:
    """Return the classes of slots with equal keys. One sort and two bisections; the device is not waited for.

    Args:
        keys_G: (G,) int64.
    """
    ordered = keys_G.sort().values
    ids_G = torch.searchsorted(ordered, keys_G)
    return SlotClasses(ids_G, torch.searchsorted(ordered, keys_G, right=True) - ids_G)


def alone_unless(takes_part_G: Tensor, keys_G: Tensor) -> Tensor:
    """Return keys of which those of slots that do not take part are like no other.

    Args:
        takes_part_G: (G,) bool.
        keys_G: (G,) int64, not negative where the slot takes part.

    Returns:
        (G,) int64; -1 - slot where it does not take part.
    """
    return torch.where(takes_part_G, keys_G, -1 - torch.arange(len(keys_G), device=keys_G.device))
