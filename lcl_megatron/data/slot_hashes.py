"""What the slots of a row show, as numbers that are equal where it is the same: images, and what precedes them.

A pair of an image and its context is contrasted with all others of the batch; two that show the same would be each
other's negatives. These hashes find them, on any rank and in any epoch: they depend on content only, not on where in
the corpora it stands. All are 63 bits and not negative: of 100,000 different things two have the same hash with a
probability of 10^-9.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lcl_megatron.data.order import keyed_hash

if TYPE_CHECKING:
    from lcl_megatron.data.tokenizer import SpecialTokens

EMPTY_CONTEXT = 0
"""Hash of a context that holds nothing but special tokens; no other has it."""


def image_hashes(file_hashes: np.ndarray) -> np.ndarray:
    """Return the hashes of images, (k,) int64, from those of their files, (k,) uint64 (``Corpus.image_hash``)."""
    return (file_hashes >> np.uint64(1)).astype(np.int64)


def context_hashes(
    tokens: np.ndarray,
    position_ids: np.ndarray,
    contexts: np.ndarray,
    file_hashes: np.ndarray,
    special_tokens: SpecialTokens,
) -> np.ndarray:
    """Return the hashes of what stands before each image in its document: token ids and images, in their places.

    The hash of a context is a sum over its positions, of a hash of position and content each, and hashed once more;
    so all contexts of a micro-batch come out of one cumulative sum. What was cut off with a row's border does not
    count: the language model does not see it either.

    Args:
        tokens: (T,) int64, documents one behind the other.
        position_ids: (T,) int64, from 0 at the begin of every document.
        contexts: (k,) int64, flat position of the ``<BoI>`` before each image.
        file_hashes: (k,) uint64, what the images show.
        special_tokens: ids of BOS, EOS and padding, which are no content.

    Returns:
        (k,) int64, ``EMPTY_CONTEXT`` where no text and no image stands before the image.
    """
    words = tokens.astype(np.uint64)
    # An image is all placeholders: which one it is stands in the place of its <BoI>.
    words[contexts] = file_hashes
    is_content = ~np.isin(tokens, [special_tokens.bos, special_tokens.eos, special_tokens.pad])
    num_content = _sum_before(is_content.astype(np.int64))
    begins = contexts - position_ids[contexts]
    is_empty = num_content[contexts] == num_content[begins]
    sums = _sum_before(keyed_hash(position_ids, words))
    hashes = image_hashes(keyed_hash(sums[contexts] - sums[begins]))
    return np.where(is_empty, EMPTY_CONTEXT, np.maximum(hashes, EMPTY_CONTEXT + 1))


def _sum_before(values: np.ndarray) -> np.ndarray:
    """Return the sum of all values before each, in their dtype, modulo its range."""
    sums = np.zeros_like(values)
    np.cumsum(values[:-1], out=sums[1:])
    return sums
