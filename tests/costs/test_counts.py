"""What rows hold on average. Oracle: the statistics of an epoch of a real corpus, which composes every document."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcl_megatron.costs.counts import RowMeans
from lcl_megatron.data.planning.mixture import RowSequence
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
