"""Pure functions of tensors: the contrastive loss and its pieces."""
