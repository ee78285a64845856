"""What a rank owes torchrun. Oracles: the process table; the variables that torchrun sets, written out by hand.

The parent here is a process of a few lines; a real agent is killed in ``test_preemption.py``.
"""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from lcl_megatron.training import launcher
from tests.training.launched_runs import PATIENCE_S, environment, wait_until_gone

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline(), flush=True)
time.sleep(1000)
"""
CHILD = """
import signal, time
from lcl_megatron.training.launcher import die_with_launcher
die_with_launcher()
print("ready", flush=True)
time.sleep(1000)
"""
VARIABLES = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
@pytest.mark.parametrize("is_torchrun", [True, False])
def test_process_dies_with_its_parent_under_torchrun_only(is_torchrun: bool) -> None:
    """Without torchrun the parent is a shell, which a run under nohup outlives."""
    variables = {name: value for name, value in environment().items() if name not in VARIABLES}
    if is_torchrun:
        variables["TORCHELASTIC_RUN_ID"] = "any"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True, env=variables, start_new_session=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline().split()[0]))
    try:
        parent.kill()
        parent.wait(PATIENCE_S)
        if is_torchrun:
            wait_until_gone([child])
        else:
            # The kernel sends the signal before the parent can be waited for.
            assert child.status() != psutil.STATUS_ZOMBIE
    finally:
        if child.is_running():
            child.kill()
        parent.stdout.close()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((None, None, None), False),
        (("run", "0", "0"), False),
        (("run", "3", "0"), True),
        (("run", "3", "2"), True),
        (("run", "3", "3"), False),
    ],
)
def test_an_agent_restarts_its_ranks_while_it_has_restarts_left(
    values: tuple[str | None, ...], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert launcher.would_restart() is expected
    assert launcher.restart_count() == int(values[2] or 0)


def test_an_agent_sends_on_what_it_was_told_to_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_SIGNALS_TO_HANDLE", raising=False)
    assert [launcher.forwards(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == [True, False]
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    assert [launcher.forwards(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == [True, True]
