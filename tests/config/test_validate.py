"""Oracle: configurations that are wrong in exactly one thing, and the message that must name it and the way out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lcl_megatron.config import ConfigError, RunConfig
from lcl_megatron.config.model import LanguageConfig, LossConfig, PoolConfig, VisionConfig
from lcl_megatron.config.run import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from lcl_megatron.config.validate import (
    data_parallel_size,
    validate,
)


def change(config: RunConfig, **fields: Any) -> RunConfig:
    """Return the configuration with ``section__field=value`` applied."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        section, _, field = name.partition("__")
        sections.setdefault(section, {})[field] = value
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


def test_default_config_is_valid_on_any_fitting_number_of_processes() -> None:
    for world_size in (1, 2, 8, 64, 256):
        validate(RunConfig(), world_size)
    validate(change(RunConfig(), parallel__tensor_model_parallel_size=4, parallel__sequence_parallel=True), 8)


@pytest.mark.parametrize(
    ("fields", "world_size", "expected"),
    [
        (
            {"parallel__tensor_model_parallel_size": 2, "parallel__pipeline_model_parallel_size": 2},
            6,
            ["6 processes", "2 x 2 x 1 = 4", "a multiple of 4", "--tensor-model-parallel-size"],
        ),
        ({}, 0, ["0 processes"]),
        (
            {"training__global_batch_size": 64, "training__micro_batch_size": 4},
            3,
            ["training.global_batch_size = 64", "4 x 3 = 12", "--global-batch-size to 60 or 72"],
        ),
        (
            {"training__global_batch_size": 4},
            1,
            ["training.global_batch_size = 4", "8 x 1 = 8", "--global-batch-size to 8", "--micro-batch-size"],
        ),
        (
            {"parallel__tensor_model_parallel_size": 8},
            8,
            ["vision.num_attention_heads = 12", "tensor_model_parallel_size = 8", "divides 12"],
        ),
        (
            {"parallel__tensor_model_parallel_size": 4, "vision__ffn_hidden_size": 3074},
            4,
            ["vision.ffn_hidden_size = 3074"],
        ),
        (
            {"parallel__tensor_model_parallel_size": 4, "language__num_attention_heads": 6},
            4,
            ["language.num_attention_heads = 6"],
        ),
        (
            {"parallel__tensor_model_parallel_size": 4, "language__ffn_hidden_size": 3074},
            4,
            ["language.ffn_hidden_size = 3074"],
        ),
        (
            {
                "parallel__tensor_model_parallel_size": 4,
                "language__vocab_size": 1001,
                "language__make_vocab_size_divisible_by": 1,
            },
            4,
            ["language.vocab_size = 1001", "--language.make-vocab-size-divisible-by", "a multiple of 4"],
        ),
        (
            {
                "parallel__tensor_model_parallel_size": 4,
                "parallel__sequence_parallel": True,
                "training__micro_batch_size": 1,
                "data__seq_length": 2046,
            },
            4,
            ["1 x 2046 = 2046", "--seq-length to a multiple of 4", "--no-sequence-parallel"],
        ),
        (
            {"parallel__pipeline_model_parallel_size": 29, "training__global_batch_size": 8},
            29,
            ["29 stages", "29 x 1", "28 pieces", "12 vision layers", "at most 28"],
        ),
        (
            {
                "parallel__pipeline_model_parallel_size": 8,
                "parallel__virtual_pipeline_model_parallel_size": 4,
                "training__global_batch_size": 64,
            },
            8,
            ["32 stages", "8 x 4", "28 pieces", "product is at most 28"],
        ),
        (
            {
                "parallel__pipeline_model_parallel_size": 4,
                "parallel__virtual_pipeline_model_parallel_size": 2,
                "training__global_batch_size": 96,
                "training__micro_batch_size": 8,
            },
            8,
            [
                "6 micro-batches on each data-parallel rank",
                "96 / 8 / 2",
                "no multiple of parallel.pipeline_model_parallel_size = 4",
                "parallel.virtual_pipeline_model_parallel_size = 2 needs",
                "--global-batch-size to 64 or 128",
                "--virtual-pipeline-model-parallel-size 1",
            ],
        ),
        (
            {
                "parallel__pipeline_model_parallel_size": 2,
                "loss__contrastive_scope": "global",
                "loss__contrastive_keep_graphs": True,
            },
            2,
            ["loss.contrastive_keep_graphs with parallel.pipeline_model_parallel_size = 2", "for the two passes"],
        ),
        (
            {"parallel__pipeline_model_parallel_size": 2, "loss__latent_regression_loss_weight": 0.5},
            2,
            [
                "loss.latent_regression_loss_weight = 0.5",
                "parallel.pipeline_model_parallel_size = 2",
                "do not travel to the last stage",
                "--pipeline-model-parallel-size 1",
            ],
        ),
        (
            {
                "parallel__pipeline_model_parallel_size": 2,
                "loss__contrastive_keep_graphs": True,
                "loss__contrastive_scope": "global",
            },
            2,
            ["loss.contrastive_keep_graphs", "parallel.pipeline_model_parallel_size = 2", "the pipeline frees"],
        ),
        (
            {"loss__contrastive_keep_graphs": True, "loss__contrastive_scope": "micro_batch"},
            1,
            ["loss.contrastive_keep_graphs", "loss.contrastive_scope = 'micro_batch'", "--contrastive-scope global"],
        ),
        (
            {"parallel__context_parallel_size": 4, "data__seq_length": 2044},
            4,
            [
                "data.seq_length = 2044",
                "2 x parallel.context_parallel_size = 8",
                "--seq-length to a multiple of 8, e.g. 2040",
                "--context-parallel-size",
            ],
        ),
        (
            {"parallel__context_parallel_size": 2, "loss__latent_regression_loss_weight": 0.5},
            2,
            [
                "loss.latent_regression_loss_weight = 0.5",
                "parallel.context_parallel_size = 2",
                "need not hold the positions before them",
                "--context-parallel-size 1",
            ],
        ),
        (
            {
                "parallel__context_parallel_size": 2,
                "parallel__tensor_model_parallel_size": 4,
                "parallel__sequence_parallel": True,
                "training__micro_batch_size": 1,
                "data__seq_length": 1020,
            },
            8,
            [
                "1 x 1020 = 1020 positions, of which parallel.context_parallel_size = 2",
                "--seq-length to a multiple of 8",
            ],
        ),
        ({"parallel__context_parallel_size": 3}, 4, ["1 x 1 x 3 = 3", "--context-parallel-size"]),
        (
            {"data__seq_length": 2049},
            1,
            ["data.seq_length = 2049", "language.max_position_embeddings = 2048", "shorten --seq-length"],
        ),
        ({"data__seq_length": 199}, 1, ["data.seq_length = 199", "196 latents", "make 200", "raise --seq-length"]),
        (
            {"pool__num_attention_heads": 7},
            1,
            ["pool.num_attention_heads = 7", "language.hidden_size = 768", "a divisor"],
        ),
        (
            {"training__train_iters": 2000},
            1,
            ["optimizer.lr_warmup_iters = 2000", "training.train_iters = 2000", "lower --lr-warmup-iters"],
        ),
        (
            {"optimizer__lr_decay_iters": 1500},
            1,
            ["optimizer.lr_warmup_iters = 2000", "optimizer.lr_decay_iters = 1500"],
        ),
    ],
)
def test_wrong_config_raises_what_got_expected_do(fields: dict[str, Any], world_size: int, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        validate(change(RunConfig(), **fields), world_size)
    assert [part for part in expected if part not in str(raised.value)] == [], str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"data__seq_length": 200},
        {"training__train_iters": 2001},
        {"parallel__pipeline_model_parallel_size": 28, "training__global_batch_size": 8},
        {
            "parallel__pipeline_model_parallel_size": 7,
            "parallel__virtual_pipeline_model_parallel_size": 4,
            "training__global_batch_size": 56,
        },
        {
            "parallel__tensor_model_parallel_size": 4,
            "language__vocab_size": 1001,
            "language__make_vocab_size_divisible_by": 4,
        },
        {"parallel__context_parallel_size": 4, "data__seq_length": 2040},
    ],
)
def test_config_at_the_border_is_valid(fields: dict[str, Any]) -> None:
    config = change(RunConfig(), **fields)
    parallel = config.parallel
    replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    validate(config, replica * parallel.context_parallel_size)


def test_subset_drop_path_is_refused_where_the_sequence_is_split() -> None:
    split = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}
    subset = {"vision__drop_path_mode": "subset"}
    with pytest.raises(ConfigError) as raised:
        validate(change(RunConfig(), **split, **subset), 2)
    for part in ("vision.drop_path_mode = 'subset'", "--vision.drop-path-mode mask", "--no-sequence-parallel"):
        assert part in str(raised.value)
    validate(change(RunConfig(), **split, **subset, vision__drop_path_rate=0.0), 2)
    validate(change(RunConfig(), **subset, parallel__tensor_model_parallel_size=2), 2)


def test_batch_arithmetic() -> None:
    config = change(
        RunConfig(),
        parallel__tensor_model_parallel_size=2,
        parallel__pipeline_model_parallel_size=3,
        training__global_batch_size=64,
        training__micro_batch_size=2,
    )
    assert data_parallel_size(config, 48) == 8
    assert data_parallel_size(change(config, parallel__context_parallel_size=2), 48) == 4


@pytest.mark.parametrize(
    ("section", "fields", "expected"),
    [
        (VisionConfig, {"image_size": 225}, "vision.image_size = 225 is not a multiple of vision.patch_size = 16"),
        (VisionConfig, {"num_layers": 0}, "vision.num_layers = 0; it must be at least 1"),
        (VisionConfig, {"num_attention_heads": 5}, "vision.hidden_size = 768 is not a multiple"),
        (VisionConfig, {"drop_path_rate": 1.0}, "vision.drop_path_rate = 1.0 is outside [0, 1)"),
        (VisionConfig, {"layer_scale_init": 0.0}, "vision.layer_scale_init = 0.0; give a positive number, or None"),
        (
            VisionConfig,
            {"recompute_granularity": "full", "recompute_num_layers": 13},
            "vision.recompute_num_layers = 13; give 1 to vision.num_layers = 12, or 0 for all",
        ),
        (
            VisionConfig,
            {"recompute_granularity": "selective", "recompute_num_layers": 2},
            "vision.recompute_num_layers = 2 with vision.recompute_granularity = 'selective': only 'full' counts",
        ),
        (LanguageConfig, {"recompute_num_layers": -1}, "language.recompute_num_layers = -1; give 1 to"),
        (LanguageConfig, {"recompute_num_layers": 1}, "set --language.recompute-granularity full"),
        (PoolConfig, {"num_attention_heads": 0}, "pool.num_attention_heads = 0; it must be at least 1"),
        (LanguageConfig, {"num_attention_heads": 7}, "language.hidden_size = 768 is not a multiple"),
        (LanguageConfig, {"vocab_size": -1}, "language.vocab_size = -1"),
        (LanguageConfig, {"max_position_embeddings": 0}, "language.max_position_embeddings = 0"),
        (LossConfig, {"contrastive_loss_weight": -0.1}, "weights must not be negative"),
        (LossConfig, {"contrastive_loss_weight": 0, "generation_loss_weight": 0}, "at least one must be positive"),
        (LossConfig, {"latent_regression_loss_weight": -1.0}, "weights must not be negative"),
        (LossConfig, {"contrastive_tile_size": 0}, "loss.contrastive_tile_size = 0"),
        (LossConfig, {"logit_scale_init": 5.0}, "loss.logit_scale_init = 5.0 is outside [0, "),
        (DataConfig, {"seq_length": 1}, "data.seq_length = 1"),
        (
            DataConfig,
            {"max_images_per_micro_batch": -1},
            "data.max_images_per_micro_batch = -1; it must not be negative",
        ),
        (
            DataConfig,
            {"data_path": ("a", "b"), "mixture_weights": (1.0,)},
            "data.mixture_weights has 1 entries for 2 corpora in data.data_path; give one for each",
        ),
        (DataConfig, {"view": ("pairs", "pairs")}, "data.view has 2 entries for 0 corpora"),
        (DataConfig, {"data_path": ("a",), "mixture_weights": (0.0,)}, "every weight must be positive"),
        (DataConfig, {"layout": "window", "view": ("pairs",)}, "pairs are packed whole: choose packed or pad"),
        (DataConfig, {"pair_placement": "text_first"}, "has none: add --view pairs, or leave --pair-placement out"),
        (DataConfig, {"num_workers": -1}, "data.num_workers = -1; it must not be negative"),
        (DataConfig, {"crop_scale": (0.9, 1.1)}, "data.crop_scale = (0.9, 1.1)"),
        (DataConfig, {"crop_ratio": (2.0, 1.0)}, "data.crop_ratio = (2.0, 1.0)"),
        (DataConfig, {"max_bad_image_rate": 2}, "data.max_bad_image_rate = 2 is outside [0, 1]"),
        (OptimizerConfig, {"lr": 0.0}, "optimizer.lr = 0.0"),
        (OptimizerConfig, {"min_lr": 1.0}, "expected 0 <= min_lr <= lr"),
        (OptimizerConfig, {"adam_beta2": 1.0}, "optimizer.adam_beta2 = 1.0 is outside [0, 1)"),
        (OptimizerConfig, {"adam_eps": 0.0}, "optimizer.adam_eps = 0.0"),
        (OptimizerConfig, {"clip_grad": -1.0}, "optimizer.clip_grad = -1.0; it must be finite and not negative"),
        (ParallelConfig, {"tensor_model_parallel_size": 0}, "parallel.tensor_model_parallel_size = 0"),
        (ParallelConfig, {"context_parallel_size": 0}, "parallel.context_parallel_size = 0"),
        (ParallelConfig, {"sequence_parallel": True}, "--no-sequence-parallel"),
        (ParallelConfig, {"pipeline_cuts": ("pool",)}, "names 1 cuts; 1 stages need 0"),
        (
            ParallelConfig,
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "pipeline_cuts": ("pool",),
            },
            "names 1 cuts; 4 stages need 3",
        ),
        (
            ParallelConfig,
            {"virtual_pipeline_model_parallel_size": 0},
            "parallel.virtual_pipeline_model_parallel_size = 0; it must be at least 1",
        ),
        (
            ParallelConfig,
            {"virtual_pipeline_model_parallel_size": 2},
            "parallel.virtual_pipeline_model_parallel_size = 2 with parallel.pipeline_model_parallel_size = 1; stages",
        ),
        (
            ParallelConfig,
            {"overlap_param_gather": True, "overlap_grad_reduce": False},
            "parallel.overlap_param_gather is on; it needs",
        ),
        (ParallelConfig, {"distributed_timeout_minutes": 0}, "parallel.distributed_timeout_minutes = 0"),
        (TrainingConfig, {"train_iters": 0}, "training.train_iters = 0"),
        (TrainingConfig, {"seed": -1}, "training.seed = -1"),
        (CheckpointConfig, {"save_interval": 0}, "checkpoint.save_interval = 0"),
        (LoggingConfig, {"log_interval": 0}, "logging.log_interval = 0"),
        (LoggingConfig, {"exit_interval": -1}, "logging.exit_interval = -1"),
    ],
)
def test_section_checks_itself(section: type, fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        section(**fields)
    assert expected in str(raised.value)


def test_padded_vocabulary() -> None:
    assert LanguageConfig(vocab_size=50272).padded_vocab_size == 50304
    assert LanguageConfig(vocab_size=256).padded_vocab_size == 256
    with pytest.raises(ConfigError, match="language.vocab_size is not set"):
        _ = LanguageConfig().padded_vocab_size
