"""What the check says of ledgers, of runs that were interrupted and of ledgers that were damaged.

Oracles: the run's rows read one by one from its corpus, without plan, loader or batch; counts of what was damaged.
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lcl_megatron.data.batch import StepBatch
from lcl_megatron.data.loader import StepLoader
from lcl_megatron.training.ledger import Ledger
from lcl_megatron.training.ledger_check import check_ledger
from lcl_megatron.training.ledger_reader import SHOWN_FINDINGS, LedgerError
from lcl_megatron.training.loop import train
from lcl_megatron.training.setup import run_from
from tests.distributed import RankError, run_distributed
from tests.training.ledgers import (
    BATCH,
    STEPS,
    Entry,
    config_for,
    entries,
    expected_rows,
    interrupt,
    ledger_corpus,
    rewrite,
    run,
    synthetic_attempt,
    synthetic_batch,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ledger_corpus(tmp_path_factory.mktemp("ledger"))


@pytest.fixture(scope="module")
def interrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ledger of a run of three attempts: steps 0 to 4 on one rank, 3 to 6 and then 6 to 7 on two."""
    folder = tmp_path_factory.mktemp("interrupted")
    config = config_for(corpus, folder)
    interrupt(config, 5)
    interrupt(config, 7, 2)
    run(config, 2)
    return folder / "ledger"


def test_a_run_that_is_interrupted_twice_and_goes_on_with_more_ranks(interrupted: Path, corpus: Path) -> None:
    report = check_ledger(interrupted)
    assert report.findings == ()
    assert report.to_json() == (
        '{"steps": 8, "rows": 32, "rows_lost": 0, "rows_repeated": 0, "rows_differing": 0, "attempts": 3, '
        '"rows_done_again": 12, "steps_skipped": 0}'
    )
    parts = [(part.begin, part.end, part.recorded.header.dp_size) for part in report.stretches]
    assert parts == [(0, 3, 1), (3, 6, 2), (6, 8, 2)]
    first, second = entries(interrupted / "rank-00000.jsonl"), entries(interrupted / "rank-00001.jsonl")
    kept = [*first[1:4], *first[7:10], *first[12:], *second[1:4], *second[6:]]
    rows = sorted(row for record in kept for row in record["rows"])
    assert rows == expected_rows(config_for(corpus, interrupted), STEPS * BATCH)
    assert report.table().splitlines()[:2] == [
        "attempt            steps of the history  ranks   batch     first row",
        f"{first[0]['attempt']}                 0 to 2      1       4             0",
    ]


def test_a_run_that_goes_on_with_another_batch_and_then_with_other_data(corpus: Path, tmp_path: Path) -> None:
    config = config_for(corpus, tmp_path)
    interrupt(config, 5)
    other = dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=8))
    interrupt(other, 6)
    report = check_ledger(tmp_path / "ledger")
    # Steps 3 and 4 had read rows 12 to 19 of the 24 that steps 3 to 5 then read.
    assert (report.findings, report.rows, report.rows_done_again) == ((), 3 * 4 + 3 * 8, 8)
    new = dataclasses.replace(
        other,
        training=dataclasses.replace(other.training, seed=77),
        checkpoint=dataclasses.replace(other.checkpoint, allow_data_change=True),
    )
    run(new)
    report = check_ledger(tmp_path / "ledger")
    assert (report.findings, report.steps, report.attempts) == ((), STEPS, 3)
    assert report.stretches[-1].recorded.header.consumed_rows == 0
    path = tmp_path / "ledger" / "rank-00000.jsonl"
    lines = entries(path)
    rewrite(path, [entry | {"allow_data_change": False} if "data" in entry else entry for entry in lines])
    assert "reads other data than attempt" in check_ledger(tmp_path / "ledger").findings[0]


def test_a_ledger_that_was_begun_later_than_its_run(corpus: Path, tmp_path: Path) -> None:
    config = config_for(corpus, tmp_path)
    interrupt(dataclasses.replace(config, guard=dataclasses.replace(config.guard, ledger_dir="")), 3)
    assert not (tmp_path / "ledger").exists()
    run(config)
    report = check_ledger(tmp_path / "ledger")
    assert report.findings[0].startswith("steps 0 to 2 are not recorded; attempt")
    assert report.rows_lost == 3 * BATCH
    report = check_ledger(tmp_path / "ledger", from_step=3)
    assert (report.findings, report.steps, report.rows) == ((), 5, 20)
    assert check_ledger(tmp_path / "ledger", from_step=5).rows == 12
    assert check_ledger(tmp_path / "ledger", from_step=9).findings == ("no step from 9 on is recorded",)


# Damage. Lines of rank 0: header, steps 0 to 4, header, steps 3 to 6, header, steps 6 and 7; of rank 1: header, ...


def lose_a_row(folder: Path, lines: list[Entry]) -> None:
    del lines[3]["rows"][1]


def repeat_a_row(folder: Path, lines: list[Entry]) -> None:
    lines[3]["rows"].append(lines[3]["rows"][1])


def exchange_rows_of_two_steps(folder: Path, lines: list[Entry]) -> None:
    a, b = lines[1]["rows"], lines[2]["rows"]
    a[0], b[0] = b[0], a[0]


def exchange_hashes(folder: Path, lines: list[Entry]) -> None:
    """Of two rows of step 3 that were done again."""
    a, b = lines[4]["rows"][:2]
    a[1], b[1] = b[1], a[1]


def lose_a_step(folder: Path, lines: list[Entry]) -> None:
    del lines[2]


def lose_a_step_on_one_rank(folder: Path, lines: list[Entry]) -> None:
    del lines[8]


def lose_the_steps_before_a_checkpoint(folder: Path, lines: list[Entry]) -> None:
    del lines[2:6]


def skip_on_one_rank_only(folder: Path, lines: list[Entry]) -> None:
    lines[8]["skipped"] = True


def write_a_step_twice(folder: Path, lines: list[Entry]) -> None:
    lines.insert(2, lines[1])


def announce_twice(folder: Path, lines: list[Entry]) -> None:
    lines.insert(0, lines[0])


def announce_otherwise(folder: Path, lines: list[Entry]) -> None:
    rewrite(folder / "rank-00001.jsonl", [entries(folder / "rank-00001.jsonl")[0] | {"consumed_rows": 13}])


def write_from_two_runs(folder: Path, lines: list[Entry]) -> None:
    lines.insert(3, lines[2] | {"attempt": "0" * 16})


def write_what_is_no_row(folder: Path, lines: list[Entry]) -> None:
    lines[2]["rows"][0] = [4, None]


def write_another_type(folder: Path, lines: list[Entry]) -> None:
    lines[2]["step"] = "1"


def write_other_fields(folder: Path, lines: list[Entry]) -> None:
    lines[2]["pixels"] = 1


def write_a_list(folder: Path, lines: list[Entry]) -> None:
    lines[2] = [1, 2]  # type: ignore[call-overload]


def lose_the_file_of_rank_1(folder: Path, lines: list[Entry]) -> None:
    (folder / "rank-00001.jsonl").unlink()


def add_a_file_of_rank_2(folder: Path, lines: list[Entry]) -> None:
    shutil.copy(folder / "rank-00001.jsonl", folder / "rank-00002.jsonl")


DAMAGE = [
    # damage, (rows lost, repeated, differing), what is said of it
    (lose_a_row, (1, 0, 0), "step 2 of attempt {a} lacks row {row}"),
    (repeat_a_row, (0, 1, 0), "step 2 of attempt {a} read row {row} twice, or in another step's place"),
    (exchange_rows_of_two_steps, (2, 2, 0), "step 0 of attempt {a} read row"),
    (exchange_hashes, (0, 0, 2), "differs between rank-00000.jsonl:5 and rank-0000"),
    (lose_a_step, (4, 0, 0), "step 1 of attempt {a} lacks row 4, 5, 6, 7; no record of rank 0"),
    (lose_a_step_on_one_rank, (2, 0, 0), "; no record of rank 0"),
    (lose_the_steps_before_a_checkpoint, (8, 0, 0), "steps 1 to 2 are not recorded; attempt {b} follows them"),
    (skip_on_one_rank_only, (0, 0, 0), "step 4 of attempt {b} was skipped on some ranks only"),
    (write_a_step_twice, (0, 0, 0), "rank-00000.jsonl:3 repeats step 0 of attempt {a} (rank-00000.jsonl:2)"),
    (announce_twice, (0, 0, 0), "rank-00000.jsonl:2 announces attempt {a} once more"),
    (announce_otherwise, None, "rank-00001.jsonl:1 announces attempt {b} otherwise than another rank"),
    (
        write_from_two_runs,
        (0, 0, 0),
        "rank-00000.jsonl:4 is of attempt 0000000000000000, which does not begin before it",
    ),
    (
        write_what_is_no_row,
        (4, 0, 0),
        "rank-00000.jsonl:3 is damaged: [4, None] is no row; expected its number and its",
    ),
    (write_another_type, (4, 0, 0), "rank-00000.jsonl:3 is damaged: step is '1'; expected int"),
    (write_other_fields, (4, 0, 0), "it has the fields attempt, step, skipped, rows, pixels; expected attempt, step"),
    (write_a_list, (4, 0, 0), "rank-00000.jsonl:3 is damaged: it is no JSON object"),
    (lose_the_file_of_rank_1, (10, 0, 0), "rank 1 has no record of attempt {b}: its file is missing or another's"),
    (add_a_file_of_rank_2, (0, 10, 0), "rank-00002.jsonl:1: attempt {b} has no rank 2, only 2 ranks"),
]


@pytest.mark.parametrize(("damage", "expected", "message"), DAMAGE, ids=[case[0].__name__ for case in DAMAGE])
def test_what_is_wrong_is_found_counted_and_named(
    damage: Callable[[Path, list[Entry]], None],
    expected: tuple[int, int, int] | None,
    message: str,
    interrupted: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "ledger"
    shutil.copytree(interrupted, folder)
    lines = entries(folder / "rank-00000.jsonl")
    names = {"a": lines[0]["attempt"], "b": lines[6]["attempt"], "row": lines[3]["rows"][1][0]}
    damage(folder, lines)
    rewrite(folder / "rank-00000.jsonl", lines)
    report = check_ledger(folder)
    assert any(message.format(**names) in finding for finding in report.findings), report.findings
    if expected:
        assert (report.rows_lost, report.rows_repeated, report.rows_differing) == expected, report.findings


def test_without_the_file_of_rank_0_nothing_is_proved(interrupted: Path, tmp_path: Path) -> None:
    shutil.copy(interrupted / "rank-00001.jsonl", tmp_path)
    report = check_ledger(tmp_path)
    assert report.findings[0] == "rank-00000.jsonl is missing"
    assert report.rows_lost == 3 * BATCH + 5 * BATCH // 2


def test_many_findings_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 0, synthetic_attempt(), 100)
    for step in range(30):
        ledger.record(synthetic_batch(step, (2 * step,)), skipped=step == 3)
    ledger.close()
    report = check_ledger(tmp_path)
    assert (report.rows_lost, report.num_findings, len(report.findings)) == (30, 30, SHOWN_FINDINGS)
    assert report.table().splitlines()[-1] == "WRONG: 10 findings more"
    assert report.steps_skipped == 1
    assert "30 steps, 1 of them without an update; 30 rows" in report.table()


def test_a_line_that_is_cut_off_within_an_attempt_is_damage(interrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(interrupted, tmp_path / "ledger")
    path = tmp_path / "ledger" / "rank-00000.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:50]
    path.write_text("\n".join(lines) + "\n")
    report = check_ledger(tmp_path / "ledger")
    assert report.findings[0].startswith("rank-00000.jsonl:3 is damaged: ")
    assert report.rows_lost == BATCH
    path.write_text("\n".join([*lines[:2], *lines[3:-1], lines[-1][:-9]]) + "\n")
    assert any("is damaged" in finding for finding in check_ledger(tmp_path / "ledger").findings)


def test_the_last_step_may_be_missing_on_a_rank_that_was_killed_first(interrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(interrupted, tmp_path / "ledger")
    path = tmp_path / "ledger" / "rank-00001.jsonl"
    lines = entries(path)
    rewrite(path, lines[:-1])
    report = check_ledger(tmp_path / "ledger")
    assert (report.findings, report.steps) == ((), STEPS - 1)
    rewrite(path, lines[:-2])
    report = check_ledger(tmp_path / "ledger")
    assert (report.rows_lost, report.steps) == (BATCH // 2, STEPS - 1)


@pytest.mark.parametrize("killed_rank", [0, 1])
def test_a_run_whose_rank_is_killed_and_that_goes_on_alone(corpus: Path, tmp_path: Path, killed_rank: int) -> None:
    def killed_before(step: int, loader: StepLoader) -> Iterator[StepBatch]:
        for batch in loader:
            if batch.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    def body(rank: int, world_size: int) -> None:
        with run_from(config) as started:
            if rank == killed_rank:
                started.loader = killed_before(5, started.loader)  # type: ignore[assignment]  # the loop iterates
            train(started)

    config = config_for(corpus, tmp_path)
    with pytest.raises(RankError, match="SIGKILL"):
        run_distributed(body, 2)
    assert check_ledger(tmp_path / "ledger").findings == ()
    run(config)
    report = check_ledger(tmp_path / "ledger")
    assert (report.findings, report.steps, report.rows) == ((), STEPS, STEPS * BATCH)
    assert 4 <= report.rows_done_again <= 8  # steps 3 and 4; of the latter a rank may have died with its record


@pytest.mark.parametrize(("first_row", "lost", "repeated"), [(5, 1, 0), (3, 0, 1), (0, 0, 4)])
def test_an_attempt_that_begins_with_another_row(tmp_path: Path, first_row: int, lost: int, repeated: int) -> None:
    """Every step reads the rows that its attempt announced, but rows are left out or repeated."""
    for name, begin, consumed in (("a" * 16, 0, 0), ("b" * 16, 2, first_row)):
        ledger = Ledger(tmp_path, 0, synthetic_attempt(name, resumed_at_step=begin, consumed_rows=consumed), 100)
        for number in range(2):
            row = consumed + 2 * number
            ledger.record(synthetic_batch(begin + number, (row, row + 1)), skipped=False)
        ledger.close()
    report = check_ledger(tmp_path)
    assert report.findings == (f"attempt {'b' * 16} begins with row {first_row}; expected row 4",)
    assert (report.rows_lost, report.rows_repeated) == (lost, repeated)


def test_a_run_begins_with_row_0(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 0, synthetic_attempt(consumed_rows=2), 100)
    ledger.record(synthetic_batch(0, (2, 3)), skipped=False)
    ledger.close()
    report = check_ledger(tmp_path)
    assert (report.findings, report.rows_lost) == ((f"attempt {'a' * 16} begins with row 2; expected row 0",), 2)


def test_an_attempt_that_trained_nothing_takes_nothing_back(tmp_path: Path) -> None:
    for name, steps in (("a" * 16, range(4)), ("b" * 16, range(0)), ("c" * 16, range(4, 6))):
        begin = {"a" * 16: 0, "b" * 16: 1, "c" * 16: 4}[name]
        ledger = Ledger(tmp_path, 0, synthetic_attempt(name, resumed_at_step=begin, consumed_rows=2 * begin), 100)
        for step in steps:
            ledger.record(synthetic_batch(step, (2 * step, 2 * step + 1)), skipped=False)
        ledger.close()
    report = check_ledger(tmp_path)
    assert (report.findings, report.steps, report.attempts) == ((), 6, 3)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["check_ledger", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "tools" / "check_ledger.py"), run_name="__main__")
    return caught.value.code


def test_the_tool_ends_with_the_proof(
    interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, interrupted) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows_done_again"] == 12
    shutil.copytree(interrupted, tmp_path / "ledger")
    (tmp_path / "ledger" / "rank-00001.jsonl").unlink()
    assert call(monkeypatch, tmp_path / "ledger") == 1
    output = capsys.readouterr().out.splitlines()
    assert any(line.startswith("WRONG: rank 1 has no record of attempt ") for line in output)
    assert json.loads(output[-1])["rows_lost"] == 10
    assert str(call(monkeypatch, tmp_path)).startswith(f"error: no ledger in {tmp_path}: ")
    with pytest.raises(LedgerError, match="give the --ledger-dir of a run"):
        check_ledger(tmp_path)
