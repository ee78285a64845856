"""The start of a new run from weights that exist already: a whole model's, or some of its parts such as the encoder.

Every rank reads the weights itself and keeps its slices, in any layout. The optimizer is built afterwards, so that its
float32 values begin as the weights.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.nn import functional as F

from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.native import model_state
from lcl_megatron.checkpoint.parameters import PARTS
from lcl_megatron.checkpoint.weights import FUSED_NAMES, ModelWeights, read_weights
from lcl_megatron.config import RunConfig
from lcl_megatron.config.validate import architecture, architecture_difference
from lcl_megatron.model.language import TIED_WEIGHT
from lcl_megatron.parallel.engine import Engine

logger = logging.getLogger(__name__)

_VOCABULARY = (TIED_WEIGHT, "language.output_projection.weight")
"""Matrices with a row for every token id, padded to ``language.padded_vocab_size``."""
_POOL_READS = ("vision.hidden_size", "vision.layernorm_epsilon", "language.hidden_size")
"""What decides the pool beside its own section."""
_PADDING = "language.make_vocab_size_divisible_by"


def load_initial_weights(folder: str | Path, engine: Engine, tokenizer: bytes) -> None:
    """Fill those parts of the model that the weights hold; the others keep their seeded random values.

    To be called before the optimizer is built. No communication.

    Args:
        folder: whatever ``read_weights`` reads: a weights folder, or a training checkpoint of any layout.
        engine: this rank's part of the model.
        tokenizer: the corpus's SentencePiece model.

    Raises:
        CheckpointError: the weights are of another architecture, or know the token ids of another tokenizer; without
            the check the run would train something else, or forget what it was given.
    """
    weights = read_weights(folder)
    check_fit(weights, engine.config, str(folder))
    if "language" in weights.parts and weights.tokenizer not in (None, tokenizer):
        raise CheckpointError(
            f"--init-weights {folder}: its language model knows the token ids of another tokenizer than the corpus's; "
            "preprocess the corpus with its tokenizer.model, or leave the language model out: "
            "tools/convert_checkpoint.py import --parts vision pool"
        )
    _fill(engine, weights)
    if engine.groups.rank == 0:
        _report(weights, folder)


def check_fit(weights: ModelWeights, config: RunConfig, source: str) -> None:
    """Raise CheckpointError, naming every differing field, unless the parts of the weights fit the run's model."""
    here, there = (
        {name: value for name, value in architecture(c).items() if _matters(name, weights.parts)}
        for c in (config, weights.config)
    )
    if differences := architecture_difference(there, here):
        listed = "\n  ".join(differences)
        raise CheckpointError(
            f"--init-weights {source}: {', '.join(weights.parts)} there are of another architecture than this run's:\n"
            f"  {listed}\nset these fields as its run.toml has them (--config FILE); an encoder for another image size "
            "is made by tools/convert_checkpoint.py import --image-size"
        )


def _matters(field: str, parts: tuple[str, ...]) -> bool:
    """Return whether a field of the architecture decides one of the parts."""
    if field == _PADDING:
        return False
    return field.split(".")[0] in parts or ("pool" in parts and field in _POOL_READS)


def _fill(engine: Engine, weights: ModelWeights) -> None:
    """Copy this rank's slices of whole tensors into its parameters."""
    parts = weights.parts
    for sharded in nested_values(model_state(engine)):
        if not isinstance(sharded, ShardedTensor):
            continue
        name = _parameter_name(sharded.key)
        if name.split(".")[0] in parts:
            with torch.no_grad():
                sharded.data.copy_(_whole(weights, name, engine.config)[sharded.global_slice()])


def _parameter_name(key: str) -> str:
    """Return a parameter's name with the ``torch`` backend, for its name in a checkpoint."""
    for own, fused in FUSED_NAMES:
        key = key.replace(f".{fused}.layer_norm_", f".{own}.")
    return key


def _whole(weights: ModelWeights, name: str, config: RunConfig) -> Tensor:
    """Return a parameter of the run's model, whole; the vocabulary may be padded otherwise than in the weights."""
    tensor = weights.state[name]
    if name in _VOCABULARY:
        ids, rows = config.language.vocab_size, config.language.padded_vocab_size
        tensor = F.pad(tensor[:ids], (0, 0, 0, rows - ids))
    return tensor


def _report(weights: ModelWeights, folder: str | Path) -> None:
    """Log which parts come from the weights and which start at random."""
    count = sum(tensor.numel() for tensor in weights.state.values())
    absent = [part for part in PARTS if part not in weights.parts]
    logger.info(
        "starting from %s: %s (%.2f M parameters); %s",
        folder,
        ", ".join(weights.parts),
        count / 1e6,
        f"at random: {', '.join(absent)}" if absent else "nothing is at random",
    )
    if "language" in weights.parts and weights.tokenizer is None:
        logger.warning(
            "%s names no tokenizer: its language model is of use only if the corpus has the token ids that it knows",
            folder,
        )
