"""The real launcher, started from a shell as a user would: recovery with all imports, and what it leaves behind.

One run under ``torchrun --max-restarts`` loses a rank, then the other one, a writer, both ranks; then torchrun itself
is killed, and at last asked to end (SIGTERM), as a scheduler does that needs the node. Each time the run must go on,
and at the end it must equal an undisturbed run of the fast harness.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos.findings import Findings
from benchmarks.chaos.launcher import Launch
from benchmarks.chaos.peace import undisturbed
from benchmarks.chaos.processes import call_in_child, descendants, wait_until_alone, writers
from benchmarks.chaos.small_run import DP2, make_corpus, small_config
from benchmarks.chaos.stored import newest_step, tensor_digests
from lcl_megatron.config import RunConfig
from lcl_megatron.config.toml import to_toml

LANE = "torchrun"
ROOT = Path(__file__).parents[2]
STEPS, SAVE_INTERVAL = 400, 20
STEPS_BETWEEN = 30
"""Steps that are waited for before the next fault."""
FAULTS = ("rank 1", "rank 0", "writer", "all ranks", "torchrun", "SIGTERM")
STUCK_S = 120.0
_STEP = re.compile(rb"^step +(\d+)/", re.MULTILINE)


def run(seed: int, faults: tuple[str, ...], folder: Path) -> Findings:
    """Disturb one run under torchrun.

    Args:
        seed: of the campaign, for messages; the moments are fixed.
        faults: of ``FAULTS``, in this order.
        folder: scratch.
    """
    findings = Findings(LANE, seed)
    corpus = call_in_child(make_corpus, folder / "data")
    peace = undisturbed(Launch(_config(corpus, folder / "peace"), 2, folder / "peace", max_restarts=0))
    job = Job(_config(corpus, folder / "job"), folder / "job")
    for number, fault in enumerate(faults):
        try:
            findings.cases.append({"case": number, "fault": fault} | job.disturb(fault))
        except JobError as error:
            findings.fail(number, f"{fault}: {error}\n{job.tail()}")
            break
    status = job.end()
    equal = tensor_digests(job.save, STEPS) == tensor_digests(peace.save, STEPS)
    if status or not equal:
        findings.fail("all", f"it ended with status {status}, bit-equal: {equal}\n{job.tail()}")
    left = wait_until_alone()
    if left:
        findings.fail("all", f"left behind: {left}")
    by_fault = {case["fault"]: case for case in findings.cases}
    findings.figures = {
        "faults": len(findings.cases),
        "bit_equal": equal,
        "recovery_with_imports_s": {fault: case["recovery_s"] for fault, case in by_fault.items()},
        "ranks_outlive_torchrun_s": by_fault.get("torchrun", {}).get("ended_after_s"),
        "sigterm": by_fault.get("SIGTERM"),
    }
    return findings


def _config(corpus: Path, place: Path) -> RunConfig:
    return small_config(
        corpus,
        DP2,
        training={"train_iters": STEPS},
        checkpoint={"save": str(place / "save"), "save_interval": SAVE_INTERVAL},
        logging={"log_interval": 1},
    )


class JobError(RuntimeError):
    """The job did not do what it should."""


class Job:
    """A run under torchrun.

    Args:
        config: what is trained.
        folder: holds the configuration, the output and the checkpoints.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.save = Path(config.checkpoint.save)
        self._folder = folder
        self._log = folder / "log.txt"
        (folder / "run.toml").write_text(to_toml(config), encoding="utf-8")
        self._start()

    def _start(self) -> None:
        script = [str(ROOT / "pretrain_lcl.py"), "--config", str(self._folder / "run.toml")]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        with open(self._log, "ab") as log:
            self._torchrun = subprocess.Popen(
                [*launcher, "--max-restarts", "20", *script],
                cwd=self._folder,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def disturb(self, fault: str) -> dict[str, Any]:
        """Wait for some steps, do what is asked, and return how long it took until the next step was reported."""
        self._wait_for_steps(STEPS_BETWEEN)
        seen, facts = len(self._steps()), dict[str, Any]()
        begin = time.monotonic()
        if fault in ("torchrun", "SIGTERM"):
            facts = self._end_torchrun(signal.SIGKILL if fault == "torchrun" else signal.SIGTERM, begin)
            seen = len(self._steps())
            self._start()
        else:
            for process in self._victims(fault):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        self._wait_for_steps(1, seen)
        return facts | {"recovery_s": round(time.monotonic() - begin, 2)}

    def _victims(self, fault: str) -> list[int]:
        ranks = self._ranks()
        if len(ranks) != 2:
            raise JobError(f"{len(ranks)} ranks are running instead of 2")
        if fault == "writer":
            end = time.monotonic() + STUCK_S
            while not (found := writers(self._torchrun.pid)):
                if time.monotonic() > end:
                    raise JobError("no process writes checkpoints")
                time.sleep(0.01)
            return found[:1]
        return list(ranks.values()) if fault == "all ranks" else [ranks[int(fault[-1])]]

    def _ranks(self) -> dict[int, int]:
        """Return the process id of each rank."""
        found = {}
        for process in descendants(self._torchrun.pid):
            with contextlib.suppress(psutil.Error):
                is_script = any(word.endswith("pretrain_lcl.py") for word in process.cmdline())
                if is_script and process.ppid() == self._torchrun.pid:
                    found[int(process.environ()["RANK"])] = process.pid
        return found

    def _end_torchrun(self, number: int, begin: float) -> dict[str, Any]:
        """Signal torchrun; return its status and how long its ranks lived on."""
        ranks = list(self._ranks().values())
        step = len(self._steps()) and self._steps()[-1]
        self._torchrun.send_signal(number)
        status = self._torchrun.wait(STUCK_S)
        while any(psutil.pid_exists(rank) and psutil.Process(rank).status() != psutil.STATUS_ZOMBIE for rank in ranks):
            if time.monotonic() > begin + STUCK_S:
                raise JobError(f"ranks lived on for {STUCK_S:.0f} s after torchrun")
            time.sleep(0.005)
        ended = round(time.monotonic() - begin, 2)
        return {"status": status, "ended_after_s": ended, "step": step, "saved_step": newest_step(self.save)}

    def _steps(self) -> list[int]:
        """Return the steps that were reported so far."""
        return [int(step) for step in _STEP.findall(self._log.read_bytes())]

    def _wait_for_steps(self, number: int, seen: int | None = None) -> None:
        """Wait until so many more steps are reported."""
        seen = len(self._steps()) if seen is None else seen
        end = time.monotonic() + STUCK_S
        while len(self._steps()) < seen + number:
            if time.monotonic() > end:
                raise JobError(f"{number} more steps were not done within {STUCK_S:.0f} s")
            if self._torchrun.poll() is not None:
                raise JobError(f"torchrun ended with status {self._torchrun.returncode}")
            time.sleep(0.01)

    def end(self) -> int:
        """Wait for the end of the run; return its status."""
        try:
            return self._torchrun.wait(STUCK_S)
        except subprocess.TimeoutExpired:
            self._torchrun.kill()
            return self._torchrun.wait()

    def tail(self) -> str:
        """Return the last lines of the output."""
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
