"""Rows of a training step as plain text, for a terminal: no character of the data can steer it."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator

from lcl_megatron.data.pages.page import visible
from lcl_megatron.data.pages.step_view import DocumentView, ImageView, RowView, StepView

WIDTH = 110
"""Columns."""
MAX_RUN = 240
"""Characters that are shown of a stretch of text between two special tokens."""


def render_step(view: StepView) -> str:
    """Return the step's totals and the rows that were asked for, long texts shortened."""
    layout, last = view.layout, view.first_row + view.global_batch_size - 1
    positions = view.global_batch_size * view.seq_length
    counts = layout.num_images
    lines = [
        f"step {view.selection.step}: rows {view.first_row} to {last}, {layout.num_tokens / positions:.1%} of "
        f"{positions:,} positions filled",
        f"{layout.num_targets:,} text targets, {counts.sum():,} images, {layout.has_context.sum():,} with a context",
        f"images per micro-batch and rank ({counts.shape[0]} x {counts.shape[1]}): {counts.min()} to {counts.max()}, "
        f"mean {counts.mean():.1f}",
    ]
    for row in view.rows:
        lines += ["", *_row(row)]
    return visible("\n".join(lines))


def _row(row: RowView) -> Iterator[str]:
    used = len(row.tokens) - row.num_padding
    yield (
        f"row {row.index}: epoch {row.epoch}, micro-batch {row.micro_batch}, row {row.number}; "
        f"{used / len(row.tokens):.1%} filled; images {len(row.images)}, contrasted {row.num_pairs}, "
        f"targets {row.num_targets:,}"
    )
    for document in row.documents:
        first, last = document.tokens[0].flat_position, document.tokens[-1].flat_position
        cut = f" from its token {document.begin} on" * (document.begin > 0)
        size = f"{len(document.tokens):,} tokens{cut}"
        yield f"  {document.source or 'padding'}: {size}, flat positions {first} to {last}"
        if document.source:
            yield from textwrap.wrap(
                " ".join(_pieces(document)), WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 4
            )


def _pieces(document: DocumentView) -> Iterator[str]:
    """Yield texts, special tokens and images of a document, in order."""
    images = {image.first_latent: image for image in document.images}
    contexts = {image.boi_position for image in document.images if image.is_pair}
    for special, run in itertools.groupby(document.tokens, key=lambda token: token.special):
        tokens = list(run)
        if special == "image":
            found = [images[token.flat_position] for token in tokens if token.flat_position in images]
            yield from (f"[{_image(image)}; {len(tokens)} latents]" for image in found)
        elif special == "boi":
            yield "<BoI: context>" if tokens[0].flat_position in contexts else "<BoI>"
        elif special:
            yield f"<{special.upper()}>".replace("EOI", "EoI")
        else:
            text = " ".join("".join(token.text for token in tokens).split())
            yield text if len(text) <= MAX_RUN else f"{text[:MAX_RUN]} (... {len(text) - MAX_RUN:,} more characters)"


def _image(image: ImageView) -> str:
    facts = [image.source.partition(" image ")[2] or image.source, f"similarity {image.similarity:.3f}"]
    if image.crop is not None:
        crop = image.crop
        facts.append(
            f"crop {crop.width} x {crop.height} at ({crop.left}, {crop.top}) of {image.width} x {image.height}"
        )
    if image.error:
        facts.append(f"BAD: {image.error}")
    elif image.no_context:
        facts.append(f"not contrasted: {image.no_context}")
    return "image " + ", ".join(facts)
