"""Where images lie: folders, tars, folders of tars.

Oracles: files and members written by the test, an index built anew by brute force from tarfile's own listing, and
rejects listed by hand.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data import tar_index
from lcl_megatron.data.image_folder import ImageFileError, ImageFolder, check_name, url_file_name
from lcl_megatron.data.image_store import ImageTars, open_image_store
from lcl_megatron.data.tar_index import TarIndex, hash_name, open_tar_index
from tests.data.tars import sample, special, write_tar

LIMIT = 1 << 20
URL = "https://example.org/a/../b?x=1&y=\u00e9"


def reason(store: object, name: str) -> str:
    with pytest.raises(ImageFileError) as caught:
        store.read(name)
    return caught.value.reason


# Folders


def test_a_folder_may_be_flat_or_split_by_the_first_two_characters(tmp_path):
    (tmp_path / "ab").mkdir()
    (tmp_path / "sub").mkdir()
    for name in ("flat.jpg", "ab/abcd.jpg", "sub/x.jpg", "ab/abboth.jpg", "abboth.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    store = open_image_store(tmp_path, LIMIT)
    assert isinstance(store, ImageFolder)
    expected = {
        "flat.jpg": "flat.jpg",
        "abcd.jpg": "ab/abcd.jpg",
        "ab/abcd.jpg": "ab/abcd.jpg",
        "sub/x.jpg": "sub/x.jpg",
        "abboth.jpg": "abboth.jpg",
    }
    assert {name: store.read(name).decode() for name in expected} == expected
    for name in ("x.jpg", "fl", "..a", "a", "sub/sub/x.jpg"):
        assert reason(store, name) == "missing file"


@pytest.mark.parametrize("split", [False, True])
def test_an_image_named_by_its_url_lies_under_the_hash_of_the_url(tmp_path, split: bool):
    name = hashlib.sha256(URL.encode()).hexdigest()
    assert url_file_name(URL) == name
    folder = tmp_path / name[:2] if split else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"image")
    store = open_image_store(tmp_path, LIMIT)
    assert store.read(URL) == b"image"
    with pytest.raises(ImageFileError, match="missing file: [0-9a-f]{64}: the SHA-256 of the URL"):
        store.read(URL + "x")


def test_a_url_is_never_a_path(tmp_path):
    root = tmp_path / "images"
    (root / "https:" / "a").mkdir(parents=True)
    (root / "https:" / "a" / "b.jpg").write_bytes(b"no")
    (tmp_path / "secret").write_bytes(b"secret")
    store = open_image_store(root, LIMIT)
    for name in ("https://a/b.jpg", "file:///../../secret", "https://../../../secret"):
        assert reason(store, name) == "missing file"
    for name in ("https://a/\0", "https://a/\udc80"):
        assert reason(store, name) == "unsafe image name"


@given(st.text(max_size=12))
def test_a_name_that_passes_stays_below_the_folder(name: str):
    """Oracle: the operating system's own idea of the path."""
    try:
        check_name(name)
    except ImageFileError:
        return
    file = url_file_name(name) if "://" in name else name
    assert os.path.normpath(f"/root-of-images/{file}").startswith("/root-of-images/")


# Tars


def members_of(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive.getmembers() if info.isreg()}


NAME = st.from_regex(r"[a-z0-9]{1,12}(/[a-z0-9]{1,6})?", fullmatch=True)


@given(
    st.lists(
        st.dictionaries(NAME, st.tuples(st.binary(min_size=1, max_size=900), st.booleans(), st.booleans()), max_size=6),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=40, deadline=None)
def test_every_image_is_found_by_name_and_by_url(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("tars")
    names: dict[str, list[bytes]] = {}
    urls: dict[str, bytes] = {}
    for number, samples in enumerate(shards):
        members = []
        for key, (image, record, first) in samples.items():
            names.setdefault(f"{key}.jpg", []).append(image)
            parts = sample(key, image, "caption", {"url": f"https://a/{number}/{key}", "key": key} if record else None)
            members += parts[::-1] if first else parts
            if record:
                urls[f"https://a/{number}/{key}"] = image
        write_tar(folder / f"{number:05d}.tar", members)
    store = open_image_store(folder, LIMIT)
    assert isinstance(store, ImageTars)
    for name, images in names.items():
        if len(images) == 1:
            assert store.read(name) == store.read(f"./{name}") == images[0]
        else:
            assert reason(store, name) == "ambiguous image name"
    assert {url: store.read(url) for url in urls} == urls
    for name in ("absent.jpg", "https://a/absent", *(name.replace(".jpg", ".txt") for name in names)):
        assert reason(store, name) == "missing file"


def test_a_single_tar_with_a_folder_inside(tmp_path):
    tar = write_tar(tmp_path / "images.tar", [special("./", tarfile.DIRTYPE), ("./a.jpg", b"a"), ("./b/c.png", b"c")])
    store = open_image_store(tar, LIMIT)
    assert (store.read("a.jpg"), store.read("b/c.png"), store.read("./a.jpg")) == (b"a", b"c", b"a")
    assert reason(store, "c.png") == "missing file"


def test_the_first_of_two_images_of_one_url_is_taken(tmp_path):
    record = {"url": "https://a/1"}
    for number, image in (("1", b"second"), ("0", b"first"), ("2", b"third")):
        write_tar(tmp_path / f"{number}.tar", sample(number, image, "a", record))
    assert open_image_store(tmp_path, LIMIT).read("https://a/1") == b"first"


def test_images_of_one_name_are_told_with_their_tars(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", sample("000", b"%d" % number))
    with pytest.raises(ImageFileError, match=r"ambiguous image name: 2 members of that name in 0.tar, 1.tar"):
        open_image_store(tmp_path, LIMIT).read("000.jpg")


def test_what_is_no_image_of_a_record_cannot_be_read(tmp_path):
    members = [
        special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard.jpg", tarfile.LNKTYPE, "good.jpg"),
        special("device.jpg", tarfile.CHRTYPE),
        ("/absolute.jpg", b"x"),
        ("../outside.jpg", b"x"),
        ("good.jpg", b"good"),
        ("empty.jpg", b""),
        ("large.jpg", b"x" * 101),
        ("limit.jpg", b"x" * 100),
        *sample("0", b"0", None, {"url": ["https://a"]}),
        ("1.jpg", b"1"),
        ("1.json", b"{broken"),
        ("2.jpg", b"2"),
        ("2.json", b'{"url": "https://\\ud800"}'),
        ("3.jpg", b"3"),
        ("3.json", b'{"url": "no-url"}'),
        ("4.jpg", b"4"),
        ("4.json", b'{"url": "https://b/' + b"x" * (1 << 20) + b'"}'),
    ]
    store = open_image_store(write_tar(tmp_path / "a.tar", members), 100)
    expected = {
        "link.jpg": "missing file",
        "hard.jpg": "missing file",
        "device.jpg": "missing file",
        "/absolute.jpg": "unsafe image name",
        "../outside.jpg": "unsafe image name",
        "absolute.jpg": "missing file",
        "outside.jpg": "missing file",
        "empty.jpg": "not an image",
        "large.jpg": "file too large",
        "https://a": "missing file",
        "no-url": "missing file",
    }
    assert {name: reason(store, name) for name in expected} == expected
    readable = {"good": b"good", "limit": b"x" * 100, **{str(n): b"%d" % n for n in range(5)}}
    assert {name: store.read(f"{name}.jpg") for name in readable} == readable


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
    assert reason(store, "200.jpg") == "missing file"


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


def test_many_processes_build_one_index(tmp_path):
    names = []
    for number in range(4):
        keys = [f"{number}_{index:04d}" for index in range(300)]
        names += [f"{key}.jpg" for key in keys]
        write_tar(tmp_path / f"{number}.tar", [m for key in keys for m in sample(key, key.encode(), "c", {})])
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        found = pool.map(_read_in_process, [(tmp_path, name) for name in names[::25]], chunksize=1)
    assert found == [name.removesuffix(".jpg").encode() for name in names[::25]]
    assert len([path for path in (tmp_path / ".index").iterdir() if path.is_dir()]) == 1


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


def test_memory_stays_bounded_while_an_index_is_built(tmp_path):
    """A tar of 60,000 members, indexed in a process of its own. The array of all entries would be 4 MB, the objects
    of tarfile 100 MB; the limit of 40 MB above the interpreter leaves room for one chunk of entries only.
    """
    script = """
import resource, sys
from pathlib import Path
from lcl_megatron.data import image_store
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = image_store.open_image_store(Path(sys.argv[1]), 1 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, store.read("019999.jpg").decode())
"""
    members = [m for n in range(20_000) for m in sample(f"{n:06d}", b"%d" % n, "c", {"url": f"https://a/{n}"})]
    tar = write_tar(tmp_path / "a.tar", members)
    done = subprocess.run([sys.executable, "-c", script, str(tar)], capture_output=True, text=True, check=True)
    kilobytes, image = done.stdout.split()
    assert image == "19999"
    assert int(kilobytes) < 40_000


def test_an_index_without_entries(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", b"a")])
    store = open_image_store(tmp_path, LIMIT)
    assert reason(store, "a.jpg") == "missing file"
    (folder,) = (path for path in (tmp_path / ".index").iterdir() if path.is_dir())
    assert TarIndex(folder).entries == 0
    assert json.loads((folder / "manifest.json").read_text())["tars"][0][0] == "a.tar"


# What is what


def test_what_is_no_store_is_told(tmp_path):
    write_tar(tmp_path / "images.tar.gz", [("a.jpg", b"a")])
    for root in (tmp_path, tmp_path / "images.tar.gz"):
        with pytest.raises(ConfigError, match=r"images.tar.gz is a compressed tar, which cannot be read at random"):
            open_image_store(root, LIMIT)
    (tmp_path / "a.zip").write_bytes(b"")
    for name in ("a.zip", "absent", "absent.tar"):
        with pytest.raises(ConfigError, match=rf"image_root = .*{name} is no folder of images, no .tar, and no folder"):
            open_image_store(tmp_path / name, LIMIT)


def test_a_folder_becomes_a_folder_of_tars_with_its_first_tar(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"file")
    assert open_image_store(tmp_path, LIMIT).read("a.jpg") == b"file"
    write_tar(tmp_path / "0.tar", sample("a", b"member"))
    os.utime(tmp_path, ns=(1, 1))
    assert open_image_store(tmp_path, LIMIT).read("a.jpg") == b"member"
