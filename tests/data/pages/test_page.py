"""Pages that hold text of the web.

Oracle: ``html.parser``, which must give back the text that went in, and no element of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lcl_megatron.data.pages.page import (
    cards,
    element,
    join,
    jpeg_image,
    png_image,
    svg_image,
    table,
    visible,
    write_page,
)
from tests.html_page import assert_harmless, image_pixels, read_page

HOSTILE = "<script>alert(1)</script>&amp;\"'><img src=x onerror=alert(1)>"
PLAIN = "plain, \u4e2d\u6587, \u0627\u0644, caf\u00e9\n\tnew line"


def write(path: Path, *body: object) -> Path:
    path.write_text(write_page("A <b>title</b>", "p { color: red }", *body), encoding="utf-8")
    return path


def test_text_comes_back_and_never_as_markup(tmp_path: Path) -> None:
    body = (
        HOSTILE,
        element("p", HOSTILE, element("b", HOSTILE), title=HOSTILE),
        join(["a < b", element("i", 7)]),
        table([HOSTILE], [[HOSTILE, element("u", "u")]]),
        cards([(HOSTILE, HOSTILE, HOSTILE)]),
        svg_image(b"<svg/>", HOSTILE),
    )
    page = read_page(write(tmp_path / "page.html", *body))
    assert_harmless(page)
    (paragraph,) = page.all("p")
    assert paragraph.text == HOSTILE * 2
    assert paragraph.attributes["title"] == HOSTILE
    assert page.all("td")[0].text == HOSTILE
    assert page.all("img")[0].attributes["alt"] == HOSTILE
    assert [h.text for h in page.all("h1")] == ["A <b>title</b>"]
    assert {node.name for node in page.all("body")[0].all()} == {
        *("h1", "p", "b", "i", "u", "img", "div", "table", "tr", "th", "td", "span", "small")
    }


def test_attributes_are_named_as_in_html_and_left_out_when_none() -> None:
    assert element("a", "x", class_="c", data_id=5, title=None) == '<a class="c" data-id="5">x</a>'


def test_pixels_come_back(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    page = read_page(write(tmp_path / "page.html", png_image(pixels, "a"), jpeg_image(np.full_like(pixels, 80), "b")))
    exact, close = page.all("img")
    np.testing.assert_array_equal(image_pixels(exact), pixels)
    assert abs(image_pixels(close).astype(int) - 80).max() <= 2  # JPEG of one colour


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PLAIN, PLAIN),
        ("\x1b[31mred\x00", "\u241b[31mred\u2400"),
        ("\u202egnp.exe", "\ufffdgnp.exe"),
        ("half \ud83d of a pair", "half \ufffd of a pair"),
        ("\x7f\x9b", "\u2421\ufffd"),
    ],
)  # fmt: skip
def test_characters_that_do_something_are_shown_instead(text: str, expected: str) -> None:
    assert visible(text) == expected
    assert visible(text).encode("utf-8")
