"""Naming who holds up the others. Oracle: boards written by hand."""

from __future__ import annotations

from lcl_megatron.parallel.heartbeats import Beat
from lcl_megatron.training.suspects import MAX_NAMED, Reading, name_suspects


def suspects(first: list[Beat], second: list[Beat]) -> list[str]:
    return name_suspects(Reading(100.0, first), Reading(135.0, second), "rank {}".format)


def later(beats: list[Beat], *alive: int) -> list[Beat]:
    return [
        Beat(beat.count + (rank in alive), beat.step, beat.phase, beat.seconds + 35) for rank, beat in enumerate(beats)
    ]


def test_the_rank_with_the_least_step_and_phase_is_behind() -> None:
    beats = [Beat(9, 7, "agree", 5.0), Beat(9, 7, "data", 6.0), Beat(9, 7, "forward_backward", 1.0)]
    assert suspects(beats, later(beats, 0, 1, 2)) == ["rank 1 is behind: step 7, data, for 41 s"]
    beats[2] = Beat(9, 6, "save", 9.0)
    assert suspects(beats, later(beats, 0, 1, 2)) == ["rank 2 is behind: step 6, save, for 44 s"]


def test_a_rank_that_writes_no_more_is_silent_wherever_it_was() -> None:
    beats = [Beat(9, 7, "agree", 5.0), Beat(9, 7, "data", 6.0), Beat(9, 7, "agree", 5.0)]
    assert suspects(beats, later(beats, 0)) == [
        "rank 1 is behind: last heard of in step 7, data, silent for at least 35 s",
        "rank 2 is silent: last heard of in step 7, agree, silent for at least 35 s",
    ]


def test_nobody_is_behind_where_all_stand_alike() -> None:
    beats = [Beat(9, 7, "forward_backward", 5.0)] * 2
    assert suspects(beats, later(beats, 0, 1)) == [
        "no rank is behind: all 2 are in step 7, forward_backward, and alive"
    ]


def test_victims_are_not_suspects_and_who_left_is_named_as_such() -> None:
    beats = [Beat(9, 7, "failed", 5.0), Beat(9, 7, "end", 6.0), Beat(9, 7, "forward_backward", 5.0)]
    assert suspects(beats, later(beats)) == [
        "rank 1 left the run in step 7: see its own messages",
        "rank 2 is behind: last heard of in step 7, forward_backward, silent for at least 35 s",
    ]


def test_of_very_many_suspects_some_are_named() -> None:
    beats = [Beat(9, 7, "agree", 5.0)] + [Beat(9, 7, "data", 5.0)] * (MAX_NAMED + 3)
    lines = suspects(beats, later(beats, *range(len(beats))))
    assert len(lines) == MAX_NAMED + 1
    assert lines[-1] == "and 3 more ranks"
