"""The fault campaign in its short form, and whether its instruments would notice if something went wrong.

Oracles: figures against the number of cases that were asked for; histories of events written by hand; bytes of folders
before, during and after a damage; payloads unpickled on purpose.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos import __main__ as campaign
from benchmarks.chaos import corpora, kills, lanes, payloads, report
from benchmarks.chaos.checkpoints import expected_use
from benchmarks.chaos.damage import KINDS, Damage, NothingToDamageError, damaged, files_of
from benchmarks.chaos.findings import Findings
from benchmarks.chaos.killed_run import TARGETS
from benchmarks.chaos.launcher import EventReader, note
from benchmarks.chaos.processes import ChildError, call_in_child, call_in_children, call_on_ranks
from benchmarks.chaos.small_run import make_corpus
from benchmarks.chaos.timeline import differing_rows, recovery, rows_of

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_short_campaign_finds_everything_as_promised() -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--short"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    figures = json.loads(lines[-1])
    assert figures.pop("median_recovery_s") > 0
    damages = lanes.SHORT.checkpoints * 11 // 12 + lanes.SHORT.starts + lanes.SHORT.corpora
    assert figures == {
        "kills": lanes.SHORT.kills,
        "rows_lost": 0,
        "rows_repeated": 0,
        "bit_equal": True,
        "corruptions": damages,
        "detected": damages,
        "payloads_executed": 0,
    }
    for name in lanes.LANES:
        assert sum(line.startswith(f"{name}: ") for line in lines) == 1, name
    baseline = json.loads(next(line for line in lines if line.startswith("baseline: ")).split(": ", 1)[1])
    # Known of megatron-core 0.16.1: pickles run, a dead writer hangs the save.
    assert baseline["payloads"]["executed"] > 0
    assert baseline["writer"] == "hung"


def test_every_kind_of_damage_changes_a_folder_and_is_undone(tmp_path: Path) -> None:
    folder, other = tmp_path / "step-00000010", tmp_path / "step-00000005"
    rng = random.Random(1)
    for place, seed in ((folder, 2), (other, 3)):
        place.mkdir()
        for name in ("a.bin", "b.bin"):
            (place / name).write_bytes(random.Random(f"{seed}{name}").randbytes(2000))
        (place / "manifest.json").write_text(json.dumps({"step": seed, "names": ["x", "y"], "is_whole": True}))
        (place / "run.toml").write_text(f"steps = {seed}\nrate = 0.5\n")
    before = contents(folder)
    for kind in KINDS:
        for _ in range(20):
            with damaged(kind, folder, other, rng) as damage:
                assert damage.kind == kind
                assert not folder.exists() if kind == "folder renamed" else contents(folder) != before, damage
            assert contents(folder) == before, damage


def test_damage_that_would_change_nothing_is_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "zeros.bin").write_bytes(bytes(100))
    for kind in ("hole of zeros", "two files swapped", "file of another"):
        with pytest.raises(NothingToDamageError), damaged(kind, tmp_path / "one", tmp_path / "other", random.Random(0)):
            pass


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in files_of(folder)}


def test_a_whole_corpus_is_not_called_damaged(tmp_path: Path) -> None:
    corpus = call_in_child(make_corpus, tmp_path / "data", 8)
    assert call_in_child(corpora.outcome, corpus) == ("unseen", "")


def test_expected_choice_of_a_checkpoint() -> None:
    bit, added = Damage("one bit", "x", ""), Damage("file added", "x", "")
    assert expected_use([bit]) == "step-00000010"
    assert expected_use([bit, bit]) == "step-00000005"
    assert expected_use([bit] * 3) == "refused"
    assert expected_use([added]) == "step-00000015"


def test_payloads_run_where_pickles_are_trusted(tmp_path: Path) -> None:
    assert call_in_child(payloads.works, tmp_path)


def test_rows_are_counted_over_the_history_that_counts() -> None:
    """Two ranks; rank 0 is killed in step 2, which is then done again; then a row is exchanged for another."""
    peace = [read(rank, step, f"{rank}{step}") for rank in range(2) for step in (1, 2, 3)]
    killed = [read(0, 1, "01"), read(0, 2, "02"), read(1, 1, "11"), *peace]
    assert differing_rows(rows_of(peace), rows_of(killed)) == (0, 0)
    assert differing_rows(rows_of(peace), rows_of([*killed, read(0, 3, "02")])) == (1, 1)
    assert differing_rows(rows_of(peace), rows_of(peace[:-1])) == (1, 0)


def read(rank: int, step: int, row: str) -> dict[str, object]:
    return {"what": "read", "rank": rank, "step": step, "rows": [row]}


def test_recovery_is_the_time_to_the_next_step_of_a_new_start() -> None:
    events = [
        {"what": "start", "time": 0.0},
        {"what": "step", "time": 1.0},
        {"what": "step", "time": 2.1},  # of the ranks that were left, after the kill
        {"what": "start", "time": 2.5},
        {"what": "start", "time": 3.5},  # killed again
        {"what": "step", "time": 4.0},
        {"what": "end", "time": 9.0, "status": 0},
    ]
    assert recovery({"time": 2.0, "target": "rank"}, events) == 2.0
    assert recovery({"time": 2.0, "target": "writer"}, events) == pytest.approx(0.1)
    # Nothing was left to train.
    assert recovery({"time": 3.0, "target": "rank"}, [*events[:5], events[-1]]) == 6.0
    assert recovery({"time": 5.0, "target": "rank"}, events[:-1]) is None


def test_events_are_read_line_by_line_while_they_are_written(tmp_path: Path) -> None:
    reader = EventReader(tmp_path / "events")
    assert reader.read() == []
    note(reader.path, "step", rank=0)
    with open(reader.path, "a") as stream:
        stream.write('{"what": "unfin')
    assert [event["what"] for event in reader.read()] == ["step"]
    with open(reader.path, "a") as stream:
        stream.write('ished"}\n')
    assert [event["what"] for event in reader.read()] == ["unfinished"]
    assert len(reader.events) == 2


def test_children_that_fail_are_errors() -> None:
    assert call_in_children([(int, ["3"]), (len, [[1, 2]])]) == [3, 2]
    with pytest.raises(ChildError, match=r"process 0 of 1:[\s\S]*ValueError"):
        call_in_child(int, "x")
    with pytest.raises(ChildError, match="died without an answer"):
        call_in_child(os._exit, 3)
    with pytest.raises(ChildError, match=r"processes \[0\] of 1 did not answer within"):
        call_in_child(os.read, os.pipe()[0], 1, timeout=0.2)
    assert call_on_ranks(lambda rank: (rank, os.environ["WORLD_SIZE"]), 2) == [(0, "2"), (1, "2")]


def test_a_failure_names_the_command_that_repeats_it(capsys: pytest.CaptureFixture[str]) -> None:
    findings = Findings("kills", seed=5)
    findings.fail(17, "2 rows lost")
    said = capsys.readouterr().out
    assert said == "FAILED kills 17: 2 rows lost; repeat with: python -m benchmarks.chaos --seed 5 --only kills:17\n"
    flags = campaign.parse(said.split("benchmarks.chaos ")[1].split())
    assert (flags.seed, lanes.cases_of(flags.only)) == (5, [17])
    assert lanes.cases_of("corpora:3-5") == [3, 4, 5]
    assert lanes.cases_of("corpora") is None


def test_unknown_lanes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        campaign.parse(["--only", "nothing"])
    assert "--only nothing: there is no such lane; expected one of corpora," in capsys.readouterr().err


def test_raw_results_and_tables_are_of_the_same_campaign() -> None:
    """What the page says of kills is what the raw results hold."""
    raw, page = json.loads(report.RESULTS.read_text()), report.PAGE.read_text()
    assert f"Seed {raw['seed']}, commit {raw['commit']}, {raw['date']}" in page
    cases = raw["lanes"]["kills"]["cases"]
    figures = raw["lanes"]["kills"]["figures"]
    assert sum(len(case["kills"]) for case in cases) == figures["kills"] == sum(figures["targets"].values())
    assert f"{figures['kills']:,} kills in {figures['runs']} runs" in page
    assert sum(case["equal"] for case in cases) == figures["bit_equal_runs"]
    assert set(figures["targets"]) == set(TARGETS)
    assert raw["lanes"].keys() == lanes.LANES.keys()
    assert {case["layout"] for case in cases} == {layout.name for layout in kills.LAYOUTS}
