"""Who may ask a run to stop, and what a signal does when. Oracles: exit statuses of processes; the files they leave.

A process that only listens is started from a few lines: what a signal does must not hang on torch, which has not been
imported when the first may come.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lcl_megatron.training.loop import train
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.stop import SECONDS_OF_ONE_REQUEST, StopSignal
from tests.training.launched_runs import PATIENCE_S, environment
from tests.training.small_runs import DataFolder, plain_document, small_config, train_and_read

LISTEN = """
import ctypes, os, sys, time
from lcl_megatron.training.ending import ExitStatus
from lcl_megatron.training.stop import StopSignal

def wait_in_a_library():  # as in a collective that never ends: no Python handler runs here
    mutex = (ctypes.c_byte * 64)()
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    print("ready", flush=True)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)

stop = StopSignal()
stop.listen()
"""


class Listener:
    """A process that listens and then does something."""

    def __init__(self, body: str, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LISTEN + body],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | variables,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def end(self, *numbers: signal.Signals, said: str = "") -> tuple[int, str]:
        """Send signals, 2 seconds and more apart, then a line; return exit status and standard error."""
        for i, number in enumerate(numbers):
            if i:
                assert self.process.poll() is None
                time.sleep(1.2 * SECONDS_OF_ONE_REQUEST)
            self.process.send_signal(number)
        _, errors = self.process.communicate(said, PATIENCE_S)
        return self.process.returncode, errors


# A loop: every line is a step, at whose end a stop is obeyed.
STEPS = """
stop.begin()
print("ready", flush=True)
for step in sys.stdin:
    pass
while not stop.requested:
    time.sleep(0.01)
print(stop.reason)
sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_training_a_process_leaves_at_once(number: signal.Signals) -> None:
    status, errors = Listener("wait_in_a_library()").end(number)
    assert status == 75
    assert errors == (
        f"stopped by {number.name} before training began; nothing has changed; start the same command again\n"
    )


def test_a_rank_says_which_it_is() -> None:
    _, errors = Listener("wait_in_a_library()", RANK="3").end(signal.SIGTERM)
    assert errors.startswith("[rank 3] stopped by SIGTERM before training began")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_the_same_signal_again_ends_a_process_that_hangs(number: signal.Signals, status: int) -> None:
    found, errors = Listener("stop.begin()\nwait_in_a_library()").end(number, number)
    assert found == status
    assert errors == f"{number.name} came again: leaving at once; what was not saved yet is lost\n"


def test_sigterm_after_sigusr1_leaves_the_time_to_save() -> None:
    """Slurm sends both when a job's time is up."""
    listener = Listener(STEPS)
    assert listener.end(signal.SIGUSR1, signal.SIGTERM) == (75, "")


def test_one_request_that_comes_twice_is_one_request() -> None:
    """From Slurm to all processes, and from torchrun to its ranks."""
    listener = Listener(STEPS)
    listener.process.send_signal(signal.SIGTERM)
    assert listener.end(signal.SIGTERM) == (75, "")


LEAVING = """
stop.begin()
stop.leave(ExitStatus.STOPPED)
print("ready", flush=True)
sys.stdin.readline()
stop.close()
print("closed", flush=True)
sys.stdin.readline()
sys.exit(75)
"""


def test_a_process_on_its_way_out_ignores_torchrun() -> None:
    """Which sends SIGTERM to all as soon as one has left, and would report the signal instead of the status."""
    listener = Listener(LEAVING, TORCHELASTIC_RUN_ID="any")
    listener.process.send_signal(signal.SIGTERM)
    assert listener.process.stdin is not None
    assert listener.process.stdout is not None
    listener.process.stdin.write("\n")
    listener.process.stdin.flush()
    assert listener.process.stdout.readline() == "closed\n"
    assert listener.end(signal.SIGTERM, said="\n") == (75, "")


def test_a_process_that_hangs_on_its_way_out_leaves_when_told_again() -> None:
    body = "stop.begin()\nstop.leave(ExitStatus.FINISHED)\nwait_in_a_library()"
    status, errors = Listener(body).end(signal.SIGTERM, signal.SIGTERM)
    assert (status, errors) == (0, "SIGTERM came while leaving: everything is saved, leaving at once\n")


def test_a_signal_to_a_forked_child_is_not_one_to_its_parent() -> None:
    body = """
stop.begin()
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.write(writer, b"!")
    while not stop.requested:
        time.sleep(0.01)
    os._exit(3)
os.read(reader, 1)
os.kill(child, 15)
assert os.waitpid(child, 0)[1] == 3 << 8
print("ready", flush=True)
time.sleep(0.2)
sys.exit(int(stop.requested))
"""
    assert Listener(body).end() == (0, "")


def test_signals_are_given_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with StopSignal() as stop:
        stop.begin()
        assert [signal.getsignal(number) for number in numbers] != before
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested
        assert (stop.reason, stop.received) == ("SIGUSR1", (signal.SIGUSR1,))
    assert [signal.getsignal(number) for number in numbers] == before
    stop.close()


# The stop file, and what the loop makes of a request.


def test_the_stop_file_is_seen_and_removed_when_obeyed(tmp_path: Path) -> None:
    stop = StopSignal()
    stop.watch_stop_file(str(tmp_path))
    assert not stop.requested
    (tmp_path / "stop").touch()
    end = time.monotonic() + PATIENCE_S
    while not stop.requested:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert stop.reason == "stop file"
    stop.forget_stop_file()
    assert list(tmp_path.iterdir()) == []


def test_a_request_to_an_earlier_run_is_not_obeyed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("stop", "outcome.json"):
        (tmp_path / name).touch()
    stop = StopSignal()
    stop.watch_stop_file(str(tmp_path))
    assert not stop.requested
    assert list(tmp_path.iterdir()) == []
    assert f"{tmp_path / 'stop'} was there before this run began: removed, and not obeyed" in caplog.text


def test_ranks_that_were_started_again_obey_a_request_to_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (tmp_path / "stop").touch()
    stop = StopSignal()
    stop.watch_stop_file(str(tmp_path))
    assert stop.requested


def test_a_run_without_a_folder_has_no_stop_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stop").touch()
    stop = StopSignal()
    stop.watch_stop_file("")
    assert not stop.requested
    assert (tmp_path / "stop").exists()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = DataFolder(tmp_path_factory.mktemp("stop") / "data")
    data.write([plain_document(number) for number in range(12)])
    data.preprocess()
    return data.corpus


def _kill(save: Path) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _touch(save: Path) -> None:
    (save / "stop").touch()


@pytest.mark.parametrize(("ask", "reason"), [(_kill, "SIGTERM"), (_touch, "stop file")])
def test_a_run_that_is_asked_saves_and_says_so(
    ask: Callable[[Path], None], reason: str, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save = tmp_path / "save"
    save.mkdir()
    with caplog.at_level("INFO"), run_from(small_config(corpus, checkpoint={"save": str(save)})) as run:
        ask(save)
        ending = train(run)
    assert (ending.step, ending.status, ending.reason) == (1, 75, reason)
    assert sorted(path.name for path in save.iterdir()) == ["outcome.json", "step-00000001"]
    assert caplog.messages[-1] == (
        f"stopped by {reason} at step 1 of 8; saved {save / 'step-00000001'}; start the same command again to go on"
    )


def test_without_a_folder_a_stop_says_that_nothing_is_saved(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), run_from(small_config(corpus)) as run:
        os.kill(os.getpid(), signal.SIGTERM)
        assert train(run).status == 75
    assert caplog.messages[-1].startswith("stopped by SIGTERM at step 1 of 8; nothing is saved without --save")


def test_exit_interval_is_an_intended_end(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save, logs = str(tmp_path / "save"), str(tmp_path / "logs")
    config = small_config(corpus, checkpoint={"save": save}, logging={"exit_interval": 5, "log_dir": logs})
    with caplog.at_level("INFO"):
        train_and_read(config)
        assert caplog.messages[-1].startswith("stopped by --exit-interval 5 at step 5 of 8; saved")
        train_and_read(config)
        assert caplog.messages[-1].startswith("finished at step 8 of 8; saved")
