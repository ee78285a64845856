"""A language model that sees: encoder, MLP connector and causal language model, as in LLaVA-1.5.

Liu et al., Improved Baselines with Visual Instruction Tuning, 2023 (arXiv 2310.03744). The patch features of an image
go through the connector and stand in the sequence as if they were embeddings of tokens; the language model is any of
transformers', called through ``inputs_embeds``, and its vocabulary stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcl_megatron.evaluation.vision_language.sequences import IGNORED, IMAGE_INDEX, SequenceBatch, SequenceError

Part = Literal["encoder", "connector", "language_model"]
PARTS: tuple[Part, ...] = get_args(Part)
"""Parts of the model that are trained, or not, as a whole."""


class Connector(nn.Sequential):
    """From patch features (..., C) to embeddings (..., H): linear layers with GELU between them.

    Two layers are LLaVA-1.5's ``mlp2x_gelu``, one is LLaVA's linear projection.
    """

    def __init__(self, width: int, embedding_size: int, num_layers: int = 2) -> None:
        layers: list[nn.Module] = [nn.Linear(width, embedding_size)]
        for _ in range(num_layers - 1):
            layers += [nn.GELU(), nn.Linear(embedding_size, embedding_size)]
        super().__init__(*layers)


@dataclass(frozen=True)
class Embedded:
    """A batch as the language model reads it: L positions per sequence, P of them for every image."""

    embeddings: Tensor
    """(B, L, H)."""
    mask: Tensor
    """(B, L) int64: 1 where there is something."""
    labels: Tensor
    """(B, L) int64, ``IGNORED`` where nothing is learnt."""


@dataclass(frozen=True)
class Generation:
    """How answers are made; always the likeliest, nothing is drawn at random."""

    max_new_tokens: int
    """Tokens after which an answer is cut off."""
    num_beams: int = 1
    """Answers that are followed at the same time; 1 = greedy."""
    length_penalty: float = 1.0
    """Exponent of the length that beams' log probabilities are divided by; larger favours longer answers."""


class VisionLanguageModel(nn.Module):
    """Encoder, connector and language model.

    Parts that are not trained stay in evaluation mode, whatever mode the model is in: no dropout, no drop-path.
    """

    def __init__(self, encoder: nn.Module, connector: Connector, language_model: Any) -> None:
        """Put the parts together; nothing is trained until ``set_trained`` says so.

        Args:
            encoder: (N, 3, size, size) uint8 -> (N, P, C) patch features.
            connector: (N, P, C) -> (N, P, H).
            language_model: a causal language model of transformers, whose embeddings have H entries.
        """
        super().__init__()
        self.encoder = encoder
        self.connector = connector
        self.language_model = language_model
        self.trained: frozenset[Part] = frozenset()
        self.set_trained(())

    @property
    def embedding_size(self) -> int:
        """Width H of the language model's embeddings."""
        return cast(int, self.language_model.get_input_embeddings().weight.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the connector is."""
        return next(self.connector.parameters()).device

    def set_trained(self, parts: Iterable[Part]) -> None:
        """Say which parts are trained."""
        self.trained = frozenset(parts)
        for part in PARTS:
            self.get_submodule(part).requires_grad_(part in self.trained)
        self.train(self.training)

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """Set the mode of the parts that are trained; the others stay in evaluation mode."""
        super().train(mode)
        for part in PARTS:
            if part not in self.trained:
                self.get_submodule(part).eval()
        return self

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that do not start from random values: all but the connector's."""
        return [*self.encoder.parameters(), *self.language_model.parameters()]

    def image_embeddings(self, pixels: Tensor) -> Tensor:
        """Return what images look like to the language model, (N, P, H), from pixels (N, 3, size, size) uint8."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "encoder" in self.trained):
            features = self.encoder(pixels)
        return cast(Tensor, self.connector(features.to(next(self.connector.parameters()).dtype)))

    def embed(self, batch: SequenceBatch, pad_left: bool = False) -> Embedded:
        """Return the embeddings of a batch, with P positions in the place of every image.

        Args:
            batch: on the model's device.
            pad_left: fill up on the left, as generation needs it: the next token stands at the end of every sequence.

        Raises:
            SequenceError: there are not as many images as places for them.
        """
        valid = torch.arange(batch.ids.shape[1], device=batch.ids.device) < batch.lengths[:, None]
        is_image = valid & (batch.ids == IMAGE_INDEX)
        is_text = valid & ~is_image
        if int(is_image.sum()) != len(batch.pixels):
            raise SequenceError(f"{len(batch.pixels)} images for {int(is_image.sum())} places; give one for each")
        table = self.language_model.get_input_embeddings()
        images = self.image_embeddings(batch.pixels) if len(batch.pixels) else None
        num_patches = 0 if images is None else images.shape[1]
        widths = is_text.long() + num_patches * is_image.long()
        totals = widths.sum(dim=1)
        length = int(totals.max())
        begins = widths.cumsum(dim=1) - widths
        if pad_left:
            begins = begins + (length - totals)[:, None]
        rows = torch.arange(len(totals), device=batch.ids.device)[:, None].expand_as(begins)
        texts = table(batch.ids[is_text])
        embeddings = texts.new_zeros(len(totals), length, texts.shape[-1])
        embeddings = embeddings.index_put((rows[is_text], begins[is_text]), texts)
        if images is not None:
            offsets = torch.arange(num_patches, device=batch.ids.device)
            places = (rows[is_image][:, None].expand(-1, num_patches), begins[is_image][:, None] + offsets)
            embeddings = embeddings.index_put(places, images.to(embeddings.dtype))
        labels = batch.labels.new_full((len(totals), length), IGNORED)
        labels[rows[is_text], begins[is_text]] = batch.labels[is_text]
        positions = torch.arange(length, device=batch.ids.device)
        mask = positions >= (length - totals)[:, None] if pad_left else positions < totals[:, None]
        return Embedded(embeddings, mask.long(), labels)

    def logits(self, embedded: Embedded) -> Tensor:
        """Return the scores of the next token behind every position, (B, L, V)."""
        output = self.language_model(
            inputs_embeds=embedded.embeddings, attention_mask=embedded.mask, use_cache=False, return_dict=True
        )
        return cast(Tensor, output.logits)

    def loss_sum(self, batch: SequenceBatch) -> tuple[Tensor, int]:
        """Return the sum of the cross-entropies of the tokens that are learnt, and their number.

        A batch without images has a gradient of zero for the connector, also where nothing else is trained.
        """
        embedded = self.embed(batch)
        targets = embedded.labels[:, 1:]
        learnt = targets != IGNORED
        scores = self.logits(embedded)[:, :-1][learnt].float()
        total = F.cross_entropy(scores, targets[learnt], reduction="sum")
        if not len(batch.pixels):
            total = total + 0.0 * next(self.connector.parameters()).sum()
        return total, int(learnt.sum())

    @torch.no_grad()
    def generate(self, batch: SequenceBatch, how: Generation, eos_token_id: int, pad_token_id: int) -> Tensor:
        """Return the tokens that follow each sequence, (B, up to ``max_new_tokens``) int64.

        Args:
            batch: prompts, on the model's device.
            how: length and search.
            eos_token_id: token that ends an answer.
            pad_token_id: token that fills up what ended earlier.
        """
        embedded = self.embed(batch, pad_left=True)
        settings: dict[str, Any] = {} if how.num_beams == 1 else {"length_penalty": how.length_penalty}
        generated = self.language_model.generate(
            inputs_embeds=embedded.embeddings,
            attention_mask=embedded.mask,
            do_sample=False,
            num_beams=how.num_beams,
            max_new_tokens=how.max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            # A model's own settings for chats would change what is likeliest.
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_length=0,
            min_new_tokens=None,
            **settings,
        )
        return cast(Tensor, generated)
