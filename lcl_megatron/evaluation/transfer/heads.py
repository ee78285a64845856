"""The small networks that tasks put on patch features (LCL, Fig. 3 and appendix A.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEAD_WIDTH = 64
"""Channels of an attention head, where the width allows it."""


class AttentionPool(nn.Module):
    """One vector from patch features: attention with a single learned query, from random values."""

    def __init__(self, width: int) -> None:
        """Make a pool for features of some width; heads have 64 channels, or all there are."""
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        heads = max(1, width // HEAD_WIDTH)
        self.attention = nn.MultiheadAttention(width, heads if width % heads == 0 else 1, batch_first=True)

    def forward(self, features: Tensor) -> Tensor:
        """Return (N, C) of features (N, P, C)."""
        query = self.query.expand(len(features), -1, -1)
        pooled, _ = self.attention(query, features, features, need_weights=False)
        return pooled[:, 0]


class Classifier(nn.Module):
    """Attention pool, layer norm, linear layer: the classifier of the paper's transfer."""

    def __init__(self, width: int, num_classes: int) -> None:
        """Make a classifier; the linear layer begins at zero, so that the first loss is log(classes)."""
        super().__init__()
        self.pool = AttentionPool(width)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, K) of features (N, P, C)."""
        logits: Tensor = self.linear(self.norm(self.pool(features)))
        return logits
