"""HTML pages of one file, in which no text from the web can become markup.

Everything that is not ``Html`` is escaped where it enters an element, so a forgotten call cannot let a script in. The
page's own policy forbids scripts and whatever would be fetched, so it also opens without a network.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy of every page."""
VOID = {"img", "meta"}
"""Elements without an end tag."""
VISIBLE = (
    {code: 0x2400 + code for code in range(32) if code not in (0x09, 0x0A)}
    | {0x7F: 0x2421}
    | dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)
    | dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
)
"""Characters that are shown as a sign: control characters, which may steer a terminal; marks that reverse the
direction of what follows, which may hide it; lone surrogates, which cannot be written."""


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, /, *content: object, **attributes: object) -> Html:
    """Return an element; content and attribute values are escaped unless they are ``Html``.

    Args:
        name: Name of the element.
        content: What stands inside, one after the other.
        attributes: Attributes, ``class_`` for ``class`` and ``data_id`` for ``data-id``; None = none.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>" + ("" if name in VOID else f"{join(content)}</{name}>"))


def join(content: Iterable[object]) -> Html:
    """Return the pieces one behind the other, escaped unless they are ``Html``."""
    return Html("".join(piece if isinstance(piece, Html) else escape(piece) for piece in content))


def escape(value: object) -> Html:
    """Return text as it may stand inside an element or a quoted attribute."""
    return Html(html.escape(visible(str(value)), quote=True))


def visible(text: str) -> str:
    """Return a text in which every character can be seen and does nothing (see ``VISIBLE``)."""
    return text.translate(VISIBLE)


def counted(number: int, what: str) -> str:
    """Return ``1 image`` or ``2,000 images``."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def table(head: Iterable[object], rows: Iterable[Iterable[object]], class_: str | None = None) -> Html:
    """Return a table that scrolls sideways where it is too wide."""
    lines = [element("tr", *(element("th", cell) for cell in head))]
    lines += [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    return element("div", element("table", *lines, class_=class_), class_="scroll")


def cards(figures: Iterable[tuple[str, object, str]]) -> Html:
    """Return header figures: (what, value, remark) each."""
    items = (
        element("div", element("span", what), element("b", value), element("small", remark))
        for what, value, remark in figures
    )
    return element("div", *items, class_="cards")


def svg_image(svg: bytes, description: str) -> Html:
    """Return a drawing; as an image, so that nothing inside it is part of the page."""
    data = base64.b64encode(svg).decode("ascii")
    return element("img", alt=description, src=f"data:image/svg+xml;base64,{data}")


def png_image(pixels: np.ndarray, description: str, **attributes: object) -> Html:
    """Return (height, width) or (height, width, 3) uint8 pixels as they are, without loss."""
    return _encoded(pixels, "PNG", description, attributes)


def jpeg_image(pixels: np.ndarray, description: str, **attributes: object) -> Html:
    """Return (height, width, 3) uint8 pixels, compressed: for thumbnails."""
    return _encoded(pixels, "JPEG", description, attributes)


def write_page(title: str, style: str, *body: object) -> str:
    """Return a whole page.

    Args:
        title: Title and main heading.
        style: CSS beside that of all pages.
        body: What stands under the heading.
    """
    head = (
        Html('<meta charset="utf-8">'),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        element("title", title),
        element("style", Html(STYLE + style)),
    )
    page = element("html", element("head", *head), element("body", element("h1", title), *body), lang="en")
    return f"<!doctype html>\n{page}\n"


def _encoded(pixels: np.ndarray, kind: str, description: str, attributes: dict[str, object]) -> Html:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return element("img", alt=description, src=f"data:image/{kind.lower()};base64,{data}", **attributes)


STYLE = """
body { font: 15px/1.45 system-ui, "Noto Sans", sans-serif; color: #222; background: #fff; max-width: 1500px;
       margin: 2rem auto; padding: 0 1.2rem; overflow-wrap: break-word }
h1 { font-size: 1.5rem; margin-bottom: .3rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p { color: #555; max-width: 75rem } code { font-size: .9em; color: #444 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(185px, 1fr)); gap: .7rem; margin: 1.2rem 0 }
.cards > div { border: 1px solid #e2e2e2; border-radius: 8px; padding: .55rem .8rem; background: #fafafa }
.cards span, .cards small { display: block; color: #666; font-size: .82rem }
.cards b { font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums }
.drawings { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1rem }
.drawings img { width: 100% }
figure { margin: 0 } figcaption { color: #555; font-size: .84rem; padding: 0 .4rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #e6e6e6 }
th { font-weight: 600; color: #444 }
th:first-child, td:first-child { text-align: left }
table.words th, table.words td { text-align: left; vertical-align: top }
"""
