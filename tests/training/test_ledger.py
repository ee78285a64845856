"""What real runs write into their ledger, also when they are killed or the disk fails.

Oracles: the run's rows read one by one from its corpus, without plan, loader or batch; what the check says, which
``test_ledger_check`` tests.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import pytest
import torch

from lcl_megatron.config import ConfigError
from lcl_megatron.training.ledger import Ledger, row_hashes
from lcl_megatron.training.ledger_check import LedgerReport, check_ledger
from lcl_megatron.training.setup import run_from
from tests.training.ledgers import (
    BATCH,
    STEPS,
    config_for,
    entries,
    expected_rows,
    ledger_corpus,
    run,
    synthetic_attempt,
    synthetic_batch,
)
from tests.training.small_runs import small_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ledger_corpus(tmp_path_factory.mktemp("ledger"))


def test_a_run_records_every_row_of_its_order_once(corpus: Path, tmp_path: Path) -> None:
    config = config_for(corpus, tmp_path)
    run(config)
    header, *records = entries(tmp_path / "ledger" / "rank-00000.jsonl")
    with run_from(config) as again:
        data = again.plan.fingerprint
    assert header == {
        "attempt": header["attempt"],
        "resumed_at_step": 0,
        "consumed_rows": 0,
        "dp_size": 1,
        "global_batch_size": BATCH,
        "data": data,
        "allow_data_change": False,
    }
    assert [record["step"] for record in records] == list(range(STEPS))
    assert {(record["attempt"], record["skipped"]) for record in records} == {(header["attempt"], False)}
    recorded = sorted(row for record in records for row in record["rows"])
    assert recorded == expected_rows(config, STEPS * BATCH)
    assert len({value for _, value in recorded}) == STEPS * BATCH
    report = check_ledger(tmp_path / "ledger")
    assert (report.steps, report.rows, report.rows_done_again, report.findings) == (STEPS, STEPS * BATCH, 0, ())


@pytest.mark.parametrize("split", ["tensor", "pipeline", "context"])
def test_one_rank_of_those_that_share_rows_records_them(split: str, corpus: Path, tmp_path: Path) -> None:
    config = config_for(
        corpus, tmp_path, parallel={f"{split}_{'' if split == 'context' else 'model_'}parallel_size": 2}
    )
    training = dataclasses.replace(config.training, train_iters=3)
    run(dataclasses.replace(config, training=training), 2)
    assert [path.name for path in (tmp_path / "ledger").iterdir()] == ["rank-00000.jsonl"]
    header, *records = entries(tmp_path / "ledger" / "rank-00000.jsonl")
    assert header["dp_size"] == 1
    assert sorted(row for record in records for row in record["rows"]) == expected_rows(config, 3 * BATCH)


def test_a_row_has_one_hash_and_another_row_another() -> None:
    (batch,) = synthetic_batch(0, (7, 8, 7)).micro_batches
    a, b, c = row_hashes(batch)
    assert a == c != b
    with_image = dataclasses.replace(batch, image_slots=torch.tensor([5]), image_keys=torch.tensor([9]), num_images=1)
    assert row_hashes(with_image)[0] == a
    assert row_hashes(with_image)[1] != b
    for changes in ({"image_slots": torch.tensor([6])}, {"image_keys": torch.tensor([10])}):
        assert row_hashes(dataclasses.replace(with_image, **changes))[1] not in (b, row_hashes(with_image)[1])


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = dataclasses.replace(small_config(corpus), guard=dataclasses.replace(small_config(corpus).guard))
    guard = dataclasses.replace(config.guard, ledger_dir=str(tmp_path / "file" / "ledger"))
    with (
        pytest.raises(ConfigError, match=r"the ledger cannot be written: .*Not a directory.* with --ledger-dir"),
        run_from(dataclasses.replace(config, guard=guard)),
    ):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(tmp_path, 0, synthetic_attempt(), 100)
    ledger.record(synthetic_batch(0, (0, 1)), skipped=False)
    good = os.dup(ledger._file)  # type: ignore[arg-type]
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, ledger._file)  # type: ignore[arg-type]
    with caplog.at_level(logging.ERROR):
        for step in (1, 2):
            ledger.record(synthetic_batch(step, (2 * step, 2 * step + 1)), skipped=False)
    os.dup2(good, ledger._file)  # type: ignore[arg-type]
    ledger.record(synthetic_batch(3, (6, 7)), skipped=False)
    ledger.close()
    for number in (good, full):
        os.close(number)
    (message,) = caplog.messages
    assert "step 1 is not in the ledger" in message
    assert "No space left on device; training goes on, and tools/check_ledger.py will miss" in message
    report = check_ledger(tmp_path)
    assert (report.rows_lost, report.steps) == (4, 4)


def test_nothing_is_recorded_after_the_end(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 0, synthetic_attempt(), 100)
    ledger.close()
    with pytest.raises(ValueError, match="is closed; a ledger records nothing after the end of its run"):
        ledger.record(synthetic_batch(0, (0, 1)), skipped=False)


def report_of_a_kill(tmp_path: Path, cut: int) -> LedgerReport:
    """Three steps, a kill that leaves all but the last ``cut`` bytes, and an attempt that does steps 2 and 3."""
    ledger = Ledger(tmp_path, 0, synthetic_attempt(), 100)
    for step in range(3):
        ledger.record(synthetic_batch(step, (2 * step, 2 * step + 1)), skipped=False)
    ledger.close()
    path = tmp_path / "rank-00000.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    killed = check_ledger(tmp_path)
    assert (killed.findings, killed.steps) == ((), 3 if cut < 2 else 2)
    ledger = Ledger(tmp_path, 0, synthetic_attempt("b" * 16, resumed_at_step=2, consumed_rows=4), 100)
    for step in (2, 3):
        ledger.record(synthetic_batch(step, (2 * step + 1, 2 * step)), skipped=False)
    ledger.close()
    return check_ledger(tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 2, 40, 90])
def test_a_line_that_a_kill_cut_off_is_closed_and_passed_over(tmp_path: Path, cut: int) -> None:
    report = report_of_a_kill(tmp_path, cut)
    assert (report.findings, report.steps, report.rows, report.attempts) == ((), 4, 8, 2)
    assert report.rows_done_again == (2 if cut < 2 else 0)
