"""One run at a time in a folder. Oracles: the folder; processes that hold a lease and are killed."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lcl_megatron.checkpoint import lease as lease_module
from lcl_megatron.checkpoint.lease import LEASE_FILE, Lease, LeaseError
from tests.checkpoint.test_writer_process import ROOT

HOLDER = """
import signal, sys
from pathlib import Path
from lcl_megatron.checkpoint.lease import Lease
lease = Lease(Path(sys.argv[1]), "holder", beat_s=0.05)
print(flush=True)
signal.pause()
"""


def _holder(root: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def _edit(root: Path, **changes: object) -> None:
    path = root / LEASE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _attempt(root: Path) -> str:
    return str(json.loads((root / LEASE_FILE).read_text())["attempt"])


def test_a_folder_is_free_again_when_its_run_ends(tmp_path: Path) -> None:
    root = tmp_path / "not" / "there" / "yet"
    for attempt in ("first", "second"):
        lease = Lease(root, attempt)
        assert [path.name for path in root.iterdir()] == [LEASE_FILE]
        lease.close()
        lease.close()
        assert list(root.iterdir()) == []


def test_another_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    holder = _holder(tmp_path)
    with pytest.raises(LeaseError, match=f"is being written by another run: process {holder.pid} on "):
        Lease(tmp_path, "other")
    assert [path.name for path in tmp_path.iterdir()] == [LEASE_FILE]
    holder.kill()
    holder.communicate()


def test_a_killed_run_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    holder = _holder(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    # It would take an hour, were it not known that the process is gone.
    lease = Lease(tmp_path, "other", expires_s=3600)
    assert _attempt(tmp_path) == "other"
    lease.close()
    assert list(tmp_path.iterdir()) == []


def test_a_process_number_that_another_process_has_got_is_not_taken_for_the_owner(tmp_path: Path) -> None:
    first = Lease(tmp_path, "first", beat_s=3600)
    _edit(tmp_path, born="12345")  # this process's number, and another birth
    second = Lease(tmp_path, "second", expires_s=3600)
    assert _attempt(tmp_path) == "second"
    second.close()
    first.close()
    assert list(tmp_path.iterdir()) == []


def test_a_process_number_of_another_container_says_nothing(tmp_path: Path) -> None:
    holder = _holder(tmp_path)
    _edit(tmp_path, namespace="pid:[1]", born="12345")
    with pytest.raises(LeaseError, match="is being written by another run"):
        Lease(tmp_path, "other")
    holder.kill()
    holder.communicate()


def test_a_host_of_the_same_name_that_was_started_another_time_may_be_another_machine(tmp_path: Path) -> None:
    first = Lease(tmp_path, "first", beat_s=3600)
    _edit(tmp_path, boot="another")
    content = (tmp_path / LEASE_FILE).read_text()
    beating = threading.Timer(0.5, lambda: (tmp_path / LEASE_FILE).write_text(content.replace("0", "1")))
    beating.start()
    with pytest.raises(LeaseError, match="is being written by another run"):
        Lease(tmp_path, "second", expires_s=3600)
    beating.join()
    first.close()


def test_a_process_that_proc_hides_may_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is mounted with hidepid, for processes of other users."""
    root = tmp_path / "root"
    holder = _holder(root)
    proc = tmp_path / "proc"
    (proc / "sys" / "kernel").mkdir(parents=True)
    (proc / "sys" / "kernel" / "random").symlink_to("/proc/sys/kernel/random")
    (proc / "self").symlink_to("/proc/self")
    with monkeypatch.context() as patch:
        patch.setattr(lease_module, "_PROC", proc)
        with pytest.raises(LeaseError, match=f"is being written by another run: process {holder.pid} on "):
            Lease(root, "other")
        holder.kill()
        holder.communicate()
        Lease(root, "other", expires_s=3600).close()


@pytest.mark.skipif(not hasattr(os, "O_DSYNC"), reason="the system has no synchronous writes")
def test_signs_of_life_are_written_through_for_machines_elsewhere(tmp_path: Path) -> None:
    lease = Lease(tmp_path, "one")
    _, *held = lease.identity
    (descriptor,) = [
        int(name)
        for name in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{name}") and [os.fstat(int(name)).st_dev, os.fstat(int(name)).st_ino] == held
    ]
    assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DSYNC
    lease.close()


def test_a_lease_of_another_version_is_respected_while_it_changes(tmp_path: Path) -> None:
    path = tmp_path / LEASE_FILE
    path.write_text('{"format": 2, "beat": 1}')
    beating = threading.Timer(0.5, lambda: path.write_text('{"format": 2, "beat": 2}'))
    beating.start()
    with pytest.raises(LeaseError, match="is being written by another run: process 0 on an unknown host"):
        Lease(tmp_path, "next")
    beating.join()
    assert path.exists()


def test_a_silent_run_of_another_machine_is_followed_when_its_lease_has_expired(tmp_path: Path) -> None:
    first = Lease(tmp_path, "first", beat_s=3600)
    _edit(tmp_path, host="elsewhere")
    second = Lease(tmp_path, "second", expires_s=0.3, beat_s=0.05)
    assert _attempt(tmp_path) == "second"
    # The first learns of it before it publishes anything, and does not take the other's away when it ends.
    path, *held = first.identity
    found = os.stat(path)
    assert [found.st_dev, found.st_ino] != held
    with pytest.raises(LeaseError, match="is being written by another run"):
        first.renew()
    first.close()
    assert _attempt(tmp_path) == "second"
    second.close()


def test_a_folder_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    root = tmp_path / "root"
    lease = Lease(root, "first")
    (root / LEASE_FILE).unlink()
    root.rmdir()
    lease.renew()
    path, *held = lease.identity
    found = os.stat(path)
    assert [found.st_dev, found.st_ino] == held
    lease.close()
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"attempt": 1}'])
def test_a_lease_that_cannot_be_read_expires(content: str, tmp_path: Path) -> None:
    (tmp_path / LEASE_FILE).write_text(content)
    lease = Lease(tmp_path, "next", expires_s=0.1)
    assert _attempt(tmp_path) == "next"
    lease.close()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Lease(tmp_path / "file" / "root", "first")
