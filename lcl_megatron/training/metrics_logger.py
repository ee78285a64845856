"""Where a run's numbers go: the console, ``metrics.jsonl`` and TensorBoard.

One call per report, on one process. The logger knows how to write numbers, not what they mean: a metric is a name
with a value, names such as ``loss/generation`` are made by ``Meter.report``. The only names known here are those
that have a column on the console.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from lcl_megatron.checkpoint.durable_files import replace_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
"""File of a log folder with one JSON object per report."""
SUPERSEDED_FILE = "metrics.superseded.jsonl"
"""File that receives the reports which a resumed run takes back."""
TENSORBOARD_FOLDER = "tensorboard"
"""Folder of a log folder with TensorBoard's event files."""

_REPORTS_FOR_SPEED = 20
_SECONDS_BETWEEN_REDRAWS = 0.2
_BAR_WIDTH = 30


def _si(value: float) -> str:
    """Return a rate with three significant digits and a unit prefix, e.g. ``40.1k``."""
    if not math.isfinite(value):
        return str(value)
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


# metric, label, format; in the order of the line. Widths are fixed so that columns of successive lines align.
_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss/generation", "gen", "{:6.3f}".format),
    ("loss/contrastive", "con", "{:6.3f}".format),
    ("loss/latent_regression", "reg", "{:7.4f}".format),
    ("loss/total", "loss", "{:6.3f}".format),
    ("contrast/image_to_context_accuracy", "i2c", "{:6.1%}".format),
    ("contrast/context_to_image_accuracy", "c2i", "{:6.1%}".format),
    ("contrast/logit_scale", "scale", "{:6.2f}".format),
    ("features/pooled_std", "std", "{:6.4f}".format),
    ("features/pooled_effective_rank", "rank", "{:5.1f}".format),
    ("optimizer/learning_rate", "lr", "{:.1e}".format),
    ("optimizer/grad_norm", "grad", "{:6.3f}".format),
    ("perf/images_per_s", "images/s", lambda value: f"{_si(value):>5}"),
    ("perf/tokens_per_s", "tokens/s", lambda value: f"{_si(value):>5}"),
    ("perf/model_flops_utilization", "mfu", "{:5.1%}".format),
    ("perf/data_wait_ms", "wait", "{:4.0f} ms".format),
    ("perf/step_ms", "step", "{:5.0f} ms".format),
    ("data/bad_images", "bad", "{:.0f}".format),
)


class MetricsLogger:
    """Write one report per call to the console, to ``metrics.jsonl`` and to TensorBoard.

    ``metrics.jsonl`` holds one JSON object per line, flushed: ``step``, ``time`` (seconds since 1970) and every
    metric under its name. JSON has no NaN: non-finite values are the strings ``"NaN"``, ``"Infinity"`` and
    ``"-Infinity"``, which ``float()`` reads back. A line is written by one ``write`` and a line that a dying process
    left unfinished is removed when the run resumes.

    Resuming at step k takes back every report after step k, because these steps are computed again: they move from
    ``metrics.jsonl`` to ``metrics.superseded.jsonl`` (nothing measured is deleted) and TensorBoard hides them. So the
    file of a run that was interrupted looks like that of a run that was not.

    On a terminal a progress bar stands below the last report; elsewhere (files, pipes, Slurm logs) there are only
    plain lines, without control characters.
    """

    def __init__(
        self,
        log_dir: Path | None,
        train_iters: int,
        is_writer: bool,
        resume_step: int = 0,
        console: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the files of ``log_dir``, which is made if it is missing.

        Args:
            log_dir: folder for the files; None = console only.
            train_iters: optimizer steps of the whole run.
            is_writer: True on the one process that reports; elsewhere every method does nothing.
            resume_step: steps that are already done; 0 = a new run.
            console: stream for the lines; None = standard output.
            clock: seconds on a clock that never runs backwards, for the time that is left.
        """
        self._train_iters = train_iters
        self._is_writer = is_writer
        self._console = sys.stdout if console is None else console
        self._clock = clock
        self._marks: deque[tuple[int, float]] = deque([(resume_step, clock())], maxlen=_REPORTS_FOR_SPEED + 1)
        self._last_redraw = -math.inf
        self._is_live = is_writer and self._console.isatty()
        self._bar_is_drawn = False
        self._file: TextIO | None = None
        self._tensorboard: SummaryWriter | None = None
        if is_writer and log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)
            _take_back_reports(log_dir, resume_step)
            self._file = (log_dir / METRICS_FILE).open("a", encoding="utf-8")
            self._tensorboard = _open_tensorboard(log_dir / TENSORBOARD_FOLDER, resume_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report the metrics of a step on every output.

        Args:
            step: optimizer steps done, 1 after the first.
            metrics: value by name; anything that ``float()`` takes, 0-dimensional tensors included.

        Raises:
            ValueError: a metric is called ``step`` or ``time``, which would overwrite the line's own fields.
        """
        if not self._is_writer:
            return
        values = {name: float(value) for name, value in metrics.items()}
        if reserved := {"step", "time"} & values.keys():
            raise ValueError(f"metric names {sorted(reserved)} are taken by the report itself; choose other names")
        self._marks.append((step, self._clock()))
        self._write_line(self._format_line(step, values))
        if self._file is not None:
            fields = {name: _to_json(value) for name, value in values.items()}
            line = json.dumps({"step": step, "time": round(time.time(), 3), **fields}, allow_nan=False)
            self._file.write(line + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        self.progress(step, force=True)

    def progress(self, step: int, force: bool = False) -> None:
        """Redraw the progress bar; nothing unless the console is a terminal. Cheap enough to call at every step.

        Args:
            step: optimizer steps done.
            force: draw even if the last redraw was a moment ago.
        """
        if not self._is_live:
            return
        now = self._clock()
        if not force and now - self._last_redraw < _SECONDS_BETWEEN_REDRAWS:
            return
        self._last_redraw = now
        done = min(1.0, step / self._train_iters)
        filled = int(done * _BAR_WIDTH)
        bar = "#" * filled + "-" * (_BAR_WIDTH - filled)
        steps = f"step {step}/{self._train_iters}"
        self._console.write(f"\r\x1b[2K[{bar}] {done:4.0%}  {steps}  left {self._time_left(step)}")
        self._console.flush()
        self._bar_is_drawn = True

    def close(self) -> None:
        """Close the files; calling it again is harmless."""
        if self._bar_is_drawn:
            self._console.write("\n")
            self._console.flush()
            self._bar_is_drawn = False
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        self._is_writer = self._is_live = False

    def __enter__(self) -> MetricsLogger:
        """Return the logger."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self.close()

    def _format_line(self, step: int, values: Mapping[str, float]) -> str:
        """Return the console line: only columns whose metric is there, always in the same order."""
        width = len(str(self._train_iters))
        cells = [f"step {step:>{width}}/{self._train_iters}"]
        cells += [f"{label} {show(values[name])}" for name, label, show in _COLUMNS if name in values]
        cells.append(f"left {self._time_left(step)}")
        return " | ".join(cells)

    def _write_line(self, line: str) -> None:
        """Write a line for good, in the place of the progress bar if one is drawn."""
        erase = "\r\x1b[2K" if self._bar_is_drawn else ""
        self._console.write(f"{erase}{line}\n")
        self._console.flush()
        self._bar_is_drawn = False

    def _time_left(self, step: int) -> str:
        """Return the time to the end as ``HH:MM:SS``, from the mean step time of the last reports.

        A window and not the whole run: the first steps compile kernels and fill the loaders, and would be paid for
        in every forecast.
        """
        first_step, first_time = self._marks[0]
        last_step, last_time = self._marks[-1]
        if last_step <= first_step:
            return "--:--:--"
        seconds = (last_time - first_time) / (last_step - first_step) * max(0, self._train_iters - step)
        minutes, second = divmod(round(seconds), 60)
        hours, minute = divmod(minutes, 60)
        return f"{hours:02d}:{minute:02d}:{second:02d}"


def _to_json(value: float) -> float | str:
    """Return the value, or its name if JSON cannot hold it."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _take_back_reports(log_dir: Path, resume_step: int) -> None:
    """Move reports after ``resume_step`` to ``metrics.superseded.jsonl`` and drop an unfinished last line.

    The shortened file replaces the old one by a rename, so a crash in between loses nothing.
    """
    path = log_dir / METRICS_FILE
    if not path.exists():
        return
    kept: list[str] = []
    superseded: list[str] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for line in lines:
        step = _step_of(line)
        if step is not None:
            (kept if step <= resume_step else superseded).append(line)
    if len(kept) == len(lines):
        return
    if superseded:
        with (log_dir / SUPERSEDED_FILE).open("a", encoding="utf-8") as file:
            file.writelines(superseded)
    replace_text(path, "".join(kept))


def _step_of(line: str) -> int | None:
    """Return the step of a report, None if the line is not a complete report."""
    if not line.endswith("\n"):
        return None
    try:
        report: Any = json.loads(line)
    except json.JSONDecodeError:
        return None
    step = report.get("step") if isinstance(report, dict) else None
    return step if isinstance(step, int) else None


def _open_tensorboard(folder: Path, resume_step: int) -> SummaryWriter:
    """Open TensorBoard's event file; a resumed run hides the events after ``resume_step``.

    TensorBoard is imported here because the import takes seconds and only one process writes.
    """
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resume_step + 1)
