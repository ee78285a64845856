"""A page as ``html.parser`` of the standard library sees it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

VOID = {"img", "meta", "br", "hr", "link", "input"}
ADDRESSES = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")


@dataclass
class Node:
    """An element."""

    name: str
    attributes: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text inside."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, name: str = "", class_: str = "") -> list[Node]:
        """Every element inside of some name and class, in order."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                classes = child.attributes.get("class", "").split()
                if name in ("", child.name) and (not class_ or class_ in classes):
                    found.append(child)
                found += child.all(name, class_)
        return found


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {key: value or "" for key, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read_page(path: Path) -> Node:
    """Parse a page; every element must be closed."""
    parser = _Parser()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == [parser.root], "elements are left open"
    return parser.root


def assert_harmless(page: Node) -> None:
    """Nothing runs, nothing is fetched."""
    nodes = page.all()
    assert not {node.name for node in nodes} & {"script", "iframe", "object", "embed", "link", "base", "form"}
    for node in nodes:
        assert not [key for key in node.attributes if key.startswith("on")]
        for key in ADDRESSES:
            assert node.attributes.get(key, "#").startswith(("#", "data:image/")), node.attributes
        assert "url(" not in node.attributes.get("style", "")
    (policy,) = [node for node in page.all("meta") if node.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy.attributes["content"].startswith("default-src 'none'")


def image_pixels(image: Node) -> np.ndarray:
    """Decode an ``img`` with its data inside, (height, width, channels) uint8."""
    encoded = image.attributes["src"].partition(";base64,")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
