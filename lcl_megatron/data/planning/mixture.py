"""The endless sequence of rows of a run: one corpus, or several mixed row by row in fixed shares.

Shares are of images or of tokens. A corpus's share of rows follows from what its rows hold on average; rows of all
corpora, and within each corpus rows with many and with few images, alternate evenly. So every stretch of rows has the
shares that were asked for, to within what a few rows hold: a thousand rows to less than one percent, unless a share
hangs on few rows that hold much more than the others.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lcl_megatron.config.errors import ConfigError, require
from lcl_megatron.data.planning.compose import concatenate_ranges
from lcl_megatron.data.planning.even_order import TICK_BITS, EvenMerge
from lcl_megatron.data.planning.rows import EpochStatistics, LazyRows, PlannedRow, RowBlock, RowCounts, SourceRows
from lcl_megatron.data.planning.table_cache import TABLE_FIELDS, TABLE_VERSION

if TYPE_CHECKING:
    from lcl_megatron.config.run import DataConfig
    from lcl_megatron.data.storage.corpus import Corpus
    from lcl_megatron.data.tokenizer import SpecialTokens

SHARE_STEPS = 1 << 20
"""Shares are rounded to one in so many rows."""
ORDER_FIELDS = ("mixture_weights", "mixture_by", "view", "pair_placement", *TABLE_FIELDS)
"""Fields of ``DataConfig`` that decide what the rows are and how they follow each other."""


class RowSequence:
    """The rows of a run: a pure function of corpora, configuration and seed.

    Args:
        corpora: The corpora of ``data.data_path``, made with one tokenizer.
        config: Mixture, composition and layout.
        num_latents: Latents per image.
        seed: Seed of the run.

    Raises:
        ConfigError: If tokenizers differ, a corpus is there twice or has too small a share to be read, or a corpus
            gives no rows (see ``SourceRows``).
    """

    def __init__(self, corpora: Sequence[Corpus], config: DataConfig, num_latents: int, seed: int) -> None:
        _check_tokenizers(corpora)
        views = config.view if len(config.view) > 1 else config.view * len(corpora)
        _check_distinct(corpora, views)
        self.config = config
        self.seed = seed
        self.num_latents = num_latents
        """Latents per image."""
        self.sources = tuple(
            SourceRows(corpus, view, config, num_latents, seed, number)
            for number, (corpus, view) in enumerate(zip(corpora, views, strict=True))
        )
        """The rows of each corpus."""
        self.image_begins = np.cumsum([0, *(corpus.num_images for corpus in corpora)])
        """(corpora + 1,) int64, the run's number of each corpus's first image."""
        self._merge = EvenMerge(self._rates())

    @property
    def special_tokens(self) -> SpecialTokens:
        """Special tokens of the corpora's tokenizer."""
        return self.sources[0].corpus.special_tokens

    @property
    def row_shares(self) -> np.ndarray:
        """(corpora,) float64, share of each corpus in the rows."""
        return self._merge.rates / self._merge.period

    @property
    def description(self) -> dict[str, str]:
        """All that decides the sequence, by name: only under an equal one do consumed rows mean the same."""
        settings = {f"data.{name}": str(getattr(self.config, name)) for name in ORDER_FIELDS}
        corpora = {f"corpus {i}": source.corpus.fingerprint for i, source in enumerate(self.sources)}
        other = {"training.seed": self.seed, "latents per image": self.num_latents, "version of rows": TABLE_VERSION}
        return {**corpora, **{name: str(value) for name, value in other.items()}, **settings}

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of ``description``."""
        return fingerprint_of(self.description)

    def read(self, first_row: int, num_rows: int) -> RowBlock:
        """Return the rows [first_row, first_row + num_rows)."""
        owner, numbers = self._merge.locate(first_row, num_rows)
        blocks, places = [], []
        for number, source in enumerate(self.sources):
            here = np.flatnonzero(owner == number)
            if len(here):
                blocks.append(source.read(int(numbers[here[0]]), len(here), first_row + here))
                places.append(here)
        if len(blocks) == 1:
            return blocks[0]
        order = np.argsort(np.concatenate(places), kind="stable")
        images = np.concatenate([block.counts.num_images for block in blocks])
        _, context = concatenate_ranges((np.cumsum(images) - images)[order], images[order])
        return RowBlock(
            rows=_Reordered([block.rows for block in blocks], order),
            counts=RowCounts.join([block.counts for block in blocks], order),
            has_context=np.concatenate([block.has_context for block in blocks])[context],
        )

    def statistics(self, epoch: int = 0) -> tuple[EpochStatistics, ...]:
        """Return what an epoch of each corpus holds, and what it skips and why. Composes all of it."""
        return tuple(source.statistics(epoch) for source in self.sources)

    def image_bytes(self, image: int) -> bytes:
        """Return the encoded bytes of an image, by the run's number."""
        corpus, own = self.find_image(image)
        return corpus.image_bytes(own)

    def image_source(self, image: int) -> str:
        """Return where an image comes from: ``docs_shard_7.jsonl:1312 image 3 (a1b2.jpg)``."""
        corpus, own = self.find_image(image)
        where = corpus.image_source(own)
        return where if len(self.sources) == 1 else f"{corpus.path.name}: {where}"

    def image_file_hashes(self, images: np.ndarray) -> np.ndarray:
        """Return the hashes of images' source files, (k,) uint64, by the run's numbers, (k,) int64."""
        owner = np.searchsorted(self.image_begins, images, side="right") - 1
        hashes = np.zeros(len(images), dtype=np.uint64)
        for number, source in enumerate(self.sources):
            here = np.flatnonzero(owner == number)
            hashes[here] = np.asarray(source.corpus.image_hash)[images[here] - self.image_begins[number]]
        return hashes

    def document_source(self, row: PlannedRow, number: int) -> str:
        """Return where a document of a row comes from: ``docs_shard_7.jsonl:1312``."""
        source = self.sources[row.source]
        where = source.composer.document_source(int(row.documents[number]))
        return where if len(self.sources) == 1 else f"{source.corpus.path.name}: {where}"

    def find_image(self, image: int) -> tuple[Corpus, int]:
        """Return the corpus of an image and its index there, by the run's number."""
        number = bisect.bisect_right(self.image_begins, image) - 1
        return self.sources[number].corpus, int(image - self.image_begins[number])

    def _rates(self) -> list[int]:
        """Return how many rows each corpus gives per period."""
        weights = self.config.mixture_weights
        if not weights:
            # Each corpus in proportion to its size: all of them end their epochs together.
            total = sum(source.num_rows for source in self.sources)
            scale = 1 if total < 1 << TICK_BITS else SHARE_STEPS / total
            return [max(1, round(source.num_rows * scale)) for source in self.sources]
        unit = self.config.mixture_by
        means = [source.means[("images", "tokens").index(unit)] for source in self.sources]
        for source, mean in zip(self.sources, means, strict=True):
            require(
                mean > 0,
                f"the rows of {source.corpus.path} show no images: all stand behind the cut at data.seq_length = "
                f"{self.config.seq_length}, so it can have no share of images; raise --seq-length, or set "
                "--mixture-by tokens",
            )
        rows = [weight / mean for weight, mean in zip(weights, means, strict=True)]
        rates = [round(SHARE_STEPS * share / sum(rows)) for share in rows]
        for source, rate in zip(self.sources, rates, strict=True):
            require(
                rate > 0,
                f"data.mixture_weights = {weights}: {source.corpus.path} would give less than one of {2 * SHARE_STEPS} "
                f"rows to have that share of {unit}; raise its weight, or leave it out",
            )
        return rates


class _Reordered(LazyRows):
    """Several sequences of rows, one behind the other and then in another order."""

    def __init__(self, parts: Sequence[Sequence[PlannedRow]], order: np.ndarray) -> None:
        self._parts, self._order = parts, order
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return len(self._order)

    def row(self, number: int) -> PlannedRow:
        """Return a row, numbered from 0."""
        position = int(self._order[number])
        part = bisect.bisect_right(self._ends, position)
        return self._parts[part][position - int(self._ends[part])]


def _check_tokenizers(corpora: Sequence[Corpus]) -> None:
    require(len(corpora) > 0, "no corpus to read; give --data-path CORPUS [CORPUS ...]")
    first = corpora[0]
    for corpus in corpora[1:]:
        if corpus.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise ConfigError(
                f"{corpus.path} was made with another tokenizer (fingerprint {corpus.tokenizer.fingerprint}) than "
                f"{first.path} ({first.tokenizer.fingerprint}): their token ids mean different text; preprocess one "
                "of them again with the other's tokenizer.model"
            )


def _check_distinct(corpora: Sequence[Corpus], views: Sequence[str]) -> None:
    """Refuse a corpus that is there twice: its rows would come in pairs, and images be contrasted with their copies."""
    seen: dict[tuple[str, str], Corpus] = {}
    for corpus, view in zip(corpora, views, strict=True):
        other = seen.get((corpus.fingerprint, view))
        if other is not None:
            raise ConfigError(
                f"{corpus.path} holds the same documents as {other.path}, in the same view {view!r}: each of its rows "
                "would come twice, side by side; give it once, with a greater weight in --mixture-weights"
            )
        seen[corpus.fingerprint, view] = corpus


def fingerprint_of(description: dict[str, str]) -> str:
    """Return the SHA-256 (hex) of what decides a sequence of rows; the order of the names counts."""
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()
