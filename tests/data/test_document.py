"""Documents and their sources. Oracle: the definitions in ``document.py``, spelled out case by case."""

from __future__ import annotations

import pytest

from lcl_megatron.data.document import Document, ImageKind, ImageSegment, Reject, Source, TextSegment

SOURCE = Source("docs_shard_7.jsonl", 1312)
TEXTS = (TextSegment("One."), TextSegment("Two."))


def image(index: int, kind: ImageKind, number: int = 0) -> ImageSegment:
    return ImageSegment("a1b2.jpg", number, index, 0.3, kind)


def test_a_source_prints_as_file_and_line():
    assert str(SOURCE) == "docs_shard_7.jsonl:1312"


def test_rejects_print_their_source_image_reason_and_detail():
    assert str(Reject(SOURCE, "malformed JSON", "line 1")) == "docs_shard_7.jsonl:1312: malformed JSON: line 1"
    assert str(Reject(SOURCE, "missing file", "", 3, "a1b2.jpg")) == (
        "docs_shard_7.jsonl:1312 image 3 (a1b2.jpg): missing file"
    )


@pytest.mark.parametrize(
    ("kind", "index", "valid"),
    [
        (ImageKind.MATCHED, 0, True),
        (ImageKind.MATCHED, 1, True),
        (ImageKind.MATCHED, 2, False),
        (ImageKind.INLINE, 2, True),
        (ImageKind.INLINE, 3, False),
        (ImageKind.INLINE, -1, False),
    ],
)
def test_only_an_inline_image_may_stand_behind_the_last_segment(kind: ImageKind, index: int, valid: bool):
    if valid:
        assert Document(TEXTS, (image(index, kind),), SOURCE).images[0].segment_index == index
    else:
        with pytest.raises(ValueError, match=r"docs_shard_7.jsonl:1312 image 0 \(a1b2.jpg\): segment"):
            Document(TEXTS, (image(index, kind),), SOURCE)


def test_images_out_of_order_are_refused():
    with pytest.raises(ValueError, match="sorted by segment"):
        Document(TEXTS, (image(1, ImageKind.MATCHED), image(0, ImageKind.MATCHED, 1)), SOURCE)
