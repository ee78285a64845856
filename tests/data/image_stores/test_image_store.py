"""Where images lie: folders, tars, folders of tars.

Oracles: files and members written by the test, and rejects listed by hand.
"""

from __future__ import annotations

import hashlib
import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.image_stores.image_folder import ImageFileError, ImageFolder, check_name, url_file_name
from lcl_megatron.data.image_stores.image_store import ImageTars, open_image_store
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
    assert os.path.normpath(f"/images/{file}").startswith("/images/")


# Tars


NAME = st.from_regex(r"[a-z0-9]{1,12}(/[a-z0-9]{1,6})?", fullmatch=True)


@given(
    st.lists(
        st.dictionaries(NAME, st.tuples(st.binary(min_size=1, max_size=900), st.booleans(), st.booleans()), max_size=6),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=15, deadline=None)
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
