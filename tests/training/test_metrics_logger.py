"""Reports of a run.

Oracles: the expected lines written out by hand, Python's strict JSON parser, TensorBoard's own reader, an
uninterrupted run against an interrupted one, a screen simulated by applying carriage returns and erasures.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lcl_megatron.training.metrics_logger import METRICS_FILE, SUPERSEDED_FILE, TENSORBOARD_FOLDER, MetricsLogger


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def clock_of(*seconds: float) -> Iterator[float]:
    """Return a clock's readings; the last one is repeated."""
    yield from seconds
    while True:
        yield seconds[-1]


def make_logger(log_dir: Path | None, console: io.StringIO | None = None, **options: object) -> MetricsLogger:
    arguments = {"train_iters": 2000, "is_writer": True, "console": console or io.StringIO(), **options}
    return MetricsLogger(log_dir, **arguments)  # type: ignore[arg-type]


def reject_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line, parse_constant=reject_constant) for line in path.read_text().splitlines()]


def test_console_line_holds_the_known_metrics_in_their_fixed_order() -> None:
    console = io.StringIO()
    clock = clock_of(0.0, 12.0)
    logger = make_logger(None, console, clock=lambda: next(clock))
    metrics = {
        "perf/step_ms": 120.4,
        "perf/tokens_per_s": 40_096.0,
        "perf/images_per_s": 812.0,
        "optimizer/learning_rate": 3e-4,
        "contrast/image_to_context_accuracy": 0.125,
        "loss/contrastive": 5.1,
        "loss/generation": 3.4119,
        "an/unknown_metric": 7.0,
    }
    logger.log(120, metrics)
    # 12 s for 120 steps leave 188 s for the other 1,880.
    assert console.getvalue() == (
        "step  120/2000 | gen  3.412 | con  5.100 | i2c  12.5% | lr 3.0e-04 | images/s   812 | tokens/s 40.1k"
        " | step   120 ms | left 00:03:08\n"
    )


def test_console_columns_align_between_reports() -> None:
    console = io.StringIO()
    logger = make_logger(None, console, clock=lambda: 0.0)
    for step, loss, rate in ((9, 10.25, 95.0), (1999, 2.5, 123_456.0)):
        logger.log(step, {"loss/generation": loss, "perf/images_per_s": rate})
    first, second = console.getvalue().splitlines()
    assert [i for i, c in enumerate(first) if c == "|"] == [i for i, c in enumerate(second) if c == "|"]
    assert "95" in first
    assert "123k" in second


def test_time_left_forgets_a_slow_start() -> None:
    console = io.StringIO()
    now = [0.0]
    logger = make_logger(None, console, train_iters=1000, clock=lambda: now[0])
    now[0] = 3600.0  # compilation: an hour for the first step
    logger.log(1, {})
    assert console.getvalue().endswith("left 999:00:00\n")
    for step in range(2, 32):
        now[0] += 2.0
        logger.log(step, {})
    assert console.getvalue().endswith("left 00:32:18\n")  # 969 steps of 2 s


def test_time_left_of_a_resumed_run_counts_from_where_it_resumed() -> None:
    console = io.StringIO()
    clock = clock_of(0.0, 50.0)
    logger = make_logger(None, console, train_iters=1000, resume_step=900, clock=lambda: next(clock))
    logger.log(950, {})
    assert console.getvalue().endswith("left 00:00:50\n")


def test_jsonl_holds_every_metric_and_survives_non_finite_values(tmp_path: Path) -> None:
    with make_logger(tmp_path / "run") as logger:
        logger.log(1, {"loss/total": 2.5, "data/consumed_rows": 16, "feature": torch.tensor(0.5)})  # type: ignore[dict-item]
        logger.log(2, {"loss/total": math.nan, "optimizer/grad_norm": math.inf, "low": -math.inf})
        lines = read_lines(tmp_path / "run" / METRICS_FILE)  # before close: flushed

    assert lines[0]["step"] == 1
    assert lines[0]["data/consumed_rows"] == 16
    assert lines[0]["feature"] == 0.5
    assert float(lines[0]["time"]) > 1.6e9  # type: ignore[arg-type]
    assert [lines[1][name] for name in ("loss/total", "optimizer/grad_norm", "low")] == ["NaN", "Infinity", "-Infinity"]
    assert math.isnan(float(str(lines[1]["loss/total"])))
    assert float(str(lines[1]["low"])) == -math.inf


def test_console_shows_non_finite_values() -> None:
    console = io.StringIO()
    make_logger(None, console).log(1, {"loss/generation": math.nan, "perf/tokens_per_s": math.inf})
    assert "gen    nan" in console.getvalue()
    assert "tokens/s   inf" in console.getvalue()


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    with make_logger(tmp_path) as logger:
        logger.log(10, {"loss/generation": 4.0})
        logger.log(20, {"loss/generation": 3.0})
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/generation")] == [(10, 4.0), (20, 3.0)]


def test_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    with make_logger(tmp_path) as logger:
        for step in (10, 20, 30):
            logger.log(step, {"loss/total": 100.0 + step})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 40, "time": 17')  # the process died while it wrote

    with make_logger(tmp_path, resume_step=20) as logger:  # the checkpoint was that of step 20
        for step in (30, 40):
            logger.log(step, {"loss/total": 200.0 + step})

    lines = read_lines(tmp_path / METRICS_FILE)
    assert [(line["step"], line["loss/total"]) for line in lines] == [(10, 110), (20, 120), (30, 230), (40, 240)]
    superseded = read_lines(tmp_path / SUPERSEDED_FILE)
    assert [(line["step"], line["loss/total"]) for line in superseded] == [(30, 130)]
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER), purge_orphaned_data=True)
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [(10, 110), (20, 120), (30, 230), (40, 240)]


def test_new_run_in_a_used_folder_keeps_the_old_reports_aside(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        with make_logger(tmp_path) as logger:
            logger.log(1, {"loss/total": loss})
    assert [line["loss/total"] for line in read_lines(tmp_path / METRICS_FILE)] == [2.0]
    assert [line["loss/total"] for line in read_lines(tmp_path / SUPERSEDED_FILE)] == [1.0]


def test_process_that_is_not_the_writer_writes_nothing(tmp_path: Path) -> None:
    console = Terminal()
    with make_logger(tmp_path / "run", console, is_writer=False) as logger:
        logger.log(1, {"loss/total": 1.0})
        logger.progress(2, force=True)
    assert console.getvalue() == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["step", "time"])
def test_metric_with_a_reserved_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make_logger(None).log(1, {name: 1.0})


def screen_of(text: str) -> list[str]:
    """Return the rows a terminal shows after ``text``; knows carriage return and erase-line only."""
    rows = [""]
    for piece in text.replace("\r\x1b[2K", "\x00").replace("\n", "\n\x01").split("\n"):
        if piece.startswith("\x01"):
            rows.append("")
            piece = piece[1:]
        parts = piece.split("\x00")
        rows[-1] = rows[-1] + parts[0] if len(parts) == 1 else parts[-1]
    return rows


def test_terminal_shows_one_progress_bar_below_the_reports() -> None:
    console = Terminal()
    now = [0.0]
    logger = make_logger(None, console, train_iters=100, clock=lambda: now[0])
    for step in range(1, 21):
        now[0] += 1.0
        logger.progress(step)
        if step % 10 == 0:
            logger.log(step, {"loss/total": 1.0})
    assert screen_of(console.getvalue()) == [
        "step  10/100 | loss  1.000 | left 00:01:30",
        "step  20/100 | loss  1.000 | left 00:01:20",
        "[######------------------------]  20%  step 20/100  left 00:01:20",
    ]
    logger.close()
    assert console.getvalue().endswith("left 00:01:20\n")


def test_progress_is_redrawn_only_a_few_times_a_second_and_never_off_a_terminal() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    for console in (terminal, pipe):
        now = [0.0]
        logger = make_logger(None, console, clock=lambda now=now: now[0])
        for step in range(1000):
            now[0] = step * 0.001
            logger.progress(step)
    assert 4 <= terminal.getvalue().count("\r") <= 6
    assert pipe.getvalue() == ""
