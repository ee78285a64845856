"""Oracle: the configuration itself (written and read back it must be equal), and the standard library's TOML reader."""

from __future__ import annotations

import dataclasses
import tomllib
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_megatron.config import (
    ConfigError,
    DataConfig,
    LanguageConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    VisionConfig,
)
from lcl_megatron.config.toml import field_types, from_toml, section_types, to_toml

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SHARE = st.floats(min_value=1e-300, max_value=1.0)

CONFIGS = st.builds(
    RunConfig,
    vision=st.builds(
        VisionConfig,
        layer_scale_init=st.none() | st.floats(min_value=1e-12, max_value=1e12),
        drop_path_rate=st.floats(0, 1, exclude_max=True),
        class_token=st.booleans(),
    ),
    language=st.builds(LanguageConfig, activation=st.sampled_from(["relu", "gelu"]), vocab_size=st.integers(0, 2**40)),
    loss=st.builds(LossConfig, contrastive_loss_weight=st.floats(0, allow_nan=False)),
    data=st.builds(
        DataConfig,
        data_path=st.lists(TEXT, max_size=3).map(tuple),
        min_similarity=st.floats(allow_nan=False),
        crop_scale=st.tuples(SHARE, SHARE).map(lambda pair: (min(pair), max(pair))),
        context_rule=st.sampled_from(["content", "index"]),
    ),
    optimizer=st.builds(OptimizerConfig, lr=st.floats(min_value=1e-300, max_value=1e300)),
    parallel=st.lists(TEXT, max_size=4).map(
        lambda cuts: ParallelConfig(pipeline_cuts=tuple(cuts), pipeline_model_parallel_size=len(cuts) + 1)
    ),
    logging=st.builds(LoggingConfig, log_dir=TEXT),
)


@given(CONFIGS)
@settings(max_examples=200, deadline=None)
def test_config_written_and_read_back_is_equal(config: RunConfig) -> None:
    assert from_toml(to_toml(config), "test") == config


def test_every_field_is_written() -> None:
    written = tomllib.loads(to_toml(RunConfig()))
    assert {section: set(table) for section, table in written.items()} == {
        section: {field.name for field in dataclasses.fields(cls)} for section, cls in section_types().items()
    }


def test_fields_have_types_that_toml_can_hold() -> None:
    plain = {bool, int, float, str}

    def fits(hint: Any) -> bool:
        arguments = [argument for argument in get_args(hint) if argument not in (Ellipsis, type(None))]
        if get_origin(hint) is Literal:
            return all(isinstance(argument, str) for argument in arguments)
        return all(map(fits, arguments)) if arguments else hint in plain

    for section in section_types():
        for name, hint in field_types(section).items():
            assert fits(hint), f"{section}.{name}: {hint}"
            # "none" as text and None could not be told apart.
            is_optional = get_origin(hint) is Union or type(None) in get_args(hint)
            assert not (is_optional and str in get_args(hint)), f"{section}.{name}: {hint}"


def test_numbers_keep_their_type() -> None:
    config = from_toml("[optimizer]\nlr = 1\n[training]\ntrain_iters = 1_000", "test")
    assert (type(config.optimizer.lr), config.optimizer.lr) == (float, 1.0)
    assert (type(config.training.train_iters), config.training.train_iters) == (int, 1000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[vision", "exp.toml: not valid TOML"),
        ("[visoin]\nnum_layers = 1", "exp.toml: unknown section 'visoin'; did you mean vision?"),
        ("vision = 3", "exp.toml: vision = 3 is not a table; write [vision]"),
        ("[vision]\nnum_layer = 1", "exp.toml: unknown field 'vision.num_layer'; did you mean vision.num_layers"),
        ("[training]\nlr = 0.1", "exp.toml: unknown field 'training.lr'; did you mean optimizer.lr"),
        ("[pool]\nzzz = 1", "exp.toml: unknown field 'pool.zzz'; known: pool.num_attention_heads"),
        ("[vision]\nnum_layers = 1.5", "exp.toml: vision.num_layers = 1.5 is of type float; expected a whole number"),
        ("[vision]\nnum_layers = true", "is of type bool; expected a whole number"),
        ('[vision]\nclass_token = "True"', "expected true or false, e.g. true without quotes"),
        ('[optimizer]\nlr = "3e-4"', "expected a number, e.g. 3e-4 without quotes"),
        ("[optimizer]\nlr = false", "is of type bool; expected a number"),
        ("[data]\ndata_path = [3]", "expected a string"),
        ("[data]\ndata_path = 'a'", "data.data_path = 'a'; expected a list"),
        ("[data]\nview = ['all']", "data.view[0] = 'all'; expected one of 'interleaved', 'pairs'"),
        ('[training]\nprecision = "fp8"', "training.precision = 'fp8'; expected one of 'bf16', 'fp32'"),
        ("[training]\nprecision = [1]", "expected one of 'bf16', 'fp32'"),
        ("[data]\ncrop_scale = 0.9", "data.crop_scale = 0.9; expected a list"),
        ("[data]\ncrop_scale = [0.9]", "has 1 entries; expected 2"),
        ('[data]\ncrop_scale = [0.9, "x"]', "data.crop_scale[1] = 'x' is of type str; expected a number"),
        ('[vision]\nlayer_scale_init = "no"', "vision.layer_scale_init = 'no' is of type str; expected a number"),
    ],
)
def test_wrong_text_raises_naming_source_field_and_way_out(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        from_toml(text, "exp.toml")
    assert expected in str(raised.value)
    assert str(raised.value).startswith("exp.toml: ")


def test_values_that_cannot_be_raise() -> None:
    with pytest.raises(ConfigError, match=r"vision.image_size = 225 is not a multiple of vision.patch_size = 16"):
        from_toml("[vision]\nimage_size = 225", "test")
