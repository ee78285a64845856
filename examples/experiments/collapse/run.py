"""The claim of the LCL paper, measured: without the contrast the encoder collapses while the text loss looks normal.

python examples/experiments/collapse/run.py --data digits --preset small --output runs/collapse

Pre-trains the same encoder with five objectives on the same images, beside an untrained and a supervised one, and on
documents that cannot be understood without looking, where generation alone must learn as well. Scores every frozen
encoder on held-out images. Writes results.json and report.html; the last line of the output is JSON.
Started again, it goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from dataset import open_data
from jobs import RunFailedError, run_jobs
from one_run import complete
from planning import plan_jobs
from report import write_report
from settings import read_preset
from summary import figures, markdown_table, summarize

from lcl_megatron.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is run, and where."""

    data: str
    """Folder of labelled images and documents about them (see dataset.py), or ``digits``: made on the spot."""
    preset: str = "small"
    """``small``: an hour of one CPU core; ``full``: one GPU; or a TOML file of your own."""
    output: Path = Path("runs/collapse")
    """Folder to write."""
    jobs: int = 2
    """Runs at a time, one thread each; 1 for a single GPU."""
    methods: tuple[str, ...] = ()
    """Names of the methods to run (methods.py); empty = all."""


def main() -> None:
    """Run the experiment."""
    arguments = tyro.cli(Arguments, description=__doc__)
    preset = read_preset(arguments.preset)
    experiment, begun = preset.experiment, time.time()
    styles = (experiment.documents, experiment.control_documents)
    data = open_data(arguments.data, arguments.output, styles, experiment.vocab_size)
    runs = arguments.output / "runs"
    plan = plan_jobs(preset, data, runs, arguments.methods)
    finished = run_jobs(plan, runs, arguments.jobs, complete, say=_say)
    summaries = summarize(finished, experiment)
    facts = {"corpus": data.name, "preset": preset.name, "documents": styles[0], "control_documents": styles[1]}
    result = figures(summaries, facts)
    (arguments.output / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    command = shlex.join(["python", *sys.argv])
    write_report(summaries, result, preset, command, arguments.output / "report.html")
    _say(f"{time.time() - begun:.0f} seconds; report: {arguments.output / 'report.html'}\n")
    main_table = [summary for summary in summaries if summary.method.role != "control"]
    control = [summary for summary in summaries if summary.method.role == "control"]
    print(f"{data.name}, documents: {styles[0]}\n\n{markdown_table(main_table)}\n")
    if control:
        print(f"Control, documents: {styles[1]}\n\n{markdown_table(control)}\n")
    print(json.dumps(result))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, RunFailedError, OSError, ValueError) as problem:
        sys.exit(f"error: {problem}")
