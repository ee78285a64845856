"""Input that cannot be used: a clear error before the first step, or a skip that is counted, named and costs no more.

Oracles: the defect that was planted, by name; for images that turn out bad while training, a run on a corpus whose
images are intact in the same places, with these images taken out of the contrast by hand.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lcl_megatron.checkpoint.folders import complete_checkpoints
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.config import ConfigError, RunConfig
from lcl_megatron.config.image import BLANK_PIXEL
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.storage.indexed_file import CorpusError
from lcl_megatron.data.tokenizer import train_tokenizer
from lcl_megatron.training.bad_images import BadImageWatch, TooManyBadImagesError
from lcl_megatron.training.loop import train
from lcl_megatron.training.run import Run
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.step import NonFiniteError, train_step
from tests.training.small_runs import DataFolder, plain_document, read_reports, sentence, small_config, train_and_read

DOCUMENTS = 12


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Twelve documents of two images and nothing wrong with them."""
    data = DataFolder(tmp_path_factory.mktemp("intact") / "data")
    data.write([plain_document(number) for number in range(DOCUMENTS)])
    data.preprocess()
    return data


def new_data(folder: Path) -> DataFolder:
    data = DataFolder(folder / "data")
    data.write([plain_document(number) for number in range(DOCUMENTS)])
    return data


def rejects(corpus: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (corpus / "rejects.jsonl").read_text().splitlines()]


def open_run(config: RunConfig) -> None:
    with run_from(config):
        raise AssertionError("the run could be opened")


# While preprocessing: counted rejects with their source.


def test_records_and_files_that_cannot_be_used_cost_only_themselves(tmp_path: Path) -> None:
    data = new_data(tmp_path)
    good = data.shard.read_text().splitlines()
    no_images = json.dumps({"text_list": ["no picture"], "image_info": []})
    no_texts = json.dumps({"image_info": [{"image_name": "3a.png", "matched_text_index": 0, "matched_sim": 0.5}]})
    data.write_lines([good[0], '{"text_list": ["cut', no_texts, no_images, *good[1:]])
    (data.images / "1a.png").rename(data.images / "1a.jpg")
    (data.images / "2a.png").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    data.truncate("3a.png")

    summary = data.preprocess()

    found = {(entry["line"], entry["reason"], entry.get("image_name") or "") for entry in rejects(data.corpus)}
    assert found == {
        (2, "malformed JSON", ""),
        (3, "missing field", ""),
        (4, "no images", ""),
        (5, "missing file", "1a.png"),
        (6, "not an image", "2a.png"),
    }
    assert {entry["file"] for entry in rejects(data.corpus)} == {"docs_shard_0_v2.jsonl"}
    assert summary.corpus.num_documents == DOCUMENTS
    # A header does not show that a file was cut short: 3a.png is left for training to find.
    assert summary.corpus.num_images == 2 * DOCUMENTS - 2
    assert "rejected images: 2" in str(summary)
    assert "rejected documents: 3" in str(summary)


# While training: blank, out of both sides of the contrast, counted, named.


def test_truncated_images_change_nothing_but_their_own_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Equal to the same run with mean-coloured pictures in these places, left out of the contrast by hand."""
    bad = ("1a.png", "4b.png", "7a.png", "7b.png")
    damaged, by_hand = new_data(tmp_path / "damaged"), new_data(tmp_path / "by_hand")
    for name in bad:
        damaged.truncate(name)
        Image.new("RGB", (20, 20), BLANK_PIXEL).save(by_hand.images / name)
    for data in (damaged, by_hand):
        data.preprocess()
    corpus = Corpus.open(by_hand.corpus)
    sources = [corpus.image_source(image) for image in range(corpus.num_images)]
    marked = {image for image, source in enumerate(sources) if any(f"({name})" in source for name in bad)}
    assert len(marked) == len(bad)

    settings: dict[str, dict[str, Any]] = {"data": {"max_bad_image_rate": 1.0}, "training": {"train_iters": 6}}
    with caplog.at_level(logging.WARNING):
        config = small_config(damaged.corpus, **settings, logging={"log_dir": str(tmp_path / "damaged" / "logs")})
        reports = train_and_read(config)
    config = small_config(by_hand.corpus, **settings, logging={"log_dir": str(tmp_path / "by_hand" / "logs")})
    with run_from(config) as run:
        train(dataclasses.replace(run, loader=_LeavingOut(run, marked)))
    expected = read_reports(tmp_path / "by_hand" / "logs")

    warnings = [record.getMessage() for record in caplog.records if "image left out" in record.getMessage()]
    assert len(warnings) == reports[-1]["data/bad_images"] > len(bad)
    for name in bad:
        source = next(source for source in sources if f"({name})" in source)
        assert any(source in message and "truncated" in message for message in warnings), name
    compared = [key for key in reports[0] if key.startswith(("loss/", "contrast/", "features/", "optimizer/"))]
    assert len(compared) > 12
    for report, other in zip(reports, expected, strict=True):
        assert {key: report[key] for key in compared} == {key: other[key] for key in compared}
    assert expected[-1]["data/bad_images"] == reports[-1]["data/bad_images"]

    control = train_and_read(small_config(by_hand.corpus, **settings, logging={"log_dir": str(tmp_path / "control")}))
    first = next(number for number, report in enumerate(reports) if report["data/bad_images"])
    assert control[first]["loss/contrastive"] != pytest.approx(reports[first]["loss/contrastive"], rel=1e-3)
    assert control[-1]["data/bad_images"] == 0


class _LeavingOut:
    """The steps of a run, with some images of the corpus declared bad."""

    def __init__(self, run: Run, images: set[int]) -> None:
        self.steps, self.images = run.loader, images

    def __iter__(self) -> Iterator[StepBatch]:
        for batch in self.steps:
            micro_batches = []
            for micro in batch.micro_batches:
                # The low 40 bits of an image key are the image's index and 1.
                is_bad = torch.tensor([(int(key) & ((1 << 40) - 1)) - 1 in self.images for key in micro.image_keys])
                micro_batches.append(dataclasses.replace(micro, image_ok=micro.image_ok & ~is_bad))
            yield dataclasses.replace(batch, micro_batches=tuple(micro_batches))


def test_too_many_bad_images_end_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    """Half of the images are bad; steps of 24 images fill the window of 1,000 at step 42."""
    data = DataFolder(tmp_path / "data")
    data.write([((sentence(n), "", "", ""), ((f"{n}a.png", 1), (f"{n}b.png", 2), (f"{n}c.png", 3))) for n in range(16)])
    for number in range(16):
        data.truncate(f"{number}a.png")
        if number % 2:
            data.truncate(f"{number}b.png")
    data.preprocess()
    config = small_config(
        data.corpus,
        vision={"num_layers": 1},
        language={"num_layers": 1},
        training={"train_iters": 100, "global_batch_size": 8, "micro_batch_size": 8},
        checkpoint={"save": str(tmp_path / "checkpoints")},
        logging={"log_interval": 1000},
    )
    with run_from(config) as run, pytest.raises(TooManyBadImagesError) as caught:
        train(run)
    message = str(caught.value)
    assert "images could not be decoded, more than data.max_bad_image_rate = 0.1" in message
    assert "--max-bad-image-rate" in message
    words = message.split()
    num_bad, num_seen = int(words[0]), int(words[4])
    assert num_seen >= 1000
    assert num_bad / num_seen == pytest.approx(0.5, abs=0.02)
    latest = complete_checkpoints(tmp_path / "checkpoints")[0]
    assert latest.name == f"step-{run.progress.step:08d}"
    assert run.progress.step == -(-1000 // 24)


@dataclasses.dataclass(frozen=True)
class _Verdict:
    """What ``BadImageWatch`` reads of a step."""

    image_ok: np.ndarray

    @property
    def num_bad_images(self) -> int:
        return int((~self.image_ok).sum())


def test_the_rate_is_that_of_the_last_thousand_images() -> None:
    watch = BadImageWatch(max_rate=0.1, window=1000)
    good, all_bad = _Verdict(np.ones(100, dtype=bool)), _Verdict(np.zeros(100, dtype=bool))
    watch.add(all_bad, [])  # type: ignore[arg-type]
    for _ in range(20):
        watch.add(good, [])  # type: ignore[arg-type]
    watch.add(all_bad, [])  # type: ignore[arg-type]
    assert watch.total == 200
    with pytest.raises(TooManyBadImagesError, match=r"^200 of the last 1000 images"):
        watch.add(all_bad, [])  # type: ignore[arg-type]


# Before the first step: a clear error.


def test_a_folder_that_is_no_corpus(tmp_path: Path, intact: DataFolder) -> None:
    with pytest.raises(ConfigError, match=r"data.data_path is empty; .*--data-path"):
        open_run(small_config(Path(), data={"data_path": ()}))
    for folder in (tmp_path / "nowhere", tmp_path, intact.images):
        with pytest.raises(ConfigError, match=r"no corpus at .*tools/preprocess_data.py --output"):
            open_run(small_config(folder))


def test_a_damaged_corpus(tmp_path: Path, intact: DataFolder) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(intact.corpus, corpus)
    images = corpus / "images.bin"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(CorpusError, match=r"images.bin holds \d+ bytes; the manifest announces \d+ bytes"):
        open_run(small_config(corpus))
    images.unlink()
    with pytest.raises(CorpusError, match=r"images.bin is missing"):
        open_run(small_config(corpus))


def test_a_tokenizer_that_did_not_make_the_corpus(tmp_path: Path, intact: DataFolder) -> None:
    other = tmp_path / "other.model"
    train_tokenizer(["quite other words", "in another tongue"] * 3, other, 300)
    with pytest.raises(ConfigError, match=r"is not the one that made the corpus .*leave data.tokenizer_model empty"):
        open_run(small_config(intact.corpus, data={"tokenizer_model": str(other)}))


def test_a_vocabulary_too_small_for_the_corpus(intact: DataFolder) -> None:
    size = Corpus.open(intact.corpus).vocab_size
    with pytest.raises(ConfigError, match=rf"language.vocab_size = 100 is smaller than .* vocabulary of {size} ids"):
        open_run(small_config(intact.corpus, language={"vocab_size": 100}))


def test_layouts_that_do_not_divide(intact: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = small_config(intact.corpus, parallel={"tensor_model_parallel_size": 2})
    with pytest.raises(ConfigError, match="3 processes cannot be divided .*start a multiple of 2 processes"):
        open_run(config)
    with pytest.raises(ConfigError, match="training.global_batch_size = 4 is not a multiple .*4 x 3 = 12"):
        open_run(small_config(intact.corpus))
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = small_config(intact.corpus, parallel={"tensor_model_parallel_size": 8})
    with pytest.raises(ConfigError, match="vision.num_attention_heads = 4 cannot be split over .* = 8 ranks"):
        open_run(config)


def test_rows_too_short_for_an_image(intact: DataFolder) -> None:
    with pytest.raises(ConfigError, match=r"data.seq_length = 6 cannot hold one image: 4 latents"):
        open_run(small_config(intact.corpus, data={"seq_length": 6}))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, intact: DataFolder) -> Path:
    """Checkpoints of a run of one step on the intact corpus."""
    folder = tmp_path_factory.mktemp("checkpoints") / "save"
    with run_from(small_config(intact.corpus, checkpoint={"save": str(folder)}, logging={"exit_interval": 1})) as run:
        train(run)
    return folder


def test_load_without_a_checkpoint(tmp_path: Path, intact: DataFolder, checkpoints: Path) -> None:
    empty = tmp_path / "empty"
    (empty / ".staging-step-00000001").mkdir(parents=True)
    for folder in (empty, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"--load .*: no complete checkpoint .*leave --load out"):
            open_run(small_config(intact.corpus, checkpoint={"load": str(folder)}))


def test_a_checkpoint_of_another_architecture(intact: DataFolder, checkpoints: Path) -> None:
    config = small_config(
        intact.corpus, checkpoint={"load": str(checkpoints)}, language={"num_layers": 3}, vision={"class_token": False}
    )
    with pytest.raises(CheckpointError) as caught:
        open_run(config)
    message = str(caught.value)
    assert "vision.class_token: True in the checkpoint, False in this run" in message
    assert "language.num_layers: 2 in the checkpoint, 3 in this run" in message
    assert "num_attention_heads" not in message
    assert "--config" in message


def test_going_on_with_other_data_is_refused(tmp_path: Path, intact: DataFolder, checkpoints: Path) -> None:
    other = DataFolder(tmp_path / "data")
    other.write([plain_document(number + 1) for number in range(DOCUMENTS)])
    shutil.copy(intact.tokenizer, other.path / "tokenizer.model")
    other.preprocess()
    load = {"load": str(checkpoints)}
    for corpus, sections, change in (
        (other.corpus, {}, f"corpus 0: [0-9a-f]{{64}} in the checkpoint, {Corpus.open(other.corpus).fingerprint} here"),
        (intact.corpus, {"training": {"seed": 5}}, r"training.seed: \d+ in the checkpoint, 5 here"),
        (intact.corpus, {"data": {"seq_length": 64}}, r"data.seq_length: \d+ in the checkpoint, 64 here"),
    ):
        with pytest.raises(CheckpointError, match=f"was trained on other data:\n  {change}\n.*--allow-data-change"):
            open_run(small_config(corpus, checkpoint=load, **sections))
        allowed = load | {"allow_data_change": True}
        with run_from(small_config(corpus, checkpoint=allowed, **sections)) as run:
            assert (run.progress.step, run.progress.consumed_rows) == (1, 0)
            assert run.progress.data == run.plan.description
            assert next(iter(run.loader)).step == 1
    with run_from(small_config(intact.corpus, checkpoint=load)) as run:
        assert run.progress.step == 1
        assert run.progress.consumed_rows == run.config.training.global_batch_size


def test_checkpoints_in_the_current_folder_are_not_loaded_unasked(
    intact: DataFolder, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoints)
    with run_from(small_config(intact.corpus)) as run:
        assert run.progress.step == 0


def test_weights_that_are_lost_end_the_run_and_are_not_saved(tmp_path: Path, intact: DataFolder) -> None:
    config = small_config(intact.corpus, checkpoint={"save": str(tmp_path / "save"), "save_interval": 1})
    said = r"^step 1: gradient norm nan, and the weights of rank 0 \(dp0 pp0 tp0\) are not finite.* the last checkpoint"
    with run_from(config) as run:
        with torch.no_grad():
            next(run.engine.model.parameters()).fill_(torch.nan)
        with pytest.raises(NonFiniteError, match=said):
            train(run)
    assert [path.name for path in (tmp_path / "save").iterdir()] == ["skipped"]


def test_a_step_in_which_no_image_can_be_decoded_trains_on_text(tmp_path: Path) -> None:
    data = new_data(tmp_path)
    for path in data.images.iterdir():
        data.truncate(path.name)
    data.preprocess()
    with run_from(small_config(data.corpus)) as run:
        before = [parameter.clone() for parameter in run.engine.model.language.parameters()]  # type: ignore[union-attr]
        batch = next(iter(run.loader))
        result = train_step(run, batch)
        after = list(run.engine.model.language.parameters())  # type: ignore[union-attr]
    assert len(batch.bad_images) == result.agreed.num_bad_images > 0
    assert result.agreed.num_pairs == 0
    assert [float(losses.contrastive_loss) for losses in result.losses] == [0.0]
    assert float(result.losses[0].generation_loss) > 1.0
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
