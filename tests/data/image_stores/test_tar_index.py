"""The index of image tars: what it holds, when it is built, and that processes share the work.

Oracles: tarfile's own listing, byte equality of indices built in one go, by several processes and after kills.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from lcl_megatron.data.image_stores import tar_index
from lcl_megatron.data.image_stores.image_folder import ImageFileError
from lcl_megatron.data.image_stores.image_store import open_image_store
from lcl_megatron.data.image_stores.tar_index import TarIndex, hash_name, open_tar_index
from tests.data.tars import sample, write_tar

LIMIT = 1 << 20


def members_of(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive.getmembers() if info.isreg()}


def test_the_index_is_what_brute_force_finds(tmp_path):
    """2,000 images in 3 tars: every key is there, ascending, and its place holds its bytes."""
    rng = np.random.default_rng(0)
    for number in range(3):
        members = []
        for index in range(number, 2000, 3):
            members += sample(f"{index:06d}", rng.bytes(int(rng.integers(1, 60))), "c", {"url": f"https://a/{index}"})
        write_tar(tmp_path / f"{number}.tar", members)
    tars = sorted(tmp_path.glob("*.tar"))
    index = open_tar_index(tars, tmp_path / ".index")
    assert index.entries == 4000
    keys = np.fromfile(next((tmp_path / ".index").glob("*/keys.bin")), dtype="<u8")
    assert (np.diff(keys.astype(object)) >= 0).all()
    contents = [members_of(tar) for tar in tars]
    for image in range(2000):
        for name in (f"{image:06d}.jpg", f"https://a/{image}"):
            (place,) = index.find(name)
            assert place.tar == image % 3
            with open(tars[place.tar], "rb") as stream:
                stream.seek(place.offset)
                assert stream.read(place.size) == contents[place.tar][f"{image:06d}.jpg"]


def test_equal_first_halves_of_hashes_are_told_apart(tmp_path, monkeypatch: pytest.MonkeyPatch):
    whole = hash_name
    monkeypatch.setattr(tar_index, "hash_name", lambda name: (whole(name)[0] % 3, whole(name)[1]))
    members = [(f"{number}.jpg", b"%d" % number) for number in range(200)]
    store = open_image_store(write_tar(tmp_path / "a.tar", members), LIMIT)
    assert [store.read(name) for name, _ in members] == [data for _, data in members]
    with pytest.raises(ImageFileError, match="missing file: member of none of 1 tars"):
        store.read("200.jpg")


def test_the_index_is_built_once_and_again_when_a_tar_changes(tmp_path, monkeypatch: pytest.MonkeyPatch):
    tars = [write_tar(tmp_path / f"{n}.tar", sample(str(n), b"%d" % n)) for n in range(2)]
    open_image_store(tmp_path, LIMIT)
    (first,) = (path for path in (tmp_path / ".index").iterdir() if path.is_dir())
    before = (first / "manifest.json").stat().st_mtime_ns
    open_image_store(tmp_path, LIMIT)
    assert (first / "manifest.json").stat().st_mtime_ns == before
    old = open_image_store(tmp_path, LIMIT)
    write_tar(tars[1], sample("new", b"new") + sample("1", b"one"))
    os.utime(tars[1], ns=(0, 0))
    store = open_image_store(tmp_path, LIMIT)
    assert (store.read("new.jpg"), store.read("1.jpg"), store.read("0.jpg")) == (b"new", b"one", b"0")
    # The index of the tars as they were is gone, but not for a process that uses it.
    assert not first.exists()
    assert old.read("0.jpg") == b"0"
    assert {path.name for path in (tmp_path / ".index").iterdir() if path.is_file()} == {"lock"}


def test_a_tar_that_shrinks_while_in_use_stops_the_run(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("a.jpg", b"x" * 4000)])
    store = open_image_store(tar, LIMIT)
    os.truncate(tar, 2000)
    with pytest.raises(OSError, match=r"a.tar ends inside a.jpg: it was changed while in use"):
        store.read("a.jpg")


def test_a_build_that_was_killed_leaves_nothing_in_the_way(tmp_path):
    write_tar(tmp_path / "a.tar", sample("0", b"0"))
    (tmp_path / ".index" / "building-x").mkdir(parents=True)
    (tmp_path / ".index" / "building-x" / "bucket0").write_bytes(b"junk")
    assert open_image_store(tmp_path, LIMIT).read("0.jpg") == b"0"
    assert not (tmp_path / ".index" / "building-x").exists()


@pytest.mark.parametrize("cut", [0, 700, 1024])
def test_a_damaged_tar_stops_with_its_name_and_leaves_no_index(tmp_path, cut: int):
    tar = write_tar(tmp_path / "a.tar", [("a.jpg", b"x" * 512), ("b.jpg", b"y")])
    os.truncate(tar, cut)
    with pytest.raises(OSError, match=r"a.tar is a damaged tar file .*; fetch it again or leave it out"):
        open_image_store(tmp_path, LIMIT)
    assert not list(tmp_path.rglob("manifest.json"))


def _read_in_process(arguments: tuple[Path, str]) -> bytes:
    folder, name = arguments
    return open_image_store(folder, LIMIT).read(name)


def many_tars(folder: Path) -> list[str]:
    """Write 8 tars of 150 images that hold their own keys; returns the names of the images."""
    keys = [[f"{number}_{index:04d}" for index in range(150)] for number in range(8)]
    for number, group in enumerate(keys):
        write_tar(folder / f"{number}.tar", [m for key in group for m in sample(key, key.encode(), "c", {})])
    return [f"{key}.jpg" for group in keys for key in group]


def index_hash(folder: Path) -> dict[str, bytes]:
    (index,) = (path for path in (folder / ".index").iterdir() if path.is_dir())
    return {path.name: path.read_bytes() for path in index.iterdir()}


def test_many_processes_build_one_index(tmp_path):
    names = many_tars(tmp_path)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        found = pool.map(_read_in_process, [(tmp_path, name) for name in names[::25]], chunksize=1)
    assert found == [name.removesuffix(".jpg").encode() for name in names[::25]]
    together = index_hash(tmp_path)
    shutil.rmtree(tmp_path / ".index")
    open_image_store(tmp_path, LIMIT)
    assert index_hash(tmp_path) == together


def test_killed_builds_end_in_the_same_index(tmp_path):
    """A process is killed after 0, 1, 2, ... tars; then others of the same tars go on where it stopped."""
    names = many_tars(tmp_path)
    open_image_store(tmp_path, LIMIT)
    whole = index_hash(tmp_path)
    shutil.rmtree(tmp_path / ".index")
    script = """
import os, signal, sys
from pathlib import Path
from lcl_megatron.data.image_stores import image_store
from lcl_megatron.data.image_stores import tar_index
write_piece, done = tar_index._write_piece, []
def killed_after(tar, number, piece):
    if len(done) == int(sys.argv[2]):
        piece.with_suffix(".tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(number)
    write_piece(tar, number, piece)
tar_index._write_piece = killed_after
image_store.open_image_store(Path(sys.argv[1]), 1 << 20)
"""
    pieces = 0
    for count in (0, 1, 2, 3):
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(count)], check=False)
        assert done.returncode == -signal.SIGKILL
        pieces += count
        (folder,) = (tmp_path / ".index").glob("pieces-*")
        assert len([path for path in folder.iterdir() if not path.suffix]) == pieces
    assert open_image_store(tmp_path, LIMIT).read(names[0]) == names[0].removesuffix(".jpg").encode()
    assert index_hash(tmp_path) == whole


def test_an_index_of_a_folder_that_cannot_be_written_lies_in_the_cache(tmp_path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "tars"
    folder.mkdir()
    write_tar(folder / "a.tar", sample("0", b"0"))
    make = os.mkdir

    def read_only(path: os.PathLike[str] | str, *arguments: int) -> None:
        if Path(path).parent == folder:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *arguments)

    monkeypatch.setattr(os, "mkdir", read_only)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert open_image_store(folder, LIMIT).read("0.jpg") == b"0"
    assert not (folder / ".index").exists()
    (index,) = (tmp_path / "cache" / "lcl_megatron" / "tar_index").glob("*/*/manifest.json")
    before = index.stat().st_mtime_ns
    assert open_image_store(folder, LIMIT).read("0.jpg") == b"0"
    assert index.stat().st_mtime_ns == before


def test_an_index_that_was_made_elsewhere_is_used_where_nothing_can_be_written(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", sample("0", b"0"))
    open_image_store(tmp_path, LIMIT)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refuse)
    assert open_image_store(tmp_path, LIMIT).read("0.jpg") == b"0"


def test_memory_stays_bounded_while_an_index_is_built(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """4,000 images: tarfile's headers alone would be 6 MB, their entries as Python objects 2 MB."""
    monkeypatch.setattr(tar_index, "CHUNK_ENTRIES", 256)
    members = [m for n in range(4000) for m in sample(f"{n:06d}", b"%d" % n, "c", {"url": f"https://a/{n}"})]
    tar = write_tar(tmp_path / "a.tar", members)
    tracemalloc.start()
    store = open_image_store(tar, LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert store.read("003999.jpg") == b"3999"
    assert peak < 1_500_000


def test_an_index_without_entries(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", b"a")])
    store = open_image_store(tmp_path, LIMIT)
    with pytest.raises(ImageFileError, match="missing file"):
        store.read("a.jpg")
    (folder,) = (path for path in (tmp_path / ".index").iterdir() if path.is_dir())
    assert TarIndex(folder).entries == 0
    assert json.loads((folder / "manifest.json").read_text())["tars"][0][0] == "a.tar"


def test_folders_of_others_beside_an_index_are_kept(tmp_path):
    (tmp_path / ".index" / "mine").mkdir(parents=True)
    (tmp_path / ".index" / "mine" / "file").write_text("x")
    write_tar(tmp_path / "a.tar", sample("0", b"0"))
    assert open_image_store(tmp_path, 1 << 20).read("0.jpg") == b"0"
    assert (tmp_path / ".index" / "mine" / "file").read_text() == "x"


def test_an_index_folder_that_is_a_link_is_not_followed(tmp_path, monkeypatch):
    home, data = tmp_path / "home", tmp_path / "data"
    (home / "documents").mkdir(parents=True)
    data.mkdir()
    (data / ".index").symlink_to(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tar(data / "a.tar", sample("0", b"0"))
    assert open_image_store(data, 1 << 20).read("0.jpg") == b"0"
    assert [path.name for path in home.iterdir()] == ["documents"]
