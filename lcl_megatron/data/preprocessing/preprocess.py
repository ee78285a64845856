"""Raw shards to a corpus: read, judge images, tokenize, write.

Workers take one shard each and write one part each; parts are appended in the order of the inputs. So the corpus is
the same, byte for byte, for any engine, any number of workers, and after any number of interruptions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.image_stores.image_store import open_image_store
from lcl_megatron.data.preprocessing.engines import make_engine, parts_in_order
from lcl_megatron.data.preprocessing.preprocess_config import PreprocessConfig, input_names
from lcl_megatron.data.preprocessing.progress import Counters, Progress
from lcl_megatron.data.preprocessing.shard_encoder import ShardTask
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.storage.corpus_part import Totals
from lcl_megatron.data.storage.corpus_writer import CorpusWriter
from lcl_megatron.data.tokenizer import Tokenizer

MIN_JUDGED_IMAGES = 1000
"""The share of rejected images is judged only after so many images, and at the end."""


@dataclass(frozen=True)
class PreprocessSummary:
    """What a run produced; prints as a few lines."""

    corpus: Corpus
    """The corpus, opened."""
    totals: Totals = field(repr=False)
    """All counts, with rejects by reason."""

    def __str__(self) -> str:
        """Return the counts, one per line."""
        totals, counts = self.totals, self.corpus.manifest["counts"]
        lines = [
            f"corpus {self.corpus.path} (fingerprint {self.corpus.fingerprint[:16]})",
            f"  documents  {totals.documents:,}",
            f"  images     {totals.images:,} ({totals.image_bytes:,} bytes)",
            f"  tokens     {totals.tokens:,} in {totals.segments:,} text segments",
            f"  images that repeat an earlier one: {counts['duplicate_images']:,}",
        ]
        if totals.resized_images:
            lines.append(
                f"  images made smaller: {totals.resized_images:,} "
                f"({totals.source_image_bytes:,} bytes of source files became {totals.image_bytes:,})"
            )
        for what, rejects in (("documents", totals.rejected_documents), ("images", totals.rejected_images)):
            lines.append(f"  rejected {what}: {rejects.total():,}")
            lines.extend(f"    {number:,} {reason}" for reason, number in rejects.most_common())
        return "\n".join(lines)


def preprocess(config: PreprocessConfig, progress: Progress | None = None) -> PreprocessSummary:
    """Write a corpus; what an interrupted run has finished is not done again.

    Args:
        config: What to do.
        progress: Shows how far it has come; None = in silence.

    Raises:
        ConfigError: If inputs, tokenizer or output do not fit, too many images are unusable, or nothing is left.
        OSError: If a shard or the disk cannot be read or written, or a worker died. The output is then as it was
            before, and the same call goes on with what is finished.
    """
    tokenizer = Tokenizer.load(config.tokenizer_model)
    sizes = [path.stat().st_size for path in config.input]
    settings, image_processing = _settings(config), _image_processing(config)
    with (
        progress or Progress() as shown,
        CorpusWriter(config.output, tokenizer, settings, config.overwrite, image_processing) as writer,
    ):
        shown.begin(sizes, len(writer.inputs))
        if len(writer.inputs) < len(config.input):
            _encode_shards(config, tokenizer, writer, shown)
        _check_rejected(config, writer.totals, last=True)
        return PreprocessSummary(writer.commit(), writer.totals)


def _encode_shards(config: PreprocessConfig, tokenizer: Tokenizer, writer: CorpusWriter, shown: Progress) -> None:
    """Append the parts of all shards that are not done."""
    if config.image_root is not None:
        # Before any worker does: a store that cannot be opened is found at once, and an index is made by one process.
        open_image_store(config.image_root, config.max_image_bytes)
    with make_engine(config) as engine:
        tasks = _tasks(config, tokenizer, writer)
        for part in parts_in_order(engine, tasks, config.num_workers, shown.shard_started):
            totals = writer.append(part)
            shown.shard_finished(part, Counters.of(totals, writer.inputs[-1]["bytes"]))
            _check_rejected(config, writer.totals, last=False)


def _tasks(config: PreprocessConfig, tokenizer: Tokenizer, writer: CorpusWriter) -> Iterator[ShardTask]:
    """Yield what is left to do, in the order of the inputs."""
    names = input_names(config.input)
    for number in range(len(writer.inputs), len(config.input)):
        one = replace(config, input=(config.input[number],))
        yield ShardTask(one, names[number], tokenizer.fingerprint, writer.part_folder(number))


def _settings(config: PreprocessConfig) -> str:
    """Return everything that decides the parts, so that no part of another run is taken for one of this."""
    stats = [path.stat() for path in config.input]
    return json.dumps(
        {
            "inputs": [
                [name, stat.st_size, stat.st_mtime_ns]
                for name, stat in zip(input_names(config.input), stats, strict=True)
            ],
            "format": config.format,
            "image_root": None if config.image_root is None else os.path.abspath(config.image_root),
            "max_image_bytes": config.max_image_bytes,
            "max_image_pixels": config.max_image_pixels,
        }
    )


def _image_processing(config: PreprocessConfig) -> dict[str, object]:
    """Return how images were made, as the manifest says it."""
    resized = config.resize_short_side > 0
    return {
        "check_images": config.check_images,
        "resize_short_side": config.resize_short_side,
        "jpeg_quality": config.jpeg_quality if resized else None,
    }


def _check_rejected(config: PreprocessConfig, totals: Totals, last: bool) -> None:
    rejected = totals.rejected_images.total()
    seen = rejected + totals.images
    if rejected > config.max_rejected_image_share * seen and (last or seen >= MIN_JUDGED_IMAGES):
        where = "" if config.image_root is None else f"is image_root = {config.image_root} right? "
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in totals.rejected_images.most_common())
        raise ConfigError(
            f"{rejected:,} of {seen:,} images cannot be used ({rejected / seen:.0%}; the limit is "
            f"{config.max_rejected_image_share:.0%}): {reasons}; {where}"
            "--max-rejected-image-share 1 goes on regardless"
        )
