"""What a rank owes ``torchrun``, and what it must not leave to it. It needs nothing but the standard library.

torchrun 2.13 starts one agent per node, the parent of the ranks there. An agent that is killed, also by SIGUSR1,
leaves its ranks behind; and one that was given ``--max-restarts`` starts them again after any exit status but 0.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def is_torchrun() -> bool:
    """Return whether ``torchrun`` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def die_with_launcher() -> None:
    """Ask the kernel to kill this process when its agent dies; nothing without ``torchrun``, or outside Linux.

    Ranks that outlive their agent would go on writing beside those that are started in their place. Without torchrun
    the parent is a shell, and a run that was started with ``nohup`` outlives it on purpose.
    """
    if not is_torchrun() or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The agent may have died before the kernel was asked. Its number says nothing: in a container it may be 1.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def restart_count() -> int:
    """Return how often this agent has started its ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def would_restart() -> bool:
    """Return whether the agent would start the ranks again if one left with a status other than 0."""
    return is_torchrun() and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > restart_count()


def forwards(number: signal.Signals) -> bool:
    """Return whether the agent, when a signal comes to it, sends it on to all its ranks and ends (else it dies).

    SIGTERM and others do; ``torchrun --signals-to-handle`` adds to them.
    """
    return number.name in os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM").split(",")


def end_agent() -> None:
    """Tell this node's agent to end instead of starting the ranks again: it then sends SIGTERM to all of them."""
    os.kill(os.getppid(), signal.SIGTERM)
