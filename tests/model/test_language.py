"""The language model. Oracle: an independent causal transformer in plain torch on the same parameters, one document at
a time, with whole logits; for latents, a loop that writes them one by one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lcl_megatron.config import LanguageConfig
from lcl_megatron.config.run import RunConfig
from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.model.language import LanguageHeads, LanguageModel, place_latents
from lcl_megatron.model.specs import Runtime
from tests.batches import make_rows, merge
from tests.model import plain

LANGUAGE = LanguageConfig(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=3,
    vocab_size=50,
    max_position_embeddings=64,
    make_vocab_size_divisible_by=32,
)
VARIANTS = {
    "paper": LANGUAGE,
    "official": dataclasses.replace(LANGUAGE, activation="gelu", tie_embeddings=False, context_bias=False),
    "wide epsilon": dataclasses.replace(LANGUAGE, layernorm_epsilon=1e-2, num_attention_heads=1),
}


@pytest.fixture
def batch(tiny_run: RunConfig) -> PackedBatch:
    """Two rows of two and one documents, three images; the second row ends in padding."""
    config = dataclasses.replace(tiny_run, language=LANGUAGE)
    return merge(make_rows(config, [[(30, (0, 12)), (34, (5,))], [(50, ())]]))


def _model(language: LanguageConfig, runtime: Runtime) -> LanguageModel:
    model = LanguageModel(language, runtime, heads_chunk_size=7)
    plain.randomize(model, seed=4)
    return model


def _plain_hidden(model: LanguageModel, batch: PackedBatch, latents_NLH: Tensor) -> Tensor:
    """Return hidden states (T, H)."""
    language, state = model.language, plain.state_of(model)
    activation: Callable[[Tensor], Tensor] = {"relu": torch.relu, "gelu": F.gelu}[language.activation]
    inputs = [state["embedding.word_embeddings.weight"][token] for token in batch.tokens.flatten()]
    for slot, latents in zip(batch.image_slots.tolist(), latents_NLH, strict=True):
        for offset, latent in enumerate(latents):
            inputs[slot + offset] = latent
    hidden = []
    for begin, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        x = torch.stack(inputs[begin:end]) + state["embedding.position_embeddings"][: end - begin]
        for layer in plain.layer_states(state, language.num_layers):
            x = plain.layer(
                layer,
                x,
                language.num_attention_heads,
                causal=True,
                activation=activation,
                eps=language.layernorm_epsilon,
            )
        hidden.append(x)
    return torch.cat(hidden)


@pytest.mark.parametrize("language", VARIANTS.values(), ids=VARIANTS)
def test_losses_context_features_and_gradients_equal_a_plain_transformer(
    language: LanguageConfig, runtime: Runtime, batch: PackedBatch, generator: torch.Generator
) -> None:
    model = _model(language, runtime)
    latents = torch.randn(3, 4, 24, generator=generator, requires_grad=True)
    hidden_T1H = model.decode(model.embed(batch, latents), batch)
    labels = batch.labels.flatten()[batch.label_positions]
    found = (
        model.heads.token_losses(hidden_T1H[batch.label_positions, 0], labels, model.vocabulary_weight),
        model.heads.context_features(hidden_T1H[batch.context_slots, 0]),
    )

    state, eps = plain.state_of(model), language.layernorm_epsilon
    hidden_TH = _plain_hidden(model, batch, latents)
    torch.testing.assert_close(hidden_T1H[:, 0], hidden_TH, rtol=1e-4, atol=1e-4)
    matrix = state["embedding.word_embeddings.weight" if language.tie_embeddings else "output_projection.weight"]
    normed = plain.layernorm(state, "heads.final_layernorm", hidden_TH[batch.label_positions], eps)
    logits = normed @ matrix[: language.vocab_size].T
    contexts = plain.layernorm(state, "heads.context_layernorm", hidden_TH[batch.context_slots], eps)
    expected = (
        F.cross_entropy(logits, labels, reduction="none"),
        plain.linear(state, "heads.context_projection", contexts),
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    directions = [torch.randn(x.shape, generator=generator) for x in expected]
    inputs = {"latents": latents, **dict(model.named_parameters())}
    gradients = [
        dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), directions), strict=True))
        for outputs in (found, expected)
    ]
    plain.assert_same_gradients(*gradients, tolerance=1e-4)


def test_bias_of_the_context_projection_and_the_output_matrix_follow_the_recipe(runtime: Runtime) -> None:
    paper, official = ({n for n, _ in _model(VARIANTS[v], runtime).named_parameters()} for v in ("paper", "official"))
    assert paper - official == {"heads.context_projection.bias"}
    assert official - paper == {"output_projection.weight"}


def test_positions_ahead_do_not_matter(runtime: Runtime, batch: PackedBatch, generator: torch.Generator) -> None:
    model, latents = _model(LANGUAGE, runtime), torch.randn(3, 4, 24, generator=generator)
    before = model.decode(model.embed(batch, latents), batch)
    tokens = batch.tokens.clone()
    tokens[0, 20:] = 11  # inside the first document, behind its latents
    after = model.decode(model.embed(dataclasses.replace(batch, tokens=tokens), latents), batch)
    changed = (before != after).any(dim=(1, 2))
    assert not changed[:20].any()
    assert changed[20:30].all()


class TestHeads:
    """Cross-entropy in chunks."""

    @pytest.fixture
    def case(self, runtime: Runtime, generator: torch.Generator) -> tuple[Callable[[int], LanguageHeads], Any]:
        def build(chunk_size: int) -> LanguageHeads:
            heads = LanguageHeads(LANGUAGE, runtime, chunk_size)
            plain.randomize(heads, seed=6)
            return heads

        hidden = torch.randn(23, 24, generator=generator, requires_grad=True)
        weight = torch.randn(64, 24, generator=generator, requires_grad=True)
        labels = torch.randint(0, 50, (23,), generator=generator)
        return build, (hidden, labels, weight)

    @pytest.mark.parametrize("chunk_size", [1, 7, 22, 23, 24, 1000])
    def test_chunks_equal_the_whole(self, chunk_size: int, case: Any, generator: torch.Generator) -> None:
        build, (hidden, labels, weight) = case
        heads = build(chunk_size)
        found = heads.token_losses(hidden, labels, weight)
        normed = F.layer_norm(hidden, (24,), heads.final_layernorm.weight, heads.final_layernorm.bias)
        expected = F.cross_entropy((normed @ weight.T)[:, :50], labels, reduction="none")
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        inputs = [hidden, weight, *heads.final_layernorm.parameters()]
        direction = torch.randn(23, generator=generator)
        for ours, theirs in zip(
            torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_padded_ids_get_no_probability_and_no_gradient(self, case: Any) -> None:
        build, (hidden, labels, weight) = case
        heads = build(5)
        with torch.no_grad():
            weight[50:] = 1e3  # would win every softmax
        probabilities = heads.logits(heads.normalized(hidden), weight).softmax(dim=-1)
        assert not probabilities[:, 50:].any()
        torch.testing.assert_close(probabilities[:, :50].sum(dim=-1), torch.ones(23))
        heads.token_losses(hidden, labels, weight).sum().backward()
        assert not weight.grad[50:].any()
        assert weight.grad[:50].any(dim=1).all()

    def test_losses_are_float32_in_bf16(self, runtime: Runtime, case: Any) -> None:
        _, (hidden, labels, weight) = case
        heads = LanguageHeads(LANGUAGE, dataclasses.replace(runtime, params_dtype=torch.bfloat16), 8)
        plain.randomize(heads, seed=6)
        hidden, weight = hidden.detach().bfloat16(), weight.detach().bfloat16()
        found = heads.token_losses(hidden, labels, weight)
        assert found.dtype == torch.float32
        logits = (heads.final_layernorm(hidden) @ weight.T)[:, :50].float()
        torch.testing.assert_close(found, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-5, atol=1e-5)


class TestPlaceLatents:
    def test_latents_land_exactly_in_their_slots(self) -> None:
        text = torch.arange(12.0)[:, None].expand(12, 2).clone().requires_grad_()
        latents = (100 + torch.arange(6.0)).view(2, 3, 1).expand(2, 3, 2).clone().requires_grad_()
        placed = place_latents(text, latents, torch.tensor([7, 1]))
        assert placed[:, 0].tolist() == [0, 103, 104, 105, 4, 5, 6, 100, 101, 102, 10, 11]
        assert torch.equal(placed[:, 0], placed[:, 1])
        placed.sum().backward()
        assert text.grad[:, 0].tolist() == [1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]
        assert (latents.grad == 1).all()

    def test_no_image_leaves_the_text_and_reaches_the_encoder_with_zero_gradient(self) -> None:
        text, latents = torch.randn(5, 2), torch.randn(1, 3, 2, requires_grad=True)
        placed = place_latents(text, latents[:0], torch.zeros(0, dtype=torch.int64))
        assert torch.equal(placed, text)
        placed.sum().backward()
        assert latents.grad is not None
        assert not latents.grad.any()

    @pytest.mark.parametrize("images", [0, 1, 3])
    def test_counts_that_differ_are_refused(self, images: int) -> None:
        with pytest.raises(ValueError, match=f"{images} images have latents, 2 have a place in the rows"):
            place_latents(torch.zeros(9, 2), torch.zeros(images, 3, 2), torch.tensor([0, 4]))

    def test_latents_take_the_dtype_of_the_text(self) -> None:
        placed = place_latents(torch.zeros(4, 2, dtype=torch.bfloat16), torch.ones(1, 2, 2), torch.tensor([1]))
        assert placed.dtype == torch.bfloat16
        assert placed[:, 0].tolist() == [0, 1, 1, 0]
