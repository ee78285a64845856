"""Replaying a step.

Oracles: the losses and the gradient norm of the real step on the same weights, of which rows' shares are the parts; a
model whose embedding of one word holds a value that overflows, so that exactly the rows with this word are spoilt,
looked for in the shard.
"""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lcl_megatron.checkpoint.folders import Progress, step_folder
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.config import RunConfig
from lcl_megatron.training.loop import save_checkpoint, train
from lcl_megatron.training.replay import find_step, replay
from lcl_megatron.training.run import Run
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.step import train_step
from tests.training.small_runs import NAMES, DataFolder, plain_document, small_config

ROOT = Path(__file__).parents[2]
WORD = "rat"
"""A word of two of the documents."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    folder = DataFolder(tmp_path_factory.mktemp("replay") / "data")
    folder.write([plain_document(number) for number in range(18)])
    folder.preprocess()
    return folder


def config_of(data: DataFolder, save: Path, **sections: dict[str, Any]) -> RunConfig:
    language = {"tie_embeddings": False}
    # An epoch is 18 rows, one for each document, of which nothing is cut off.
    training = {"global_batch_size": 9, "micro_batch_size": 3} | sections.pop("training", {})
    checkpoint = {"save": str(save), "save_interval": 1}
    defaults = {"language": language, "training": training, "checkpoint": checkpoint, "data": {"seq_length": 64}}
    return small_config(data.corpus, **defaults | sections)


def spoil_word(run: Run) -> None:
    """Give the embedding of one word a value whose square is infinite."""
    tokenizer = run.plan.sequence.sources[0].corpus.tokenizer
    pieces = tokenizer.encode(f"the {WORD} lives")
    others = [set(tokenizer.encode(f"the {name} lives")) for name in NAMES if name != WORD]
    (own,) = [piece for piece in pieces if not any(piece in other for other in others)]
    with torch.no_grad():
        weight = dict(run.engine.model.named_parameters())["language.embedding.word_embeddings.weight"]
        weight[own] = 1e30


def test_rows_are_the_parts_of_the_step(data: DataFolder, tmp_path: Path) -> None:
    with run_from(config_of(data, tmp_path, vision={"drop_path_rate": 0.3})) as run:
        batches = iter(run.loader)
        for _ in range(2):
            batch = next(batches)
            if batch.step == 1:
                save_checkpoint(run)
                assert run.saver is not None
                run.saver.finish()
            result = train_step(run, batch)
            run.progress = Progress(batch.step + 1, 9 * (batch.step + 1), 0, run.progress.data)
        targets = batch.layout.num_targets
        counts = [plan_row_targets(run, row) for row in range(9, 18)]
    rows = list(replay(find_step(tmp_path, 2)))
    assert [row.sources["row"] for row in rows] == list(range(9, 18))
    assert sum(counts) == targets
    mean = sum(row.generation_loss * count for row, count in zip(rows, counts, strict=True)) / targets
    assert mean == pytest.approx(sum(float(part.generation_loss) for part in result.losses), rel=1e-5)
    assert all(row.is_finite and row.grad_norm > 0 for row in rows)
    # The norm of a sum is at most the sum of the norms.
    assert sum(row.grad_norm for row in rows) > result.grad_norm * 0.9
    assert max(row.grad_norm for row in rows) < 2 * result.grad_norm


@pytest.mark.parametrize("loss", [{}, {"contrastive_scope": "global", "contrastive_loss_weight": 3.0}])
def test_a_step_of_one_row_is_that_row(data: DataFolder, tmp_path: Path, loss: dict[str, Any]) -> None:
    one = {"global_batch_size": 1, "micro_batch_size": 1}
    with run_from(config_of(data, tmp_path, training=one, loss=loss)) as run:
        save_checkpoint(run)
        assert run.saver is not None
        run.saver.finish()
        result = train_step(run, next(iter(run.loader)))
    (row,) = replay(find_step(tmp_path, 1))
    (losses,) = result.losses
    assert row.generation_loss == pytest.approx(float(losses.generation_loss), rel=1e-6)
    assert row.contrastive_loss == pytest.approx(float(losses.contrastive_loss), rel=1e-6)
    assert row.contrastive_loss > 0
    assert row.grad_norm == pytest.approx(result.grad_norm, rel=1e-5)


def plan_row_targets(run: Run, row: int) -> int:
    """Targets of one row of the run's sequence."""
    return int(run.plan.sequence.read(row, 1).counts.num_targets.sum())


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["replay_step", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / "replay_step.py"), run_name="__main__")


@pytest.fixture(scope="module")
def spoilt(data: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which every step that reads the word is skipped."""
    save = tmp_path_factory.mktemp("spoilt") / "save"
    with run_from(config_of(data, save, training={"train_iters": 6, "global_batch_size": 6})) as run:
        spoil_word(run)
        save_checkpoint(run)
        assert run.saver is not None
        run.saver.finish()
        train(run)
    return save


def test_the_rows_that_spoil_a_step_are_found(
    data: DataFolder, spoilt: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [json.loads(line)["text_list"] for line in data.shard.read_text().splitlines()]
    lines = {number for number, text in enumerate(texts, 1) if f" {WORD} " in " ".join(text)}
    assert len(lines) == 2
    count = 0
    for path in sorted((spoilt / "skipped").iterdir()):
        record = json.loads(path.read_text())
        rows = [row for part in record["micro_batches"] for row in part["rows"]]
        guilty = {
            row["row"] for row in rows if lines & {int(document.rsplit(":")[-1]) for document in row["documents"]}
        }
        count += len(guilty)
        call(monkeypatch, spoilt, "--step", record["step"])
        first, *said, last = capsys.readouterr().out.splitlines()
        summary = json.loads(last)
        assert set(summary["non_finite_rows"]) == guilty != set()
        assert (summary["step"], summary["rows"]) == (record["step"], 6)
        assert 0 < summary["largest_grad_norm"] < 100
        assert first.startswith(f"step {record['step']}: 6 rows from row {record['consumed_rows']} ({path}), in fp32, ")
        assert first.endswith(f"with the weights of {summary['checkpoint']}")
        flagged = [line for line in said if "| NOT FINITE |" in line]
        assert {int(line.split()[1]) for line in flagged} == guilty
        assert all(any(f"{data.shard.name}:{number}" in line for number in lines) for line in flagged)
        images = [image["source"] for row in rows if row["row"] in guilty for image in row["images"]]
        assert sorted(line.partition(": ")[2] for line in said if line.startswith("    key ")) == sorted(images)
    assert count == 4  # two documents in two epochs: no step with one of them was taken


def test_weights_are_the_newest_that_the_step_met(spoilt: Path, tmp_path: Path) -> None:
    skipped = {int(path.stem.removeprefix("step-")) for path in (spoilt / "skipped").iterdir()}
    saved = sorted(int(path.name.removeprefix("step-")) for path in spoilt.glob("step-*"))
    assert set(range(1, 7)) - skipped <= set(saved)
    for step in range(1, 7):
        # A step that was skipped left its weights as they were, so a checkpoint of its number would do too.
        usable = [number for number in saved if number < step or (number == step and step in skipped)]
        assert find_step(spoilt, step).checkpoint == step_folder(spoilt, usable[-1])
    (tmp_path / "skipped").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint of a step before 7 \(steps found: none\)"):
        find_step(tmp_path, 7)
    shutil.copytree(spoilt / "step-00000000", tmp_path / "step-00000009")
    with pytest.raises(CheckpointError, match=r"\(steps found: \[9\]\); give the --save folder"):
        find_step(tmp_path, 9)


def test_rows_are_found_by_record_by_count_or_as_told(spoilt: Path) -> None:
    found = find_step(spoilt, 100)
    assert (found.first_row, found.first_row_from) == (99 * 6, "36 before step-00000006, 93 steps of 6 rows")
    assert find_step(spoilt, 100, first_row=5).first_row == 5


def test_rows_of_a_run_whose_batch_has_grown_are_those_that_the_step_read(data: DataFolder, tmp_path: Path) -> None:
    for steps, rows in ((3, 3), (5, 9)):
        training = {"train_iters": steps, "global_batch_size": rows}
        with run_from(config_of(data, tmp_path, training=training)) as run:
            train(run)
            # Progress, and not this file's arithmetic, says what the last step read.
            first = run.progress.consumed_rows - rows
    assert [row.sources["row"] for row in replay(find_step(tmp_path, 5))] == list(range(first, first + 9)) != []
    assert find_step(tmp_path, 6).first_row == first + 9


def test_a_step_that_was_taken_is_not_replayed_on_other_data(data: DataFolder, tmp_path: Path) -> None:
    with run_from(config_of(data, tmp_path / "save", training={"train_iters": 3})) as run:
        train(run)
    other = DataFolder(tmp_path / "data")
    other.write([plain_document(number) for number in range(1, 19)])
    shutil.copy(data.tokenizer, other.path / "tokenizer.model")
    other.preprocess()
    with pytest.raises(CheckpointError, match=r"step 4 was read from other data .*--data-path"):
        next(replay(find_step(tmp_path / "save", 4, data_path=(str(other.corpus),))))


def test_other_data_and_damaged_records_are_refused(
    data: DataFolder, spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = tmp_path / "save"
    shutil.copytree(spoilt, save)
    record = min((save / "skipped").iterdir())
    step = int(record.stem.removeprefix("step-"))
    other = DataFolder(tmp_path / "data")
    other.write([plain_document(number) for number in range(1, 19)])
    shutil.copy(data.tokenizer, other.path / "tokenizer.model")
    other.preprocess()
    with pytest.raises(CheckpointError, match=f"step {step} was read from other data .*--data-path"):
        next(replay(find_step(save, step, data_path=(str(other.corpus),))))
    for damage in ("{", "[]", '{"step": 1}'):
        record.write_text(damage)
        with pytest.raises(
            SystemExit, match=f"replay_step: {record} is not the record of a skipped step .*--first-row"
        ):
            call(monkeypatch, save, "--step", step)


def test_images_that_cannot_be_decoded_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = DataFolder(tmp_path / "data")
    broken.write([plain_document(number) for number in range(9)])
    broken.truncate("4a.png")
    broken.preprocess()
    with run_from(config_of(broken, tmp_path / "save", training={"global_batch_size": 12})) as run:
        save_checkpoint(run)
        assert run.saver is not None
        run.saver.finish()
    call(monkeypatch, tmp_path / "save", "--step", 1, "--precision", "bf16")
    first, *said, last = capsys.readouterr().out.splitlines()
    assert "(0 before step-00000000, 0 steps of 12 rows), in bf16, " in first
    assert json.loads(last)["non_finite_rows"] == []
    assert sum(line.startswith("row ") for line in said) == 12
    assert [line for line in said if "not decoded: " in line and "(4a.png)" in line]
