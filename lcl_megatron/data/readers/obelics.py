"""OBELICS: parquet, one row per document, with text and images in the order of the page.

``images`` (URLs) and ``texts`` are lists of equal length, and at every position exactly one of the two is null.
``metadata`` is a string that holds a JSON list with an object for every image. Laurencon et al., OBELICS: An Open
Web-Scale Filtered Dataset of Interleaved Image-Text Documents, 2023 (arXiv 2306.16527).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.document import Document, ImageKind, ImageSegment, Reject, Source, TextSegment
from lcl_megatron.data.readers.records import RecordError, assemble, check_utf8, decode, parse_json

BATCH_ROWS = 64
"""Rows that are held in memory at one time: a document has some 10 kB."""
READ_BYTES = 1 << 20
"""Bytes that are read at one time, instead of whole columns of a row group."""
LOCAL_NAME = "local_name"
"""Field of an image's metadata that names its file; used instead of the URL where it is given."""


def read_obelics(shard: Path, name: str = "") -> Iterator[Document | Reject]:
    """Yield the documents of a shard in order, and a reject for everything that is left out.

    An image stands exactly before the text that follows it. It is called by its ``local_name`` in ``metadata`` if
    there is one, else by its URL. Texts are stripped of surrounding white space. The line of a source is the row,
    from 1.

    Args:
        shard: ``.parquet`` file.
        name: What the shard is called in messages and in the corpus; empty = its file name.

    Raises:
        ConfigError: If pyarrow is not installed, or the file is a table of something else.
        OSError: If the shard cannot be read, or is damaged.
    """
    for number, row in enumerate(_rows(shard), start=1):
        source = Source(name or shard.name, number)
        try:
            segments, images = _parse(row)
        except RecordError as error:
            yield Reject(source, error.reason, error.detail)
        else:
            yield from assemble(segments, images, source)


def _rows(shard: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows with strings as bytes: one that is not UTF-8 must not cost the others of its batch."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(
            f"{shard.name}: reading parquet needs pyarrow ({error}); pip install 'lcl_megatron[obelics]'"
        ) from error
    binaries = {"images": pa.list_(pa.binary()), "texts": pa.list_(pa.binary()), "metadata": pa.binary()}
    try:
        # Pre-buffering would hold whole columns of a row group, which may be all of the file.
        with pq.ParquetFile(shard, buffer_size=READ_BYTES, pre_buffer=False) as file:
            found = {field.name: field.type for field in file.schema_arrow}
            columns = [column for column in binaries if column in found]
            strings = [column for column in columns if _holds_strings(pa, found[column], column != "metadata")]
            if strings != columns or not {"images", "texts"} <= found.keys():
                types = ", ".join(f"{key}: {value}" for key, value in found.items())
                raise ConfigError(
                    f"{shard} is not an OBELICS shard: its columns are {types}; expected images and texts, lists of "
                    "strings, and metadata, a string"
                )
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False):
                arrays = [batch.column(column).cast(binaries[column]) for column in columns]
                for row in zip(*(array.to_pylist() for array in arrays), strict=True):
                    yield dict(zip(columns, row, strict=True))
    except (pa.ArrowException, OSError) as error:
        # pyarrow raises OSError for damaged pages too, then without an error number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what = " ".join(str(error).split())
        raise OSError(f"{shard} is a damaged parquet file ({what}); fetch it again or leave it out") from error


def _holds_strings(pa: Any, kind: Any, in_list: bool) -> bool:
    if in_list:
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            return False
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _parse(row: dict[str, Any]) -> tuple[list[TextSegment], list[ImageSegment]]:
    """Return text segments and images of one row; raises ``RecordError``."""
    urls, texts = row["images"], row["texts"]
    if urls is None or texts is None:
        raise RecordError("wrong type", f"{'images' if urls is None else 'texts'} is null; expected a list")
    if len(urls) != len(texts):
        raise RecordError("inconsistent record", f"{len(urls)} images and {len(texts)} texts; expected equal numbers")
    names = _local_names(row.get("metadata"), len(urls))
    segments: list[TextSegment] = []
    images: list[ImageSegment] = []
    for index, (url, text) in enumerate(zip(urls, texts, strict=True)):
        if (url is None) == (text is None):
            both = "neither an image nor a text" if url is None else "an image and a text"
            raise RecordError("inconsistent record", f"position {index} has {both}; expected one of them")
        if text is not None:
            segments.append(TextSegment(decode(text, f"texts[{index}]").strip()))
        else:
            name = names.get(index) or decode(url, f"images[{index}]")
            images.append(ImageSegment(name, len(images), len(segments), 1.0, ImageKind.INLINE))
    return segments, images


def _local_names(metadata: bytes | None, length: int) -> dict[int, str]:
    """Return the file names that metadata gives, by position."""
    # The genuine set has none, and parsing its metadata would take longer than all the rest.
    if metadata is None or LOCAL_NAME.encode() not in metadata:
        return {}
    entries = parse_json(decode(metadata, "metadata"))
    if not isinstance(entries, list) or len(entries) != length:
        raise RecordError("inconsistent record", f"metadata is not a list of {length} entries, one for each position")
    return {
        index: check_utf8(entry[LOCAL_NAME], f"metadata[{index}].{LOCAL_NAME}")
        for index, entry in enumerate(entries)
        if isinstance(entry, dict) and isinstance(entry.get(LOCAL_NAME), str)
    }
