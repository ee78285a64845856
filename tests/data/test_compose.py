"""Oracle: the paper's rules as a slow loop over one document's segments, written without the vectorised code.

It shares with the composer only the hash that decides each random choice; that choices are fair is tested by counting.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from lcl_megatron.config import ConfigError, DataConfig
from lcl_megatron.data.compose import Composer
from lcl_megatron.data.corpus_part import EncodedDocument
from lcl_megatron.data.document import ImageKind, Source
from lcl_megatron.data.indexed_file import CorpusError
from lcl_megatron.data.order import Stream, keyed_hash
from tests.data.corpora import NUM_LATENTS, WrittenCorpus, random_documents, stored_image, write

SEED = 77


@dataclass
class SlowDocument:
    """What the loop makes of a document."""

    tokens: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    has_context: list[bool] = field(default_factory=list)
    num_targets: int = 0


def compose_slowly(written: WrittenCorpus, document: int, epoch: int, config: DataConfig) -> SlowDocument:
    special, encoded = written.corpus.special_tokens, written.documents[document]
    first = written.first_image(document)
    good = [i for i, image in enumerate(encoded.images) if image.segment.similarity >= config.min_similarity]

    def draw(stream: Stream, image: int) -> int:
        return int(keyed_hash(SEED, stream, epoch, first + image))

    by_sentence = defaultdict(list)
    for i in good:
        segment = encoded.images[i].segment
        by_sentence[(segment.segment_index, None if segment.kind is ImageKind.MATCHED else i)].append(i)
    single = [min(images, key=lambda i: draw(Stream.SENTENCE_IMAGE, i)) for images in by_sentence.values()]
    chosen = sorted(sorted(single, key=lambda i: draw(Stream.IMAGE_CHOICE, i))[: config.max_images_per_document])

    # (segment, rank): an image behind the segment before comes first, then images before it, then its text.
    places: list[tuple[int, int, int | list[int]]] = []
    for i in chosen:
        segment = encoded.images[i].segment
        is_after = segment.kind is ImageKind.MATCHED and draw(Stream.PLACEMENT, i) >= 2**63
        places.append((segment.segment_index + is_after, 0 if is_after else 1, i))
    places += [(index, 2, list(text)) for index, text in enumerate(encoded.segments)]
    items = [item for _, _, item in sorted(places, key=lambda place: place[:2])]

    result = SlowDocument(tokens=[special.bos])
    has_content = False
    for item in items:
        piece = item if isinstance(item, list) else [special.boi] + [special.image] * NUM_LATENTS + [special.eoi]
        if len(result.tokens) + len(piece) + 1 > config.seq_length:
            break
        if isinstance(item, int):
            result.images.append(first + item)
            result.positions.append(len(result.tokens))
            result.has_context.append(has_content if config.context_rule == "content" else len(result.tokens) > 0)
        result.tokens += piece
        has_content = has_content or len(piece) > 0
    result.tokens.append(special.eos)
    for token in result.tokens[1:]:
        result.num_targets += token not in (special.image, special.eoi)
    return result


@pytest.fixture(scope="module", params=[0, 1, 2])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WrittenCorpus:
    return write(tmp_path_factory.mktemp("compose"), random_documents(200, request.param))


@pytest.mark.parametrize("seq_length", [12, 64, 2048])
@pytest.mark.parametrize("context_rule", ["content", "index"])
def test_composing_many_equals_the_loop_and_the_tokens(
    written: WrittenCorpus, seq_length: int, context_rule: str
) -> None:
    config = DataConfig(seq_length=seq_length, context_rule=context_rule, max_images_per_document=3)
    composer = Composer(written.corpus, config, NUM_LATENTS, SEED)
    rng = np.random.default_rng(seq_length)
    documents, epochs = rng.permutation(200), rng.integers(0, 3, 200)
    composed = composer.compose(documents, epochs)
    for index, (document, epoch) in enumerate(zip(documents.tolist(), epochs.tolist(), strict=True)):
        expected = compose_slowly(written, document, epoch, config)
        images = slice(composed.image_offsets[index], composed.image_offsets[index + 1])
        assert composed.lengths[index] == len(expected.tokens)
        assert composed.images[images].tolist() == expected.images
        assert composed.image_positions[images].tolist() == expected.positions
        assert composed.has_context[images].tolist() == expected.has_context
        assert composed.num_targets[index] == expected.num_targets
        assert composer.tokens(composed, index).tolist() == expected.tokens


def test_composing_one_equals_composing_many(written: WrittenCorpus) -> None:
    composer = Composer(written.corpus, DataConfig(seq_length=64), NUM_LATENTS, SEED)
    many = composer.compose(np.arange(200), 1)
    for document in range(0, 200, 7):
        one = composer.compose(np.array([document]), 1)
        assert one.lengths[0] == many.lengths[document]
        images = slice(many.image_offsets[document], many.image_offsets[document + 1])
        assert np.array_equal(one.image_positions, many.image_positions[images])
    assert len(composer.compose(np.zeros(0, dtype=np.int64), 1).lengths) == 0


def test_documents_with_images_are_those_of_sufficient_similarity(
    written: WrittenCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcl_megatron.data.compose.ELIGIBILITY_CHUNK", 7)
    found = Composer(written.corpus, DataConfig(min_similarity=0.4), NUM_LATENTS, SEED).documents_with_images()
    expected = [i for i, d in enumerate(written.documents) if any(m.segment.similarity > 0.4 for m in d.images)]
    assert found[np.arange(len(found))].tolist() == expected


def test_choices_and_placement_are_fair(tmp_path: Path) -> None:
    """3 images on one sentence, 4 alone: 3,000 epochs; shares within 4 standard errors (0.037)."""
    images = [stored_image(i, 0, 1.0, ImageKind.MATCHED, b"x") for i in range(3)]
    images += [stored_image(3 + i, 1 + i, 1.0, ImageKind.MATCHED, b"x") for i in range(4)]
    written = write(tmp_path, [EncodedDocument([[9, 9]] * 6, images, Source("d", 1))])
    composer = Composer(written.corpus, DataConfig(seq_length=64, max_images_per_document=2), NUM_LATENTS, SEED)
    chosen: Counter[int] = Counter()
    before = 0
    for epoch in range(3000):
        composed = composer.compose(np.array([0]), epoch)
        chosen.update(composed.images.tolist())
        text_before = composed.image_positions - 1 - np.arange(2) * (NUM_LATENTS + 2)
        sentence = np.maximum(composed.images - 2, 0)
        assert set((text_before - 2 * sentence).tolist()) <= {0, 2}
        before += int((text_before == 2 * sentence).sum())
    shares = np.array([chosen[i] for i in range(7)]) / 3000
    np.testing.assert_allclose(shares, [2 / 5 / 3] * 3 + [2 / 5] * 4, atol=0.037)
    assert abs(before / 6000 - 0.5) < 0.026


def test_first_image_has_no_context_unless_text_precedes_it(tmp_path: Path) -> None:
    images = [stored_image(i, i, 1.0, ImageKind.INLINE, b"x") for i in range(3)]
    documents = [EncodedDocument([[], [9]], images, Source("d", 1))]
    written = write(tmp_path, documents)
    for rule, expected in (("content", [False, True, True]), ("index", [True, True, True])):
        composer = Composer(written.corpus, DataConfig(seq_length=64, context_rule=rule), NUM_LATENTS, SEED)
        assert composer.compose(np.array([0]), 0).has_context.tolist() == expected


def test_a_row_too_short_for_an_image_is_refused(written: WrittenCorpus) -> None:
    with pytest.raises(ConfigError, match=r"seq_length = 7 cannot hold .* 8 tokens"):
        Composer(written.corpus, DataConfig(seq_length=7), NUM_LATENTS, SEED)


def test_side_arrays_that_disagree_with_the_tokens_are_found(tmp_path: Path) -> None:
    written = write(tmp_path, [EncodedDocument([[9, 10, 11]], [], Source("d", 1))])
    composer = Composer(written.corpus, DataConfig(seq_length=64), NUM_LATENTS, SEED)
    composed = composer.compose(np.array([0]), 0)
    composed.lengths[0] += 1
    with pytest.raises(CorpusError, match="hold 3 tokens, the side arrays announce 4"):
        composer.tokens(composed, 0)
