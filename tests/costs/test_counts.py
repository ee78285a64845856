"""What rows hold on average, and what a rank computes of them.

Oracles: the statistics of an epoch of a real corpus, which composes every document; the runs of queries and keys, and
the images, that context parallelism really deals out.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from lcl_megatron.config import RunConfig
from lcl_megatron.costs.counts import MicroBatchCounts, RowMeans, StepCounts
from lcl_megatron.costs.portions import Portion
from lcl_megatron.data.planning.mixture import RowSequence
from lcl_megatron.parallel.zigzag import ZigZag, encoded_slots
from lcl_megatron.training.setup import open_corpora
from tests.training.small_runs import DataFolder, plain_document, small_config


def test_means_of_a_corpus_are_those_of_its_epoch(tmp_path: Path) -> None:
    data = DataFolder(tmp_path / "data")
    data.write([plain_document(number) for number in range(16)])
    data.preprocess()
    config = small_config(data.corpus)
    sequence = RowSequence(open_corpora(config), config.data, config.vision.num_patches, config.training.seed)
    (epoch,) = sequence.statistics()
    means = RowMeans.of_sequence(sequence)
    assert means.images == pytest.approx(epoch.images / epoch.rows, rel=0.02)
    assert means.tokens == pytest.approx(epoch.tokens / epoch.rows, rel=0.02)
    assert means.targets == pytest.approx(epoch.targets / epoch.rows, rel=0.02)
    # One document fills a row here, so that the sum of squares lies near the square of the tokens.
    assert means.tokens**2 <= means.squared_lengths <= means.tokens * config.data.seq_length


def context_parallel(size: int) -> RunConfig:
    config = RunConfig()
    parallel = dataclasses.replace(config.parallel, context_parallel_size=size)
    training = dataclasses.replace(config.training, micro_batch_size=1, global_batch_size=8)
    return dataclasses.replace(config, parallel=parallel, training=training)


def fetched_keys(lengths: list[list[int]], size: int) -> tuple[float, int]:
    """Return the keys of a row and a rank that are really fetched, on average, and those predicted of the means."""
    config = context_parallel(size)
    row = config.data.seq_length
    zigzag = ZigZag(size, row)
    borders = [torch.from_numpy(np.append(0, np.cumsum(documents)).astype(np.int32)) for documents in lengths]
    real = np.mean([len(zigzag.runs(documents, rank).key_rows) for documents in borders for rank in range(size)])
    squared = float(np.mean([sum(length**2 for length in documents) for documents in lengths]))
    (micro_batch, *_) = StepCounts.of_means(config, RowMeans(0, row, 0, squared), 1).micro_batches
    return float(real), micro_batch.fetched_keys


@pytest.mark.parametrize("size", [2, 4, 8])
def test_fetched_keys_are_those_of_the_runs(size: int) -> None:
    real, predicted = fetched_keys([[2048]], size)
    assert predicted == real
    generator = np.random.default_rng(0)
    cuts = [np.sort(generator.choice(np.arange(1, 2048), 2, replace=False)) for _ in range(200)]
    real, predicted = fetched_keys([np.diff([0, *cut, 2048]).tolist() for cut in cuts], size)
    assert predicted == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_images_are_those_that_a_rank_encodes(size: int) -> None:
    for images in range(9):
        counts = MicroBatchCounts(images, 0, images)
        portions = [Portion(context_parallel(size), counts, rank) for rank in range(size)]
        real = [len(encoded_slots(max(1, images), rank, size)) for rank in range(size)]
        assert [portion.images for portion in portions] == real
        # Who is asked about when nobody is named.
        assert portions[-1].images == max(real)
