"""Checks that need more than one section, or the world size: everything that can fail before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcl_megatron.config.errors import require
from lcl_megatron.config.run import RunConfig


def validate(config: RunConfig, world_size: int) -> None:
    """Check what no section can check alone. Called once before anything starts, and again when the corpus is open.

    Args:
        config: the whole configuration; a ``language.vocab_size`` of 0 (not known yet) is not checked.
        world_size: number of processes.

    Raises:
        ConfigError: the run cannot work; without the check it would die later or, worse, train something else.
    """
    _check_layout(config, world_size)
    dp = data_parallel_size(config, world_size)
    _check_batch(config, dp)
    _check_tensor_parallel(config)
    _check_drop_path(config)
    _check_context_parallel(config)
    _check_pipeline(config)
    _check_interleaving(config, dp)
    _check_sequence(config)
    _check_schedule(config)


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Return the number of model replicas: world size / (tensor x pipeline x context parallel)."""
    parallel = config.parallel
    return world_size // (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )


def architecture(config: RunConfig) -> dict[str, Any]:
    """Return what a checkpoint's weights fix, by ``section.field``: a run may only load weights that agree in all.

    Left out is what changes training but neither the weights' shapes nor the function they compute: drop-path, and
    what is recomputed.
    """
    vision, language = dataclasses.asdict(config.vision), dataclasses.asdict(config.language)
    for name in ("drop_path_rate", "drop_path_mode"):
        del vision[name]
    for tower in (vision, language):
        for name in ("recompute_granularity", "recompute_num_layers"):
            del tower[name]
    # The initial value of LayerScale is gone after the first step; whether it exists is not.
    vision["layer_scale"] = vision.pop("layer_scale_init") is not None
    fields = {f"vision.{name}": value for name, value in vision.items()}
    fields |= {f"pool.{name}": value for name, value in dataclasses.asdict(config.pool).items()}
    fields |= {f"language.{name}": value for name, value in language.items()}
    return fields


def architecture_difference(checkpoint: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """Return one line per field in which two results of ``architecture`` differ; empty = the weights fit."""
    absent = "absent"
    return [
        f"{name}: {checkpoint.get(name, absent)!r} in the checkpoint, {run.get(name, absent)!r} in this run"
        for name in [*checkpoint, *(name for name in run if name not in checkpoint)]
        if checkpoint.get(name, absent) != run.get(name, absent)
    ]


def _check_layout(config: RunConfig, world_size: int) -> None:
    parallel = config.parallel
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    require(
        world_size >= 1 and world_size % (tp * pp * cp) == 0,
        f"{world_size} processes cannot be divided into replicas of tensor x pipeline x context parallel = "
        f"{tp} x {pp} x {cp} = {tp * pp * cp} processes each; start a multiple of {tp * pp * cp} processes, "
        "or change --tensor-model-parallel-size, --pipeline-model-parallel-size or --context-parallel-size",
    )


def _check_batch(config: RunConfig, dp: int) -> None:
    micro, total = config.training.micro_batch_size, config.training.global_batch_size
    unit = micro * dp
    require(
        total % unit == 0,
        f"training.global_batch_size = {total} is not a multiple of micro_batch_size x data-parallel ranks = "
        f"{micro} x {dp} = {unit}; set --global-batch-size to {_multiples_around(total, unit)}, or change "
        "--micro-batch-size",
    )


def _multiples_around(value: int, unit: int) -> str:
    """Return the positive multiples of ``unit`` next to a value that is none, e.g. ``60 or 72``."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _check_tensor_parallel(config: RunConfig) -> None:
    tp = config.parallel.tensor_model_parallel_size
    language, vision = config.language, config.vision
    split = {
        "vision.num_attention_heads": vision.num_attention_heads,
        "vision.ffn_hidden_size": vision.ffn_hidden_size,
        "language.num_attention_heads": language.num_attention_heads,
        "language.ffn_hidden_size": language.ffn_hidden_size,
    }
    for name, value in split.items():
        require(
            value % tp == 0,
            f"{name} = {value} cannot be split over parallel.tensor_model_parallel_size = {tp} ranks; "
            f"choose a size that divides {value}",
        )
    require(
        language.vocab_size == 0 or language.padded_vocab_size % tp == 0,
        f"the padded vocabulary (language.vocab_size = {language.vocab_size}, rounded up to a multiple of "
        f"language.make_vocab_size_divisible_by = {language.make_vocab_size_divisible_by}) cannot be split over "
        f"parallel.tensor_model_parallel_size = {tp} ranks; set --language.make-vocab-size-divisible-by "
        f"to a multiple of {tp}",
    )
    cp = config.parallel.context_parallel_size
    positions = config.training.micro_batch_size * config.data.seq_length
    by_context = f", of which parallel.context_parallel_size = {cp} leaves each rank one in {cp}," if cp > 1 else ""
    require(
        not config.parallel.sequence_parallel or positions % (tp * cp) == 0,
        f"micro_batch_size x seq_length = {config.training.micro_batch_size} x {config.data.seq_length} = {positions} "
        f"positions{by_context} cannot be split over parallel.tensor_model_parallel_size = {tp} ranks, as "
        f"parallel.sequence_parallel does; set --seq-length to a multiple of {tp * cp}, or --no-sequence-parallel",
    )


def _check_context_parallel(config: RunConfig) -> None:
    cp, seq_length = config.parallel.context_parallel_size, config.data.seq_length
    require(
        cp == 1 or seq_length % (2 * cp) == 0,
        f"data.seq_length = {seq_length} cannot be cut into 2 x parallel.context_parallel_size = {2 * cp} equal "
        f"chunks, of which each rank takes two; set --seq-length to a multiple of {2 * cp}, e.g. "
        f"{seq_length // (2 * cp) * 2 * cp or 2 * cp}, or change --context-parallel-size",
    )
    weight = config.loss.latent_regression_loss_weight
    require(
        weight == 0 or cp == 1,
        f"loss.latent_regression_loss_weight = {weight} with parallel.context_parallel_size = {cp}: the rank that "
        "holds an image's latents need not hold the positions before them, from which they would be foretold; set "
        "--context-parallel-size 1, or --latent-regression-loss-weight 0",
    )


def _check_drop_path(config: RunConfig) -> None:
    vision = config.vision
    require(
        vision.drop_path_mode == "mask" or vision.drop_path_rate == 0 or not config.parallel.sequence_parallel,
        "vision.drop_path_mode = 'subset' with parallel.sequence_parallel: kept images would leave tensor-parallel "
        "ranks with unequal parts of the sequence; set --vision.drop-path-mode mask, or --no-sequence-parallel",
    )


def _check_pipeline(config: RunConfig) -> None:
    parallel, stages = config.parallel, config.parallel.num_stages
    pp = parallel.pipeline_model_parallel_size
    vision, language = config.vision.num_layers, config.language.num_layers
    # The four beside the layers: patch embedding, pool, token embedding, heads.
    pieces = vision + language + 4
    require(
        stages <= pieces,
        f"{stages} stages (parallel.pipeline_model_parallel_size x parallel.virtual_pipeline_model_parallel_size = "
        f"{pp} x {parallel.virtual_pipeline_model_parallel_size}) for a line of {pieces} "
        f"pieces ({vision} vision layers, {language} language layers, patch embedding, pool, token embedding, heads); "
        f"a stage needs at least one: choose sizes whose product is at most {pieces}",
    )
    weight = config.loss.latent_regression_loss_weight
    require(
        weight == 0 or pp == 1,
        f"loss.latent_regression_loss_weight = {weight} with parallel.pipeline_model_parallel_size = {pp}: image "
        "latents do not travel to the last stage, where they would be compared with the language model's outputs; set "
        "--pipeline-model-parallel-size 1, or --latent-regression-loss-weight 0",
    )
    require(
        not config.loss.contrastive_keep_graphs or pp == 1,
        f"loss.contrastive_keep_graphs with parallel.pipeline_model_parallel_size = {pp}: the pipeline frees a "
        "micro-batch's activations before all are contrasted; set --pipeline-model-parallel-size 1, or "
        "--no-contrastive-keep-graphs for the two passes",
    )
    require(
        not config.loss.contrastive_keep_graphs or config.loss.contrastive_scope == "global",
        f"loss.contrastive_keep_graphs with loss.contrastive_scope = {config.loss.contrastive_scope!r}: each "
        "micro-batch would be contrasted for itself, and nothing be kept; set --contrastive-scope global, or "
        "--no-contrastive-keep-graphs",
    )


def _check_interleaving(config: RunConfig, dp: int) -> None:
    parallel, training = config.parallel, config.training
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    count, unit = training.global_batch_size // (training.micro_batch_size * dp), training.micro_batch_size * dp * pp
    total = training.global_batch_size
    require(
        chunks == 1 or count % pp == 0,
        f"{count} micro-batches on each data-parallel rank (global_batch_size / micro_batch_size / ranks = {total} / "
        f"{training.micro_batch_size} / {dp}) are no multiple of parallel.pipeline_model_parallel_size = {pp}, as "
        f"parallel.virtual_pipeline_model_parallel_size = {chunks} needs: that many pass a rank's stages in turn; set "
        f"--global-batch-size to {_multiples_around(total, unit)}, or change --micro-batch-size, or set "
        "--virtual-pipeline-model-parallel-size 1",
    )


def _check_sequence(config: RunConfig) -> None:
    seq_length, patches = config.data.seq_length, config.vision.num_patches
    limit = config.language.max_position_embeddings
    require(
        seq_length <= limit,
        f"data.seq_length = {seq_length} is longer than language.max_position_embeddings = {limit}: a document that "
        "fills its row would have no position; shorten --seq-length or raise --language.max-position-embeddings",
    )
    # BOS, <BoI>, the latents, <EoI>, EOS.
    shortest = patches + 4
    require(
        seq_length >= shortest,
        f"data.seq_length = {seq_length} cannot hold one image: {patches} latents, BOS, <BoI>, <EoI> and EOS make "
        f"{shortest}; raise --seq-length, or choose a smaller image or a larger patch",
    )
    heads, width = config.pool.num_attention_heads, config.language.hidden_size
    require(
        width % heads == 0,
        f"pool.num_attention_heads = {heads} does not divide language.hidden_size = {width}, the pool's output width; "
        "choose a divisor of it",
    )


def _check_schedule(config: RunConfig) -> None:
    optimizer = config.optimizer
    end = optimizer.lr_decay_iters or config.training.train_iters
    name = "optimizer.lr_decay_iters" if optimizer.lr_decay_iters else "training.train_iters"
    require(
        optimizer.lr_warmup_iters < end,
        f"optimizer.lr_warmup_iters = {optimizer.lr_warmup_iters} is not before {name} = {end}, the end of the "
        "decay: the peak learning rate would never be reached; lower --lr-warmup-iters",
    )
