"""Closed-set classification with the paper's head: attention pool, layer norm, linear layer."""
