"""Position embeddings for images of another size. Oracle: timm's resampling; and for a plane, the plane itself."""

from __future__ import annotations

import pytest
import torch

from lcl_megatron.checkpoint.convert.importing import only_parts
from lcl_megatron.checkpoint.convert.positions import for_image_size, resample_positions
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.config import ConfigError
from tests.checkpoint.convert import stock_models
from tests.checkpoint.random_weights import random_weights, tiny_config


@pytest.mark.parametrize("has_class_token", [True, False])
@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (3, 3)])
def test_resampled_as_by_timm(old: int, new: int, has_class_token: bool) -> None:
    pos_embed = stock_models.library("timm.layers.pos_embed")
    rows = old * old + int(has_class_token)
    positions = torch.randn(rows, 5, generator=torch.Generator().manual_seed(1))
    found = resample_positions(positions, has_class_token, new)
    expected = pos_embed.resample_abs_pos_embed(positions[None], [new, new], num_prefix_tokens=int(has_class_token))
    torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-6)


def test_rows_and_columns_are_not_exchanged() -> None:
    """Linear in the row, constant along it: stays so, and between the first and the last value."""
    positions = torch.arange(4.0)[:, None].expand(4, 4).reshape(16, 1)
    found = resample_positions(positions, False, 6).view(6, 6)
    assert torch.allclose(found, found[:, :1].expand(6, 6), atol=1e-6)
    assert (found[1:, 0] > found[:-1, 0]).all()


def test_weights_for_another_image_size() -> None:
    weights = random_weights(tiny_config())
    larger = for_image_size(weights, 24)
    assert larger.config.vision.image_size == 24
    name = "vision.embedding.position_embeddings"
    assert larger.state[name].shape == (10, 16)
    assert torch.equal(larger.state[name][0], weights.state[name][0])
    assert all(larger.state[n] is tensor for n, tensor in weights.state.items() if n != name)
    with pytest.raises(ConfigError, match=r"vision\.image_size = 25 is not a multiple of vision\.patch_size = 8"):
        for_image_size(weights, 25)
    with pytest.raises(CheckpointError, match="the weights hold pool only, and not vision"):
        for_image_size(only_parts(weights, ["pool"]), 24)
