"""Tokens with images among them: what a sequence is, how texts become one, and how sequences become a batch.

An image is one entry of the token ids, ``IMAGE_INDEX``, which is no token of any vocabulary; the model puts the image's
features in its place. Padding is told by lengths, never by an id: many tokenizers pad with a token that texts use too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGE_INDEX = -200
"""Stands for an image among token ids, as in LLaVA."""
IGNORED = -100
"""Label of a position whose token is not learnt."""
PLACEHOLDER = "<image>"
"""Stands for an image in a text."""


class SequenceError(ValueError):
    """A text whose images do not fit it."""


@dataclass(frozen=True)
class Piece:
    """A part of a text."""

    text: str
    """May hold placeholders, unless it is a target."""
    is_target: bool = False
    """Whether the model learns to say it; else it is given."""
    ends_turn: bool = False
    """Whether the end-of-text token follows, and is learnt if the piece is."""


@dataclass(frozen=True)
class TokenSequence:
    """The tokens of a text."""

    ids: np.ndarray
    """(S,) int64, ``IMAGE_INDEX`` for an image."""
    labels: np.ndarray
    """(S,) int64: the id itself where it is learnt, else ``IGNORED``."""

    @property
    def num_images(self) -> int:
        """Number of images among the tokens."""
        return int((self.ids == IMAGE_INDEX).sum())

    @property
    def num_targets(self) -> int:
        """Number of tokens that are learnt."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True)
class SequenceBatch:
    """Several sequences side by side, filled up on the right."""

    ids: Tensor
    """(B, S) int64; what stands beyond a length means nothing."""
    labels: Tensor
    """(B, S) int64, ``IGNORED`` beyond a length."""
    lengths: Tensor
    """(B,) int64, tokens of each sequence; an image counts as one."""
    pixels: Tensor
    """(N, 3, size, size) uint8 RGB: the images, sequence by sequence, in the order of their places."""

    def to(self, device: torch.device) -> SequenceBatch:
        """Return the batch on a device."""
        tensors = (self.ids, self.labels, self.lengths, self.pixels)
        return SequenceBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


class SequenceBuilder:
    """Turns pieces of text into tokens, piece by piece.

    Because every piece is tokenized for itself, the tokens of a prompt are the same in training and in generation, and
    which tokens are learnt is known without searching for them. Tokenizers that set a space before every text (those
    of SentencePiece) get a piece without its own first space, so that the tokens are those of the whole text.
    """

    def __init__(self, tokenizer: Any, num_patches: int, max_length: int) -> None:
        """Learn what the tokenizer does on its own.

        Args:
            tokenizer: of transformers, with an end-of-text token.
            num_patches: positions that an image takes in the model.
            max_length: positions that a sequence may take; its end is cut off.

        Raises:
            SequenceError: the tokenizer has no end-of-text token, or not even one image fits.
        """
        if tokenizer.eos_token_id is None:
            raise SequenceError("the tokenizer has no end-of-text token, so that no answer could end; set eos_token")
        if max_length <= num_patches:
            raise SequenceError(
                f"an image takes {num_patches} positions of max_length = {max_length}; make room for text"
            )
        self.tokenizer = tokenizer
        self.num_patches = num_patches
        self.max_length = max_length
        first = tokenizer.convert_ids_to_tokens(tokenizer.encode("x", add_special_tokens=False))[0]
        self._sets_space = first.startswith("\u2581")
        begin = tokenizer.bos_token_id
        self._prefix = [begin] if begin is not None and begin in tokenizer.encode("") else []

    def build(self, pieces: Sequence[Piece], num_images: int) -> TokenSequence:
        """Return the tokens of a text.

        A sequence that is too long loses its end, together with the images there. Without images a placeholder is
        a piece of text like any other.

        Args:
            pieces: the text.
            num_images: images that belong to it.

        Raises:
            SequenceError: there are not as many placeholders as images.
        """
        placeholders = sum(piece.text.count(PLACEHOLDER) for piece in pieces if not piece.is_target)
        if num_images and placeholders != num_images:
            raise SequenceError(f"{num_images} images, but {placeholders} times {PLACEHOLDER}; every image needs one")
        ids, targets = list(self._prefix), [False] * len(self._prefix)
        for piece in pieces:
            of_piece = self._encode(piece, bool(num_images))
            ids += of_piece
            targets += [piece.is_target] * len(of_piece)
        found = np.array(ids, dtype=np.int64)
        kept = found[: self._positions_that_fit(found)]
        return TokenSequence(kept, np.where(targets[: len(kept)], kept, IGNORED))

    def _encode(self, piece: Piece, has_images: bool) -> list[int]:
        ids: list[int] = []
        parts = piece.text.split(PLACEHOLDER) if has_images and not piece.is_target else [piece.text]
        for number, part in enumerate(parts):
            if number:
                ids.append(IMAGE_INDEX)
            text = part.removeprefix(" ") if self._sets_space else part
            if text:
                ids += self.tokenizer.encode(text, add_special_tokens=False)
        return [*ids, self.tokenizer.eos_token_id] if piece.ends_turn else ids

    def _positions_that_fit(self, ids: np.ndarray) -> int:
        """Return how many tokens may stay: an image takes as many positions as it has patches, or none at all."""
        ends = np.cumsum(np.where(ids == IMAGE_INDEX, self.num_patches, 1))
        return int(np.searchsorted(ends, self.max_length, side="right"))


def collate(sequences: Sequence[TokenSequence], pixels: Tensor) -> SequenceBatch:
    """Return sequences as a batch.

    Args:
        sequences: B of them.
        pixels: (N, 3, size, size) uint8 of their images, in order.

    Raises:
        SequenceError: N is not the number of images of all sequences.
    """
    num_images = sum(sequence.num_images for sequence in sequences)
    if num_images != len(pixels):
        raise SequenceError(f"{len(pixels)} images for sequences with {num_images} places; give one for each")
    lengths = [len(sequence.ids) for sequence in sequences]
    ids = np.zeros((len(sequences), max(lengths)), dtype=np.int64)
    labels = np.full_like(ids, IGNORED)
    for row, sequence in enumerate(sequences):
        ids[row, : lengths[row]] = sequence.ids
        labels[row, : lengths[row]] = sequence.labels
    return SequenceBatch(torch.from_numpy(ids), torch.from_numpy(labels), torch.tensor(lengths), pixels)
