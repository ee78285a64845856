"""A page that shows rows of a training step: every token, every image as it is cropped, what attends to what."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lcl_megatron.data.pages.page import Html, cards, counted, element, png_image, table, write_page
from lcl_megatron.data.pages.step_view import DocumentView, ImageView, RowView, StepView, TokenView, attention_mask

COLOURS = ("#3566b8", "#2e8b57", "#a8327d", "#7a6a00", "#b5541c", "#5b4bb0")
"""Documents of a row, in turn."""
PADDING_COLOUR = "#9a9a9a"
BADGES = {"bos": "BOS", "eos": "EOS", "boi": "BoI", "eoi": "EoI", "image": "image", "pad": "padding"}
"""What special tokens are called on the page."""
MASK_SIDE = 256
"""Fields of an attention picture in each direction."""
MAX_TABLE = 16
"""Micro-batches and ranks whose image counts are listed."""
LINE_BREAK = "\u23ce"
SILENT = "\u00b7"
"""Stands for a byte of a character that the last of its bytes shows."""


def write_step_page(view: StepView, path: Path) -> None:
    """Write the page: one HTML file without anything outside it."""
    settings = " \u00b7 ".join(f"{name} {value}" for name, value in view.settings.items())
    page = write_page(
        f"Step {view.selection.step:,} as training reads it",
        _STYLE,
        element("p", settings),
        cards(_header(view)),
        _image_table(view),
        _legend(),
        *(_row(row, view.num_latents) for row in view.rows),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _header(view: StepView) -> Iterator[tuple[str, object, str]]:
    layout, last = view.layout, view.first_row + view.global_batch_size - 1
    positions = view.global_batch_size * view.seq_length
    images, pairs = int(layout.num_images.sum()), int(layout.has_context.sum())
    per_rank = layout.num_images.sum(axis=0)
    yield "Rows of the step", f"{view.global_batch_size:,}", f"{view.first_row:,} to {last:,} of the run"
    yield "Row length", f"{view.seq_length:,}", f"an image takes {view.num_latents} + 2"
    yield "Filled", f"{layout.num_tokens / positions:.1%}", f"of {positions:,} positions"
    yield "Text targets", f"{layout.num_targets:,}", f"{layout.num_targets / positions:.1%} of the positions"
    yield "Images", f"{images:,}", f"{images / view.global_batch_size:.2f} per row"
    yield "Images with a context", f"{pairs:,}", "pairs, if all can be decoded"
    ranks, micro_batches = len(per_rank), len(layout.num_images)
    yield "Data-parallel ranks", f"{ranks:,}", f"{micro_batches:,} micro-batch{'es' * (micro_batches != 1)} each"
    if images:
        yield "Fullest rank", f"{per_rank.max() / per_rank.mean():.3f}", "of the mean number of images"


def _image_table(view: StepView) -> Html:
    """Return the number of images of every micro-batch on every rank."""
    counts = view.layout.num_images
    shown = counts[:MAX_TABLE, :MAX_TABLE]
    head = ("micro-batch", *(f"rank {rank}" for rank in range(shown.shape[1])), "all ranks")
    rows = ((number, *row, total) for number, (row, total) in enumerate(zip(shown, counts.sum(axis=1), strict=False)))
    title = "Images per micro-batch and data-parallel rank"
    if shown.shape != counts.shape:
        title += f", the first {shown.shape[0]} of {counts.shape[0]:,} and {shown.shape[1]} of {counts.shape[1]:,}"
    return element("details", element("summary", title), table(head, rows))


def _legend() -> Html:
    items = (
        (element("span", "word", class_="t target"), "a token that is predicted (loss mask)"),
        (element("span", "word", class_="t"), "a token that is not"),
        (element("b", "BOS", class_="badge"), "special token"),
        (element("b", "BoI", class_="badge context"), "is a context: contrasted with its image"),
        (element("b", "BoI", class_="badge"), "is not"),
        (element("span", SILENT, class_="t silent"), "a byte of the character behind it"),
    )
    note = (
        "Point at a token for its id, flat position (row in the micro-batch x row length + position), position id and "
        "label."
    )
    return element("div", *(element("span", *item) for item in items), element("span", note), class_="legend")


def _row(row: RowView, num_latents: int) -> Html:
    """Return a row: facts, ruler, attention picture, documents."""
    used = len(row.tokens) - row.num_padding
    facts = (
        f"epoch {row.epoch} \u00b7 micro-batch {row.micro_batch}, row {row.number} \u00b7 "
        f"{used:,} of {len(row.tokens):,} positions filled ({used / len(row.tokens):.1%}) \u00b7 "
        f"{counted(len(row.images), 'image')}, {row.num_pairs} contrasted \u00b7 {row.num_targets:,} text targets"
    )
    colours = [colour for _, colour in _coloured(row)]
    mask = element(
        "figure",
        png_image(_mask_picture(row, colours), "attention mask", class_="mask"),
        element("figcaption", "who sees whom: queries downwards, keys to the right"),
    )
    overview = element("div", element("p", facts), _ruler(row, num_latents), _contents(row))
    return element(
        "section",
        element("h2", f"Row {row.index:,}"),
        element("div", overview, mask, class_="overview"),
        *(_document(document, colour, _anchor(row, i)) for i, (document, colour) in enumerate(_coloured(row))),
    )


def _coloured(row: RowView) -> Iterator[tuple[DocumentView, str]]:
    for document, colour in zip(row.documents, itertools.cycle(COLOURS), strict=False):
        yield document, colour if document.source else PADDING_COLOUR


def _contents(row: RowView) -> Html:
    """Return the row's documents, each with a link to it."""
    items = []
    for number, (document, colour) in enumerate(_coloured(row)):
        link = element("a", document.source or "padding", href=f"#{_anchor(row, number)}")
        sizes = [counted(len(document.tokens), "token")]
        if document.source:
            sizes.append(counted(len(document.images), "image"))
        dot = element("i", style=f"background:{colour}")
        items.append(element("li", dot, link, *(f" \u00b7 {size}" for size in sizes)))
    return element("ol", *items)


def _anchor(row: RowView, number: int) -> str:
    return f"row-{row.index}-{number}"


def _ruler(row: RowView, num_latents: int) -> Html:
    """Return the row in one bar: documents, images in them, padding."""
    first = row.tokens[0].flat_position
    marks = []
    for document, colour in _coloured(row):
        begin, length = document.tokens[0].flat_position - first, len(document.tokens)
        title = element("title", f"{document.source or 'padding'}: {length:,} positions from {begin:,} on")
        fill = {"fill": colour, "fill_opacity": "0.28" if document.source else "0.15"}
        marks.append(element("rect", title, x=begin, y=0, width=length, height=40, **fill))
        marks.append(element("rect", x=begin, y=0, width=max(1, len(row.tokens) // 800), height=40, fill=colour))
        for image in document.images:
            place = image.first_latent - first
            title = element("title", f"{image.source}: {num_latents} positions from {place:,} on")
            marks.append(element("rect", title, x=place, y=8, width=num_latents, height=24, fill=colour))
    return element(
        "svg", *marks, viewBox=f"0 0 {len(row.tokens)} 40", preserveAspectRatio="none", class_="ruler", role="img"
    )


def _mask_picture(row: RowView, colours: list[str]) -> np.ndarray:
    """Return the attention mask, (side, side, 3) uint8, every document in its colour."""
    mask = attention_mask(row, MASK_SIDE)
    lengths = [len(document.tokens) for document in row.documents]
    rgb = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in colours])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    ink = rgb[owner[len(owner) * np.arange(len(mask)) // len(mask)]]
    return np.rint(255 + mask[:, :, None] * (ink[:, None] - 255.0)).astype(np.uint8)


def _document(document: DocumentView, colour: str, anchor: str) -> Html:
    """Return a document, or padding: a heading and all its positions in order."""
    tokens, images = document.tokens, {image.first_latent: image for image in document.images}
    heading = (
        f"{document.source or 'padding'} \u00b7 {len(tokens):,} tokens"
        + f" from its token {document.begin:,} on" * (document.begin > 0)
        + f" \u00b7 flat positions {tokens[0].flat_position:,} to {tokens[-1].flat_position:,}"
    )
    contexts = {image.boi_position: image for image in document.images}
    pieces: list[Html] = []
    for special, run in itertools.groupby(tokens, key=lambda token: token.special):
        if special == "image":
            # Images may meet without a token between only if something is wrong; each is shown all the same.
            pieces.extend(_image(part, images.get(part[0].flat_position)) for part in _split(run, images))
        elif special == "pad":
            pieces.append(_run(list(run), "positions of padding", "padding"))
        elif special:
            pieces.extend(_badge(token, contexts.get(token.flat_position)) for token in run)
        else:
            pieces.extend(_token(token) for token in run)
    return element(
        "article", element("h3", heading), element("div", *pieces), id=anchor, style=f"border-color:{colour}"
    )


def _split(run: Iterable[TokenView], images: dict[int, ImageView]) -> Iterator[list[TokenView]]:
    """Yield the positions of image latents, image by image."""
    part: list[TokenView] = []
    for token in run:
        if part and token.flat_position in images:
            yield part
            part = []
        part.append(token)
    yield part


def _token(token: TokenView) -> Html:
    text = token.text.replace("\n", LINE_BREAK) or SILENT
    classes = "t" + " target" * token.is_target + " silent" * (not token.text)
    return element("span", text, class_=classes, **_data([token]))


def _badge(token: TokenView, image: ImageView | None) -> Html:
    classes = "badge" + " target" * token.is_target + " context" * (image is not None and image.is_pair)
    return element("b", BADGES[token.special], class_=classes, **_data([token]))


def _run(tokens: list[TokenView], what: str, class_: str) -> Html:
    return element("span", f"{len(tokens):,} {what}", class_=class_, **_data(tokens))


def _data(tokens: list[TokenView]) -> dict[str, object]:
    """Return the attributes that say which positions an element stands for."""
    token, count = tokens[0], len(tokens)
    label = "no label" if token.label is None else f"label {token.label}"
    to = f" to {tokens[-1].flat_position}" if count > 1 else ""
    to_id = f" to {tokens[-1].position_id}" if count > 1 else ""
    return {
        "data_id": token.token,
        "data_count": count if count > 1 else None,
        "title": f"id {token.token} \u00b7 flat {token.flat_position}{to} \u00b7 position {token.position_id}{to_id} "
        f"\u00b7 {label}" + " \u00b7 is predicted" * token.is_target,
    }


def _image(latents: list[TokenView], image: ImageView | None) -> Html:
    """Return an image in the place of its latents."""
    run = _run(latents, "latents", "latents")
    if image is None:
        return element("span", run, class_="image bad")
    if image.error:
        state = element("span", f"cannot be decoded, blank: {image.error}", class_="wrong")
    elif image.no_context:
        state = element("span", f"not contrasted: {image.no_context}", class_="quiet")
    else:
        state = element("span", "contrasted with its BoI", class_="good")
    number = image.source.partition(" image ")[2]
    facts: list[Html] = [element("span", f"image {number}" if number else image.source, class_="name"), state]
    if image.crop is not None:
        crop = image.crop
        size = f"{crop.width} x {crop.height} at ({crop.left}, {crop.top}) of {image.width} x {image.height}"
        facts += [element("span", _crop_scheme(image), size)]
    facts += [element("span", f"similarity {image.similarity:.3f}"), element("span", f"key {image.key}"), run]
    pixels = png_image(image.pixels.permute(1, 2, 0).numpy(), image.source, title=image.source)
    return element(
        "span", pixels, element("span", *facts, class_="facts"), class_="image bad" if image.error else "image"
    )


def _crop_scheme(image: ImageView) -> Html:
    """Return a small drawing of the crop in its image."""
    assert image.crop is not None
    top, left, height, width = image.crop
    outer = element("rect", x=0, y=0, width=image.width, height=image.height, fill="#f0b357")
    inner = element("rect", x=left, y=top, width=width, height=height, fill="#3566b8")
    return element("svg", outer, inner, viewBox=f"0 0 {image.width} {image.height}", class_="crop", role="img")


_STYLE = """
details { margin: 1rem 0 } summary { cursor: pointer; color: #555 }
section { border-top: 2px solid #ddd; margin-top: 2rem }
.overview { display: grid; grid-template-columns: 1fr 160px; gap: 1.5rem; align-items: start }
.overview p { margin-top: 0 } .overview a { color: inherit }
.overview ol { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1.6rem; font-size: .82rem;
               color: #555; margin: .7rem 0 0 }
.overview i { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .4rem }
.overview figcaption { font-size: .75rem; line-height: 1.2 }
.ruler { width: 100%; height: 44px; border: 1px solid #ddd; border-radius: 4px; display: block }
.mask { width: 158px; height: 158px; border: 1px solid #ddd; image-rendering: pixelated; display: block }
article { border-left: 4px solid; padding: .1rem 0 .4rem .9rem; margin: .9rem 0 }
article h3 { font-size: .82rem; font-weight: 600; color: #666; margin: .2rem 0 .4rem }
article > div { line-height: 1.95 }
.t { white-space: pre-wrap; unicode-bidi: isolate; padding: 1px 0 2px; margin-right: 1px; color: #777 }
.t.target { color: #222; border-bottom: 2px solid #9db8e6 }
.t.silent { color: #bbb }
.t:hover, .badge:hover, .latents:hover { background: #ffe9b8 }
.badge { font-size: .68rem; font-weight: 600; background: #eee; color: #666; border-radius: 4px; padding: 1px 5px;
         margin: 0 2px; vertical-align: 1px; border-bottom: 2px solid transparent }
.badge.target { border-bottom-color: #9db8e6 } .badge.context { background: #cfead9; color: #1d6b3f }
.padding { display: inline-block; font-size: .8rem; color: #777; padding: 2px 14px; border-radius: 4px; width: 90%;
           background: repeating-linear-gradient(-45deg, #f4f4f4 0 6px, #e9e9e9 6px 12px) }
.image { display: flex; gap: 12px; width: fit-content; max-width: 100%; margin: 5px 0; padding: 6px; color: #555;
         border: 1px solid #ddd; border-radius: 6px; background: #fafafa; line-height: 1.35; font-size: .78rem }
.image img { width: 168px; height: 168px; border-radius: 3px }
.image.bad { border: 2px solid #c33; background: #fff4f4 }
.facts { display: flex; flex-direction: column; gap: 3px; min-width: 200px; max-width: 420px }
.facts .name { color: #222; font-weight: 600 } .latents { color: #888; width: fit-content }
.crop { height: 44px; max-width: 120px; vertical-align: middle; margin-right: 8px }
.wrong { color: #a11 } .quiet { color: #8a5a00 } .good { color: #1d6b3f }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; color: #555; font-size: .84rem; margin: 1rem 0 }
.legend > span > :first-child { margin-right: .5rem }
"""
