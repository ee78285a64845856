"""Cheap probes of any encoder: k-NN and a linear classifier on the mean of its patch features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lcl_megatron.evaluation.encoders.load import load_encoder
from lcl_megatron.evaluation.probes import Accuracy, Examples, probe_encoder
from lcl_megatron.evaluation.transfer.feature_cache import evaluation_reader
from lcl_megatron.evaluation.transfer.frozen_features import LiveFeatures
from lcl_megatron.evaluation.transfer.image_sets import ImageSet
from lcl_megatron.evaluation.transfer.labelled_sets import LabelledSet, describe_splits
from lcl_megatron.evaluation.transfer.results import TaskResult, Trial, UnitScores, summarize_units
from lcl_megatron.evaluation.transfer.session import Session

BATCH_SIZE = 64
"""Images encoded at the same time by a rank."""


def probe(spec: str, train: LabelledSet, test: LabelledSet, session: Session) -> TaskResult:
    """Return both probes' accuracies of an encoder, which is never trained.

    Args:
        spec: which encoder, see ``load_encoder``.
        train: images that the classifiers are fitted on; a fifth of them chooses the linear probe's penalty.
        test: images to score.
        session: ranks and folders.

    Raises:
        EncoderError, DataError: see there.
        ValueError: the sets are too small to fit the probes.

    Parallel: ranks share the encoding; each fits the same classifiers.
    """
    trial = Trial("probe", "", {"feature": "mean over patches"})
    encoder = load_encoder(spec).to(session.replicas.device).requires_grad_(False)
    session.say(f"{encoder.name}: probes fitted on {len(train.images):,} images, scored on {len(test.images):,}")

    def examples(split: LabelledSet) -> Examples:
        return Examples(mean_features(split.images), torch.from_numpy(split.labels))

    def mean_features(images: ImageSet) -> Tensor:
        # Every feature is needed once: nothing is gained by storing them.
        source = LiveFeatures(encoder, evaluation_reader(encoder, images), "fp32")
        share = session.replicas.share(len(images))
        found = [torch.zeros(0, encoder.width, device=session.replicas.device)]
        for first in range(share.start, share.stop, BATCH_SIZE):
            indices = np.arange(first, min(first + BATCH_SIZE, share.stop))
            found.append(source.features(source.read(indices)).mean(dim=1))
        return session.replicas.gather_shares(torch.cat(found), len(images)).cpu()

    report = probe_encoder(encoder.name, examples(train), examples(test))
    trial.settings["linear_l2"] = report.linear_l2
    metrics = tuple(
        summarize_units(name, {0: _unit_scores(accuracy)}, report.chance)
        for name, accuracy in (("linear probe", report.linear), ("k-NN", report.knn))
    )
    return trial.result(session.replicas.from_first(encoder.describe()), describe_splits(train, test), metrics)


def _unit_scores(accuracy: Accuracy) -> UnitScores:
    """Return one unit per image; for the bootstrap of a share, which images are right does not matter."""
    ones = np.ones(accuracy.num_examples, np.int64)
    return UnitScores((np.arange(accuracy.num_examples) < accuracy.num_correct).astype(np.int64), ones)
