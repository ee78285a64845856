"""Tables of image-caption pairs: CC3M, Flickr, plain two-column files, and files with a header (OpenCLIP's csv).

What the columns are is decided once, from the first line of a file, and holds for all of its lines::

    title<TAB>filepath              a header: one image and one caption column by name, fields quoted as in CSV
    a red boat .<TAB>https://...    CC3M: two columns, the second one is a URL or a file name
    7.jpg#0<TAB>A red boat .        Flickr: the first one is a file name, with the number of the caption
    7.jpg<TAB>A red boat.           the same without a number

Only header files know quotes. In the others a quote is a quote, and all further tabs belong to the caption.
Where the first line does not say it, the formats ``tsv-image-caption`` and ``tsv-caption-image`` do.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.document import Document, Reject
from lcl_megatron.data.image_stores.image_folder import is_url
from lcl_megatron.data.readers.lines import Line, read_lines
from lcl_megatron.data.readers.records import RecordError, assemble_pair, decode, get_similarity

IMAGE_COLUMNS = ("filepath", "image", "image_name", "image_path", "file_name", "filename", "url")
CAPTION_COLUMNS = ("title", "caption", "text")
SIMILARITY_COLUMN = "similarity"
IMAGE_NAME = re.compile(r"[^\t]+\.(?:jpe?g|png|webp|gif)", re.IGNORECASE)
CAPTION_NUMBER = re.compile(r"#\d+$")
MAX_RECORD_LINES = 100
"""Lines that one quoted record may take; a quote that is never closed must not swallow the file."""


@dataclass(frozen=True)
class Layout:
    """What the lines of a file without a header hold."""

    image_first: bool
    """Whether the image is the first column; else the caption is."""
    numbered: bool = False
    """Whether image names end in ``#k``, the number of the caption, which is not part of the name."""

    def split(self, text: str) -> tuple[str, str]:
        """Return image name and caption of a line; raises ``RecordError``."""
        first, tab, second = text.partition("\t") if self.image_first else text.rpartition("\t")
        if not tab:
            raise RecordError("wrong number of columns", "1; expected 2 with a tab between them")
        name, caption = (first, second) if self.image_first else (second, first)
        name = name.strip()
        return CAPTION_NUMBER.sub("", name) if self.numbered else name, caption


@dataclass(frozen=True)
class Header:
    """Where the columns of a file with a header are."""

    delimiter: str
    """Tab, or comma if the header has no tab."""
    columns: int
    """Number of columns."""
    image: int
    """Index of the image's column."""
    caption: int
    """Index of the caption's column."""
    similarity: int | None
    """Index of column ``similarity``, if there is one."""

    def pick(self, fields: list[str]) -> tuple[str, str, float]:
        """Return image name, caption and similarity of a record; raises ``RecordError``."""
        if len(fields) != self.columns:
            raise RecordError("wrong number of columns", f"{len(fields)}; the header has {self.columns}")
        similarity = 1.0
        if self.similarity is not None and fields[self.similarity].strip():
            similarity = _number(fields[self.similarity])
        return fields[self.image].strip(), fields[self.caption], similarity


def read_tsv(shard: Path, name: str = "", layout: Layout | None = None) -> Iterator[Document | Reject]:
    """Yield one document for every line, and a reject for everything that is left out.

    Args:
        shard: Text file, ``.gz``, or ``.zip`` of text files.
        name: What the shard is called in messages and in the corpus; empty = its file name.
        layout: What the lines hold; None = the first line says it.

    Raises:
        ConfigError: If the first line does not say which column is which.
        OSError: If the shard cannot be read, or is a damaged zip or gzip file.
    """
    for path, lines in itertools.groupby(read_lines(shard, name), key=lambda line: line.source.path):
        yield from _read_file(lines, path, layout)


def _read_file(lines: Iterator[Line], path: str, layout: Layout | None) -> Iterator[Document | Reject]:
    first = next(lines)
    header = _header(first) if layout is None else None
    if header is not None:
        yield from _read_records(lines, header)
    else:
        yield from _read_pairs(itertools.chain([first], lines), layout or _layout(first, path))


def _read_pairs(lines: Iterator[Line], layout: Layout) -> Iterator[Document | Reject]:
    for line in lines:
        try:
            image, caption = layout.split(decode(line.raw(), "the line").rstrip("\r\n"))
        except RecordError as error:
            yield Reject(line.source, error.reason, error.detail)
        else:
            yield from assemble_pair(image, caption, 1.0, line.source)


def _read_records(lines: Iterator[Line], header: Header) -> Iterator[Document | Reject]:
    pending: deque[Line] = deque()
    while True:
        taken: list[Line] = []
        try:
            fields = next(csv.reader(_texts(lines, pending, taken), delimiter=header.delimiter, strict=True))
        except StopIteration:
            return
        except (RecordError, csv.Error) as error:
            known = error if isinstance(error, RecordError) else RecordError("malformed CSV", str(error))
            yield Reject(taken[0].source, known.reason, known.detail)
            # The lines that an open quote has taken are read again, each for itself.
            pending.extendleft(reversed(taken[1:]))
            continue
        try:
            image, caption, similarity = header.pick(fields)
        except RecordError as error:
            yield Reject(taken[0].source, error.reason, error.detail)
        else:
            yield from assemble_pair(image, caption, similarity, taken[0].source)


def _texts(lines: Iterator[Line], pending: deque[Line], taken: list[Line]) -> Iterator[str]:
    """Yield lines to the CSV parser, which asks for another one while a quote is open; notes them in ``taken``."""
    while len(taken) < MAX_RECORD_LINES:
        line = pending.popleft() if pending else next(lines, None)
        if line is None:
            return
        taken.append(line)
        try:
            yield decode(line.raw(), "the line")
        except RecordError:
            if len(taken) == 1:
                raise
            return  # the quote is still open: the first line is at fault, and this one is judged for itself


def _header(line: Line) -> Header | None:
    """Return what a header says; None if the line is none."""
    try:
        text = decode(line.raw(), "the line")
        delimiter = "\t" if "\t" in text else ","
        fields = [field.strip().lower() for field in next(csv.reader([text], delimiter=delimiter, strict=True))]
    except (RecordError, csv.Error):
        return None
    images = [column for column in IMAGE_COLUMNS if column in fields]
    captions = [column for column in CAPTION_COLUMNS if column in fields]
    if not images or not captions:
        return None
    similarity = fields.index(SIMILARITY_COLUMN) if SIMILARITY_COLUMN in fields else None
    return Header(delimiter, len(fields), fields.index(images[0]), fields.index(captions[0]), similarity)


def _layout(line: Line, path: str) -> Layout:
    """Return what the first line of a file without a header shows.

    Raises:
        ConfigError: If not exactly one of two columns is a URL or the name of an image file.
    """
    try:
        columns = decode(line.raw(), "the line").rstrip("\r\n").split("\t")
    except RecordError as error:
        columns, found = [], f"{error.reason}: {error.detail}"
    else:
        found = ascii(columns)[:200]
    likely = [_is_image(column.strip()) for column in columns]
    if len(likely) < 2 or likely[0] == likely[-1]:
        raise ConfigError(
            f"{path}: the first line does not show which column holds the image ({found}); expected a header with "
            f"one of {', '.join(IMAGE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}, or a URL or image file name "
            "in either the first or the last column: give --format tsv-image-caption or tsv-caption-image"
        )
    return Layout(image_first=likely[0], numbered=likely[0] and CAPTION_NUMBER.search(columns[0]) is not None)


def _is_image(text: str) -> bool:
    if is_url(text):
        return not re.search(r"\s", text)
    return IMAGE_NAME.fullmatch(CAPTION_NUMBER.sub("", text)) is not None


def _number(text: str) -> float:
    try:
        return get_similarity({SIMILARITY_COLUMN: float(text)}, SIMILARITY_COLUMN)
    except ValueError as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError("wrong type", f"{SIMILARITY_COLUMN} is {text[:50]!a}; expected a number") from error
