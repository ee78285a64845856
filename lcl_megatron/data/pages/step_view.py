"""What the rows of a step look like to the model: the batch that training reads, told apart for a reader.

Nothing is composed, cropped or decided here. The tensors are those of ``collate_rows`` and ``add_images``; the corpus
adds only where things come from.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lcl_megatron.config.errors import require
from lcl_megatron.data.batch import PackedBatch, StepLayout
from lcl_megatron.data.collate import CollatedRows, collate_rows
from lcl_megatron.data.decoding.image_decoder import CpuDecoder
from lcl_megatron.data.decoding.images import Box, TrainingTransform
from lcl_megatron.data.loader import add_images
from lcl_megatron.data.planning.plan import Plan
from lcl_megatron.data.planning.rows import PlannedRow

NO_CONTEXT = {
    "content": "no text and no image stands before it in its document",
    "index": "it stands at position 0 of its document",
}
"""Why an image is not contrasted, by ``data.context_rule``."""
CUT_BEFORE = "what stands before it in its document is in another row"
"""Why an image with which a row continues a document is not contrasted."""


@dataclass(frozen=True)
class Selection:
    """Which rows are looked at."""

    step: int = 0
    """Optimizer step, from 0."""
    rows: int = 4
    """Rows to show, the first ones of the rank from ``micro_batch`` on."""
    dp_rank: int = 0
    """Data-parallel rank whose rows are shown."""
    micro_batch: int = 0
    """Micro-batch to begin with."""


@dataclass(frozen=True)
class TokenView:
    """One position of a row."""

    token: int
    """Token id."""
    flat_position: int
    """Row in the micro-batch times row length, plus position in the row."""
    position_id: int
    """Position in the document."""
    text: str
    """What it stands for in the text; empty for special tokens and for all but the last byte of a character."""
    special: str
    """``bos``, ``eos``, ``pad``, ``boi``, ``eoi`` or ``image``; empty for text."""
    is_target: bool
    """Whether it is predicted: ``loss_mask`` of the position before it."""
    label: int | None
    """What this position predicts; None where ``loss_mask`` is False."""


@dataclass(frozen=True)
class ImageView:
    """One image slot."""

    pixels: Tensor
    """(3, size, size) uint8, what the encoder reads."""
    boi_position: int
    """Flat position of its ``<BoI>``."""
    first_latent: int
    """Flat position of its first latent."""
    source: str
    """File, line, number and name."""
    key: int
    """Image key, which seeds the crop."""
    width: int
    """Pixels of the whole image, by its header; 0 if unknown."""
    height: int
    """Pixels of the whole image, by its header; 0 if unknown."""
    crop: Box | None
    """The part that is shown; None if the size is unknown or the image could not be decoded."""
    similarity: float
    """CLIP similarity to its text."""
    error: str
    """Why it could not be decoded; empty for a good image."""
    no_context: str
    """Why its ``<BoI>`` is no context to contrast it with; empty if it is one."""

    @property
    def is_pair(self) -> bool:
        """Whether the image and its context form a contrastive pair."""
        return not (self.error or self.no_context)


@dataclass(frozen=True)
class DocumentView:
    """A document in a row, or the padding at the row's end."""

    source: str
    """File and line; empty for padding."""
    begin: int
    """Tokens of the document that stand before, in another row (layout ``window``); 0 = it begins here."""
    tokens: tuple[TokenView, ...]
    """All its positions."""
    images: tuple[ImageView, ...]
    """Its images, in order."""


@dataclass(frozen=True)
class RowView:
    """One row."""

    index: int
    """Number in the run's sequence of rows."""
    epoch: int
    """Epoch of its documents."""
    micro_batch: int
    """Number of its micro-batch."""
    number: int
    """Its place in the micro-batch."""
    documents: tuple[DocumentView, ...]
    """Documents in order; the last one may be padding."""

    @property
    def images(self) -> tuple[ImageView, ...]:
        """All images of the row."""
        return tuple(image for document in self.documents for image in document.images)

    @property
    def tokens(self) -> tuple[TokenView, ...]:
        """All positions of the row."""
        return tuple(token for document in self.documents for token in document.tokens)

    @property
    def num_padding(self) -> int:
        """Positions without a document."""
        return sum(token.special == "pad" for token in self.tokens)

    @property
    def num_targets(self) -> int:
        """Positions whose next token is predicted."""
        return sum(token.label is not None for token in self.tokens)

    @property
    def num_pairs(self) -> int:
        """Images that form a contrastive pair."""
        return sum(image.is_pair for image in self.images)


@dataclass(frozen=True)
class StepView:
    """A step, and some of its rows."""

    selection: Selection
    """What was asked for."""
    first_row: int
    """Rows consumed before the step."""
    layout: StepLayout
    """Counts of the whole step on all ranks."""
    seq_length: int
    """Positions of a row."""
    global_batch_size: int
    """Rows of the step."""
    num_latents: int
    """Latents of an image."""
    settings: dict[str, object]
    """What else decided the rows, for the heading."""
    rows: tuple[RowView, ...]
    """The rows that were asked for."""


def view_step(plan: Plan, image_size: int, selection: Selection) -> StepView:
    """Read rows of a step as training does, with their images.

    Args:
        plan: The order of the run.
        image_size: Side of the encoder's images, in pixels.
        selection: Which rows; whole micro-batches are read until there are enough.

    Raises:
        ConfigError: If there is no such step, rank or micro-batch.
        CorpusError: If the corpus is damaged.
    """
    _check(plan, selection)
    step = plan.step(selection.step)
    sequence, config = plan.sequence, plan.sequence.config
    transform = TrainingTransform(
        size=image_size,
        seed=sequence.seed,
        crop_scale=config.crop_scale,
        crop_ratio=config.crop_ratio,
        max_pixels=config.max_image_pixels,
    )
    rows: list[RowView] = []
    for number, planned in enumerate(step.micro_batches(selection.dp_rank)):
        if number >= selection.micro_batch and len(rows) < selection.rows:
            rows.extend(_MicroBatch.read(plan, number, planned, transform).rows())
    return StepView(
        selection=selection,
        first_row=step.first_row,
        layout=step.layout,
        seq_length=config.seq_length,
        global_batch_size=plan.global_batch_size,
        num_latents=sequence.num_latents,
        settings={
            "data": ", ".join(str(source.corpus.path) for source in sequence.sources),
            "view": ", ".join(config.view),
            "layout": config.layout,
            "seed": sequence.seed,
            "image size": image_size,
            "crop scale": config.crop_scale,
            "crop ratio": tuple(round(value, 3) for value in config.crop_ratio),
            "smallest similarity": config.min_similarity,
            "images per document": config.max_images_per_document,
            "context rule": config.context_rule,
        },
        rows=tuple(rows[: selection.rows]),
    )


@dataclass(frozen=True)
class _MicroBatch:
    """A micro-batch with its images, and the objects that it was read from."""

    plan: Plan
    number: int
    planned: tuple[PlannedRow, ...]
    transform: TrainingTransform
    collated: CollatedRows
    batch: PackedBatch
    bad: list[str]

    @classmethod
    def read(
        cls, plan: Plan, number: int, planned: tuple[PlannedRow, ...], transform: TrainingTransform
    ) -> _MicroBatch:
        """Read a micro-batch by the functions that the loader calls."""
        collated = collate_rows(plan.sequence, planned)
        batch, bad = add_images(collated, plan.sequence, CpuDecoder(transform))
        return cls(plan, number, planned, transform, collated, batch, bad)

    def rows(self) -> Iterator[RowView]:
        """Yield all rows."""
        seq_length = self.batch.tokens.shape[1]
        tokens, borders = self._tokens(), self.batch.cu_seqlens.tolist()
        for number, row in enumerate(self.planned):
            inside = range(number * seq_length, (number + 1) * seq_length)
            spans = [(a, b) for a, b in itertools.pairwise(borders) if a in inside]
            documents = tuple(self._document(row, i, tokens[a:b]) for i, (a, b) in enumerate(spans))
            yield RowView(row.index, row.epoch, self.number, number, documents)

    def _document(self, row: PlannedRow, number: int, tokens: list[TokenView]) -> DocumentView:
        """Return a document of a row, or the padding behind the last one."""
        if number == len(row.documents):
            return DocumentView("", 0, tuple(tokens), ())
        begin = 0 if row.begins is None else int(row.begins[number])
        places = range(tokens[0].flat_position, tokens[-1].flat_position + 1)
        slots = [i for i in range(self.batch.num_images) if int(self.batch.context_slots[i]) in places]
        return DocumentView(
            source=self.plan.sequence.document_source(row, number),
            begin=begin,
            tokens=tuple(tokens),
            images=tuple(self._image(slot, begin > 0) for slot in slots),
        )

    def _tokens(self) -> list[TokenView]:
        """Return every position of the micro-batch."""
        batch, tokenizer = self.batch, self.plan.sequence.sources[0].corpus.tokenizer
        names = {token: name for name, token in dataclasses.asdict(tokenizer.special_tokens).items()}
        ids = batch.tokens.reshape(-1).tolist()
        loss_mask, labels = batch.loss_mask.reshape(-1).tolist(), batch.labels.reshape(-1).tolist()
        positions = batch.position_ids.reshape(-1).tolist()
        texts = tokenizer.surfaces(ids)
        is_target = [False, *loss_mask[:-1]]
        return [
            TokenView(
                token=token,
                flat_position=place,
                position_id=positions[place],
                text=texts[place],
                special=names.get(token, ""),
                is_target=is_target[place],
                label=labels[place] if loss_mask[place] else None,
            )
            for place, token in enumerate(ids)
        ]

    def _image(self, slot: int, is_cut: bool) -> ImageView:
        """Return one image slot; ``is_cut`` says that its document began in another row."""
        batch, sequence = self.batch, self.plan.sequence
        image, key = int(self.collated.images[slot]), int(batch.image_keys[slot])
        source, is_ok = sequence.image_source(image), bool(batch.image_ok[slot])
        corpus, own = sequence.find_image(image)
        width, height = int(corpus.image_width[own]), int(corpus.image_height[own])
        no_context = CUT_BEFORE if is_cut else NO_CONTEXT[sequence.config.context_rule]
        errors = [line.removeprefix(f"{source}: ") for line in self.bad if line.startswith(f"{source}: ")]
        assert batch.images is not None
        return ImageView(
            pixels=batch.images[slot],
            boi_position=int(batch.context_slots[slot]),
            first_latent=int(batch.image_slots[slot]),
            source=source,
            key=key,
            width=width,
            height=height,
            crop=self.transform.box(key, height, width) if is_ok and width and height else None,
            similarity=float(corpus.image_similarity[own]),
            error="" if is_ok else (errors or ["cannot be decoded"])[0],
            no_context="" if batch.has_context[slot] else no_context,
        )


def _check(plan: Plan, selection: Selection) -> None:
    require(selection.step >= 0, f"step {selection.step}: steps are numbered from 0")
    require(selection.rows >= 1, f"{selection.rows} rows: at least 1 is shown")
    for name, value, limit in (
        ("dp_rank", selection.dp_rank, plan.data_parallel_size),
        ("micro_batch", selection.micro_batch, plan.num_micro_batches),
    ):
        require(
            0 <= value < limit,
            f"{name} = {value}: the step has {limit} of them, numbered from 0; more processes (--world-size) give more "
            "data-parallel ranks and fewer micro-batches",
        )


def attention_mask(row: RowView, size: int) -> np.ndarray:
    """Return which positions of a row see which, as a small picture.

    Args:
        row: The row.
        size: Side of the picture at most; a longer row is averaged.

    Returns:
        (side, side) float in [0, 1], share of the (query, key) pairs of each field that attend; queries downwards.
    """
    lengths = [len(document.tokens) for document in row.documents]
    first = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    total = len(first)
    side = min(size, total)
    edges = total * np.arange(side + 1) // side
    keys = np.arange(total)
    mask = np.empty((side, side))
    for field, (begin, end) in enumerate(itertools.pairwise(edges)):
        queries = np.arange(begin, end)[:, None]
        seen = ((first[begin:end, None] <= keys) & (keys <= queries)).mean(axis=0)
        mask[field] = np.add.reduceat(seen, edges[:-1]) / np.diff(edges)
    return mask
