"""Figures that show collapse of the contrastive features before any task does. Pure functions of unit features.

None is differentiable, none communicates: give them the features of all ranks, valid slots only. All return 0
where there is nothing to measure, so that a step without pairs reports a number.

Shape letters: G pairs, D feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def feature_std(features_GD: Tensor) -> Tensor:
    """Return the spread of unit features over the batch, relative to an even spread over the sphere.

    sqrt(D) times the mean over dimensions of the (population) standard deviation: 0 = collapsed to a point,
    about 1 = spread evenly (a coordinate of a random unit vector has standard deviation 1 / sqrt(D)).

    Args:
        features_GD: (G, D) unit features, any floating dtype.

    Returns:
        () float64; 0 for G = 0.
    """
    features_GD = features_GD.double()
    if features_GD.shape[0] == 0:
        return features_GD.new_zeros(())
    return features_GD.std(dim=0, correction=0).mean() * features_GD.shape[1] ** 0.5


@torch.no_grad()
def effective_rank(features_GD: Tensor) -> Tensor:
    """Return how many directions the features use: exp of the entropy of the normalised singular values.

    Between 1 (all features on one line) and min(G, D) (singular values all equal). Roy and Vetterli, 2007; known
    as RankMe for self-supervised features (Garrido et al., 2023). Not centred.

    Args:
        features_GD: (G, D) any floating dtype. Cost: a Gram matrix of the shorter side and its eigenvalues.

    Returns:
        () float64; 0 for G = 0 and for features that are all zero.
    """
    features_GD = features_GD.double()
    if features_GD.numel() == 0:
        return features_GD.new_zeros(())
    wide = features_GD.shape[0] < features_GD.shape[1]
    gram = features_GD @ features_GD.T if wide else features_GD.T @ features_GD
    eigenvalues = torch.linalg.eigvalsh(gram)
    # Rounding leaves eigenvalues of about 1e-16 of the largest; their square roots would count as directions.
    noise = eigenvalues[-1] * max(features_GD.shape) * torch.finfo(torch.float64).eps
    singular = torch.where(eigenvalues > noise, eigenvalues, 0.0).sqrt()
    total = singular.sum()
    share = singular / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, torch.special.entr(share).sum().exp(), 0.0)


@torch.no_grad()
def alignment(images_GD: Tensor, contexts_GD: Tensor) -> Tensor:
    """Return the mean cosine of the pairs.

    Args:
        images_GD: (G, D) unit features.
        contexts_GD: (G, D) unit features; row i is the context of image i.

    Returns:
        () float64 in [-1, 1]; 0 for G = 0.
    """
    return (images_GD.double() * contexts_GD.double()).sum() / max(1, images_GD.shape[0])


@torch.no_grad()
def background_similarity(images_GD: Tensor, contexts_GD: Tensor) -> Tensor:
    """Return the mean cosine of an image and a context that do not belong together.

    Near ``alignment`` when the features have collapsed, near 0 when negatives are spread. All G (G - 1) pairs, from
    sums: (sum_i x_i . sum_j y_j - sum_i x_i . y_i) / (G (G - 1)).

    Args:
        images_GD: (G, D) unit features.
        contexts_GD: (G, D) unit features; row i is the context of image i.

    Returns:
        () float64 in [-1, 1]; 0 for G < 2.
    """
    images_GD, contexts_GD = images_GD.double(), contexts_GD.double()
    num_pairs = images_GD.shape[0]
    everything = images_GD.sum(dim=0) @ contexts_GD.sum(dim=0)
    return (everything - (images_GD * contexts_GD).sum()) / max(1, num_pairs * (num_pairs - 1))
