"""The process that writes a rank's files. Oracles: the files on disk, hashlib, the process table."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lcl_megatron.checkpoint.writer_process import NewFile, WriteError, WriterProcess

ROOT = Path(__file__).parents[2]


def image(name: str, content: bytes) -> NewFile:
    def fill(memory: memoryview) -> None:
        memory[:] = content

    return NewFile(name, len(content), fill)


@pytest.fixture
def writer() -> Iterator[WriterProcess]:
    process = WriterProcess()
    yield process
    process.close()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.01)


def test_files_are_what_was_in_memory_and_the_answer_has_their_hashes(writer: WriterProcess, tmp_path: Path) -> None:
    for step in range(3):
        # Larger at each step, so that the memory has to grow; the last one is smaller again.
        contents = {f"{step}-{k}": os.urandom(1 + 70_000 * ((step + 1) % 3) * k) for k in range(3)}
        writer.submit(tmp_path, [image(name, content) for name, content in contents.items()])
        answer = writer.answer(wait_s=60)
        assert answer is not None
        for name, content in contents.items():
            assert (tmp_path / name).read_bytes() == content
            assert answer["files"][name] == [len(content), hashlib.sha256(content).hexdigest()]


def test_a_rank_with_nothing_to_write_gets_an_answer_too(writer: WriterProcess, tmp_path: Path) -> None:
    writer.submit(tmp_path, [])
    assert writer.answer(wait_s=60) == {"files": {}}


def test_what_went_wrong_is_said_with_the_file(writer: WriterProcess, tmp_path: Path) -> None:
    writer.submit(tmp_path / "absent", [image("file", b"x")])
    with pytest.raises(WriteError, match="No such file or directory: '.*absent/file'"):
        writer.answer(wait_s=60)
    # The same process goes on.
    pid = writer.pid
    writer.submit(tmp_path, [image("file", b"x")])
    assert writer.answer(wait_s=60) is not None
    assert writer.pid == pid


def test_a_killed_process_is_noticed_and_replaced(writer: WriterProcess, tmp_path: Path) -> None:
    writer.submit(tmp_path, [image("first", b"x")])
    assert writer.answer(wait_s=60) is not None
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGSTOP)
    writer.submit(tmp_path, [image("second", b"x")])
    assert writer.answer() is None
    os.kill(writer.pid, signal.SIGKILL)
    with pytest.raises(WriteError, match=r"the writer process \d+ died \(exit status -9\)"):
        writer.answer(wait_s=60)
    # Dead before the request, too.
    writer.submit(tmp_path, [image("third", b"x")])
    assert writer.answer(wait_s=60) is not None
    os.kill(writer.pid, signal.SIGKILL)
    wait_until_gone(writer.pid)
    writer.submit(tmp_path, [image("fourth", b"x")])
    assert writer.answer(wait_s=60) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "fourth", "third"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_group_while_the_process_starts_costs_nothing(
    number: signal.Signals, writer: WriterProcess, tmp_path: Path
) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    writer.submit(tmp_path, [image("file", b"x")])
    assert writer.pid is not None
    # It has just been started, and Python takes some 20 ms before its first line: no handler is there yet.
    os.kill(writer.pid, number)
    assert writer.answer(wait_s=60) is not None
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_what_start_up_files_print_is_no_answer(
    writer: WriterProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('welcome to the cluster', flush=True)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("first", "second"):
        writer.submit(tmp_path, [image(name, b"x")])
        answer = writer.answer(wait_s=60)
        assert answer is not None
        assert answer["files"].keys() == {name}


def test_processes_leave_no_descriptors_behind(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for number in range(3):
        process = WriterProcess()
        process.submit(tmp_path, [image(str(number), b"x")])
        assert process.answer(wait_s=60) is not None
        process.kill()
        process.submit(tmp_path / "absent", [image("file", b"x")])
        with pytest.raises(WriteError):
            process.answer(wait_s=60)
        process.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_memory_comes_from_a_file_where_the_kernel_refuses_anonymous_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, flags: int = 0) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    process = WriterProcess()
    process.submit(tmp_path, [image("file", b"content")])
    assert process.answer(wait_s=60) is not None
    process.close()
    assert (tmp_path / "file").read_bytes() == b"content"


def test_without_a_process_there_is_no_answer(writer: WriterProcess) -> None:
    with pytest.raises(WriteError, match="the writer process is gone"):
        writer.answer()


PARENT = """
import os, signal, sys
from pathlib import Path
from lcl_megatron.checkpoint.writer_process import WriterProcess
writer = WriterProcess()
writer.submit(Path(sys.argv[1]), [])
writer.answer(60)
print(writer.pid, flush=True)
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_the_process_ends_with_its_rank_and_not_with_signals_to_the_group(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(pid, number)
    time.sleep(0.2)
    assert is_running(pid)
    os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    wait_until_gone(pid)
    parent.stdout.close()


def test_the_process_imports_nothing_but_the_standard_library() -> None:
    code = (
        "import sys, lcl_megatron.checkpoint.shard_writer; "
        "print(*(name for name in ('torch', 'numpy', 'megatron', 'safetensors') if name in sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert result.stdout.strip() == ""
