"""Oracles: transformers' LlavaForConditionalGeneration and VipLlavaForConditionalGeneration with the same weights;
one sequence at a time against a batch; finite differences are left to torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lcl_megatron.checkpoint.stock_libraries import LibraryError, stock_library
from lcl_megatron.evaluation.encoders.encoder import ImageEncoder
from lcl_megatron.evaluation.encoders.preprocessing import Preprocessing
from lcl_megatron.evaluation.vision_language.model import Connector, Generation, VisionLanguageModel
from lcl_megatron.evaluation.vision_language.sequences import (
    IGNORED,
    IMAGE_INDEX,
    SequenceBatch,
    SequenceError,
    TokenSequence,
    collate,
)
from tests.evaluation.vision_language import tiny_models

try:
    transformers = stock_library("transformers")
except LibraryError as error:
    pytest.skip(str(error), allow_module_level=True)

LANGUAGE_MODELS = [tiny_models.opt, tiny_models.llama, tiny_models.gpt2]
PREPROCESSING = Preprocessing(32, 32, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


def sequence(ids: list[int], num_prompt: int = 0) -> TokenSequence:
    array = np.array(ids)
    labels = np.where(array == IMAGE_INDEX, IGNORED, array)
    labels[:num_prompt] = IGNORED
    return TokenSequence(array, labels)


def images(count: int, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def small_model(language_model: Callable[[], Any] = tiny_models.opt) -> VisionLanguageModel:
    torch.manual_seed(1)
    return VisionLanguageModel(tiny_models.PatchEncoder(), Connector(16, 32), language_model()).eval()


def clip_tower() -> Any:
    torch.manual_seed(2)
    config = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16
    )
    return tiny_models.randomized(transformers.CLIPVisionModel(config))


class PenultimateLayer(nn.Module):
    """What LLaVA-1.5 reads: the last layer but one of CLIP, before the last norm, without the class token."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        output = self.tower(PREPROCESSING.normalize(pixels), output_hidden_states=True)
        return output.hidden_states[-2][:, 1:]


def vision_state(tower: Any) -> dict[str, Tensor]:
    """Weights of a tower by the names that Llava's ``vision_tower`` has for them."""
    return dict(tower.state_dict())


IDS = [5, 9, IMAGE_INDEX, 17, 3, IMAGE_INDEX, 44, 8]


def expanded(num_patches: int, image_token: int) -> Tensor:
    return torch.tensor([[i for n in IDS for i in ([image_token] * num_patches if n == IMAGE_INDEX else [n])]])


@pytest.mark.parametrize("language_model", [tiny_models.opt, tiny_models.llama])
def test_logits_equal_llava(language_model: Callable[[], Any]) -> None:
    tower, text = clip_tower(), language_model()
    config = transformers.LlavaConfig(
        vision_config=tower.config, text_config=text.config, image_token_id=399, vision_feature_layer=-2,
        vision_feature_select_strategy="default", projector_hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip
    llava = tiny_models.randomized(transformers.LlavaForConditionalGeneration(config))
    llava.model.vision_tower.load_state_dict(vision_state(tower))
    llava.model.language_model.load_state_dict(text.model.state_dict())
    llava.lm_head.load_state_dict(text.lm_head.state_dict())
    connector = Connector(24, 32)
    projector = llava.model.multi_modal_projector
    connector[0].load_state_dict(projector.linear_1.state_dict())
    connector[2].load_state_dict(projector.linear_2.state_dict())
    model = VisionLanguageModel(PenultimateLayer(tower), connector, text).eval()
    pixels = images(2, 32)
    with torch.no_grad():
        ours = model.logits(model.embed(collate([sequence(IDS)], pixels)))
        theirs = llava(
            input_ids=expanded(4, 399),
            pixel_values=PREPROCESSING.normalize(pixels),
            attention_mask=torch.ones(1, 14, dtype=torch.long),
        ).logits
    assert ours.shape == (1, 14, 400)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_logits_of_normed_features_equal_vip_llava() -> None:
    """Encoders here end with their last norm; VipLlava's projector begins with one, so that it holds such a model."""
    tower, text = clip_tower(), tiny_models.opt()
    inner = getattr(tower, "vision_model", tower)
    encoder = ImageEncoder(
        "clip", tower, lambda x: inner.post_layernorm(tower(pixel_values=x).last_hidden_state)[:, 1:], PREPROCESSING
    )
    config = transformers.VipLlavaConfig(
        vision_config=tower.config, text_config=text.config, image_token_id=399, vision_feature_layers=[-1],
        projector_layernorm_eps=tower.config.layer_norm_eps, projector_hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip
    vip = tiny_models.randomized(transformers.VipLlavaForConditionalGeneration(config))
    vip.model.vision_tower.load_state_dict(vision_state(tower))
    vip.model.language_model.load_state_dict(text.model.state_dict())
    vip.lm_head.load_state_dict(text.lm_head.state_dict())
    projector = vip.model.multi_modal_projector
    projector.projector_layernorm.load_state_dict(inner.post_layernorm.state_dict())
    connector = Connector(24, 32)
    connector[0].load_state_dict(projector.linear_1.state_dict())
    connector[2].load_state_dict(projector.linear_2.state_dict())
    model = VisionLanguageModel(encoder, connector, text).eval()
    pixels = images(2, 32)
    with torch.no_grad():
        ours = model.logits(model.embed(collate([sequence(IDS)], pixels)))
        theirs = vip(
            input_ids=expanded(4, 399),
            pixel_values=PREPROCESSING.normalize(pixels),
            attention_mask=torch.ones(1, 14, dtype=torch.long),
        ).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_a_batch_equals_its_sequences_one_by_one(language_model: Callable[[], Any]) -> None:
    model = small_model(language_model)
    parts = [[7, IMAGE_INDEX, 8, 9], [3, 4], [IMAGE_INDEX, 5, 6, IMAGE_INDEX, 11, 12, 13]]
    pixels = images(3)
    own_pixels = [pixels[:1], pixels[:0], pixels[1:]]
    total, weight = model.loss_sum(collate([sequence(ids, 1) for ids in parts], pixels))
    singles = [model.loss_sum(collate([sequence(ids, 1)], own)) for ids, own in zip(parts, own_pixels, strict=True)]
    torch.testing.assert_close(total, sum(single for single, _ in singles), rtol=1e-5, atol=1e-5)
    assert weight == sum(count for _, count in singles)
    # The first token of the last sequence stands behind an image, whose last patch predicts it.
    assert weight == 2 + 1 + 5


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_do_not_depend_on_what_else_is_in_the_batch(language_model: Callable[[], Any], num_beams: int) -> None:
    model = small_model(language_model)
    how = Generation(max_new_tokens=6, num_beams=num_beams)
    parts, pixels = [[7, IMAGE_INDEX, 8], [3, 4, 5, 6, 7], [9, 8, IMAGE_INDEX]], images(2)
    together = model.generate(collate([sequence(ids) for ids in parts], pixels), how, 0, 0)
    own_pixels = [pixels[:1], pixels[:0], pixels[1:]]
    for row, (ids, own) in enumerate(zip(parts, own_pixels, strict=True)):
        alone = model.generate(collate([sequence(ids)], own), how, 0, 0)[0]
        assert together[row][: len(alone)].tolist() == alone.tolist()
        assert set(together[row][len(alone) :].tolist()) <= {0}


def test_greedy_answers_follow_the_logits() -> None:
    model = small_model()
    ids, pixels = [7, IMAGE_INDEX, 8], images(1)
    answer = model.generate(collate([sequence(ids)], pixels), Generation(4), -1, 0)[0].tolist()
    for step in range(4):
        scores = model.logits(model.embed(collate([sequence(ids + answer[:step])], pixels)))
        assert int(scores[0, -1].argmax()) == answer[step]


@pytest.mark.parametrize("settings", [{"repetition_penalty": 9.0}, {"no_repeat_ngram_size": 1}, {"do_sample": True}])
def test_settings_of_the_language_model_s_own_do_not_change_answers(settings: dict[str, Any]) -> None:
    model, ids, pixels = small_model(), [4, 5, IMAGE_INDEX, 6], images(1)
    expected = model.generate(collate([sequence(ids)], pixels), Generation(12), -1, 0)
    for name, value in settings.items():
        setattr(model.language_model.generation_config, name, value)
    assert torch.equal(model.generate(collate([sequence(ids)], pixels), Generation(12), -1, 0), expected)


def test_the_answer_depends_on_the_image() -> None:
    model = small_model()
    one, other = (model.logits(model.embed(collate([sequence([7, IMAGE_INDEX, 8])], p))) for p in images(2).split(1))
    assert (one[:, 0] == other[:, 0]).all()
    assert (one[:, -1] - other[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("parts", "trained"),
    [
        (("connector",), {"connector"}),
        (("connector", "language_model"), {"connector", "language_model"}),
        (("encoder", "connector", "language_model"), {"encoder", "connector", "language_model"}),
    ],
)
def test_only_trained_parts_get_gradients_and_leave_evaluation_mode(parts: Any, trained: set[str]) -> None:
    model = small_model()
    model.set_trained(parts)
    model.train()
    model.loss_sum(collate([sequence([7, IMAGE_INDEX, 8, 9])], images(1)))[0].backward()
    for name in ("encoder", "connector", "language_model"):
        part = model.get_submodule(name)
        assert part.training == (name in trained)
        assert all((p.grad is not None) == (name in trained) for p in part.parameters())
    assert not model.eval().connector.training


def test_text_without_images_trains_too() -> None:
    model = small_model()
    model.set_trained(("connector",))
    total, weight = model.loss_sum(collate([sequence([3, 4, 5])], images(0)))
    total.backward()
    assert weight == 2
    assert model.connector[0].weight.grad is not None
    assert model.connector[0].weight.grad.abs().sum() == 0


def test_padding_is_told_by_lengths() -> None:
    model = small_model()
    batch = collate([sequence([3, 4, 5, 0])], images(0))
    longer = SequenceBatch(
        torch.cat([batch.ids, torch.tensor([[IMAGE_INDEX, 7]])], dim=1),
        torch.cat([batch.labels, torch.tensor([[9, 7]])], dim=1),
        batch.lengths,
        batch.pixels,
    )
    torch.testing.assert_close(model.loss_sum(longer), model.loss_sum(batch))


def test_wrong_number_of_images_is_an_error() -> None:
    batch = collate([sequence([7, IMAGE_INDEX])], images(1))
    with pytest.raises(SequenceError, match="0 images for 1 places"):
        small_model().embed(SequenceBatch(batch.ids, batch.labels, batch.lengths, images(0)))
    with pytest.raises(SequenceError, match="2 images for sequences with 1 places; give one for each"):
        collate([sequence([7, IMAGE_INDEX])], images(2))


def test_opt_with_narrower_embeddings() -> None:
    """OPT-350m embeds tokens in fewer dimensions than its layers have; images must have as many as the tokens."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    text = transformers.OPTForCausalLM(config)
    encoder = tiny_models.PatchEncoder()
    model = VisionLanguageModel(encoder, Connector(16, text.get_input_embeddings().weight.shape[1]), text)
    assert model.embedding_size == 16
    assert model.logits(model.embed(collate([sequence([IMAGE_INDEX, 3])], images(1)))).shape == (1, 5, 50)
