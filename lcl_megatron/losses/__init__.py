"""Pure functions of tensors: the pieces of the contrastive loss, and monitors of its features.

The losses are put together elsewhere: next-token losses in ``model/language.py``, the contrast over all ranks in
``parallel/contrastive.py``, their weighted sum over the global batch in ``training/step.py``.
"""
