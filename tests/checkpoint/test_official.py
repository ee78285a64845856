"""Names and layouts of the released code. Oracles: round trips, and the stock layout of ``nn.MultiheadAttention``."""

from __future__ import annotations

import pytest
import torch

from lcl_megatron.checkpoint.convert.official import from_official, name_table, to_official
from lcl_megatron.checkpoint.convert.table import interleave_qkv, split_qkv
from lcl_megatron.config import LanguageConfig, PoolConfig, RunConfig, VisionConfig
from tests.reference_lcl import ReferenceLCL, Sizes

SIZES = Sizes()


@pytest.fixture
def config() -> RunConfig:
    return RunConfig(
        vision=VisionConfig(
            image_size=SIZES.image_size,
            patch_size=SIZES.patch_size,
            num_layers=SIZES.vision_layers,
            hidden_size=SIZES.vision_width,
            ffn_hidden_size=4 * SIZES.vision_width,
            num_attention_heads=SIZES.vision_width // SIZES.vision_head_width,
            layer_scale_init=None,
            drop_path_rate=0.0,
        ),
        pool=PoolConfig(num_attention_heads=SIZES.pool_heads),
        language=LanguageConfig(
            num_layers=SIZES.text_layers,
            hidden_size=SIZES.text_width,
            ffn_hidden_size=4 * SIZES.text_width,
            num_attention_heads=SIZES.text_heads,
            vocab_size=SIZES.vocab_size,
            activation="gelu",
            max_position_embeddings=SIZES.context_length,
            tie_embeddings=False,
            context_bias=False,
            make_vocab_size_divisible_by=1,
        ),
    )


@pytest.fixture
def official() -> dict[str, torch.Tensor]:
    """Weights of the released model, every entry different."""
    model = ReferenceLCL(SIZES)
    model.randomize(5)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_round_trip_returns_the_same_bits_under_the_same_names(config: RunConfig, official) -> None:
    back = to_official(from_official(official, config), config)
    assert back.keys() == official.keys()
    for name, tensor in official.items():
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name], tensor), name


def test_conversion_loses_and_invents_no_entry(config: RunConfig, official) -> None:
    ours = from_official(official, config)
    assert len(ours) == len(official) == len(name_table(config))
    entries = torch.cat([tensor.flatten() for tensor in official.values()])
    converted = torch.cat([tensor.flatten() for tensor in ours.values()])
    assert torch.equal(entries.sort().values, converted.sort().values)


def test_qkv_rows_stand_where_each_layout_wants_them() -> None:
    heads, width = 3, 2
    # Row (part, head, d) of the stacked layout says so in its digits.
    stacked = torch.tensor(
        [100 * part + 10 * head + d for part in range(3) for head in range(heads) for d in range(width)]
    )
    by_head = [100 * part + 10 * head + d for head in range(heads) for part in range(3) for d in range(width)]
    assert interleave_qkv(stacked, heads).tolist() == by_head
    assert torch.equal(split_qkv(interleave_qkv(stacked, heads), heads), stacked)
    weight = stacked[:, None] * 1000 + torch.arange(5)
    assert interleave_qkv(weight, heads)[:, 0].tolist() == [1000 * row for row in by_head]
    assert torch.equal(split_qkv(interleave_qkv(weight, heads), heads), weight)


def test_missing_and_unknown_names_are_listed(config: RunConfig, official) -> None:
    official["visual.proj"] = official.pop("visual.ln_pre.bias")
    with pytest.raises(ValueError, match=r"absent visual\.ln_pre\.bias, unknown visual\.proj; compare depth"):
        from_official(official, config)
    with pytest.raises(ValueError, match=r"the model lacks vision\.embedding\.weight, .*, pool\.query, "):
        to_official({}, config)
    with pytest.raises(ValueError, match=r"the released code has no place for language\.x"):
        to_official({"language.x": torch.zeros(1)}, config)


def test_state_of_a_model_with_more_layers_is_refused(config: RunConfig, official) -> None:
    official |= {
        name.replace("blocks.1.", "blocks.2."): tensor
        for name, tensor in official.items()
        if name.startswith("text.transformer.resblocks.1.")
    }
    with pytest.raises(ValueError, match=r"absent nothing, unknown text\.transformer\.resblocks\.2\."):
        from_official(official, config)
