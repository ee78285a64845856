"""The launcher, as one of its ranks sees it: what a rank owes ``torchrun``, and what it must not leave to it.

It needs nothing but the standard library.

torchrun 2.13 starts one agent per node, the parent of the ranks there. An agent that is killed, also by SIGUSR1,
leaves its ranks behind; and one that was given ``--max-restarts`` starts them again after any exit status but 0.
"""

from __future__ import annotations

import os
import signal
import sys

from lcl_megatron.parallel.parent_process import die_with_parent


def is_torchrun() -> bool:
    """Return whether ``torchrun`` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def die_with_launcher() -> None:
    """Ask the kernel to kill this process when its agent dies; nothing without ``torchrun``, or outside Linux.

    Ranks that outlive their agent would go on writing beside those that are started in their place. Without torchrun
    the parent is a shell, and a run that was started with ``nohup`` outlives it on purpose.
    """
    if is_torchrun():
        die_with_parent(os.getppid())


def say(message: str) -> None:
    """Write a line to standard error in one piece, with the rank in front on all but rank 0."""
    rank = int(os.environ.get("RANK", "0"))
    sys.stderr.write(f"{f'[rank {rank}] ' if rank else ''}{message}\n")
    sys.stderr.flush()


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
