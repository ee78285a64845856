"""Members of tar files. Oracles: members written by the test, and tarfile's own listing; damage made byte by byte."""

from __future__ import annotations

import gzip
import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_megatron.data.image_stores.tar_members import MAX_HEADER_BYTES, tar_members
from tests.data.tars import special, write_tar

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=150).filter(
    lambda name: name not in (".", "..")
)


@given(
    st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=1200)), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from(["t.tar", "t.tar.gz", "t.tgz"]),
)
@settings(max_examples=60, deadline=None)
def test_members_read_back(tmp_path_factory, members: list[tuple[str, bytes]], format: int, name: str):
    path = write_tar(tmp_path_factory.mktemp("tar") / name, members, format)
    raw = path.read_bytes() if name.endswith(".tar") else gzip.decompress(path.read_bytes())
    found = [(member, member.read()) for member in tar_members(path)]
    assert [(member.name, data) for member, data in found] == members
    # The place in the file is the one that a tar store reads from.
    assert [raw[member.offset : member.offset + member.size] for member, _ in found] == [data for _, data in members]


def test_members_need_not_be_read_and_folders_are_left_out(tmp_path):
    path = write_tar(tmp_path / "a.tar", [special("d", tarfile.DIRTYPE), ("d/a", b"1" * 600), ("d/b", b"2")])
    assert [(member.name, member.size, member.problem) for member in tar_members(path)] == [
        ("d/a", 600, ""),
        ("d/b", 1, ""),
    ]


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device or another special file"),
        (tarfile.BLKTYPE, "a device or another special file"),
        (tarfile.FIFOTYPE, "a device or another special file"),
    ],
)
def test_what_is_no_plain_file_is_told_and_never_read(tmp_path, kind: bytes, problem: str):
    (member, _) = tar_members(write_tar(tmp_path / "a.tar", [special("x.jpg", kind, "/etc/passwd"), ("y", b"1")]))
    assert member.problem == problem
    with pytest.raises(ValueError, match=f"x.jpg is {problem}; only plain files are read"):
        member.read()


def test_joined_archives_are_read_to_the_end(tmp_path):
    parts = [write_tar(tmp_path / f"{n}.tar", [(f"{n}.jpg", b"x" * n)]).read_bytes() for n in range(3)]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    assert [member.name for member in tar_members(tmp_path / "all.tar")] == ["0.jpg", "1.jpg", "2.jpg"]


def test_an_archive_without_members_has_none(tmp_path):
    assert list(tar_members(write_tar(tmp_path / "a.tar", []))) == []


def damaged(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(OSError, match="is a damaged tar file") as caught:
        [member.read() for member in tar_members(path)]
    assert str(path) in str(caught.value)
    assert "fetch it again or leave it out" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_tar_cut_short_anywhere_is_an_error(tmp_path, name: str):
    """Stock tarfile reads most of these without a word, as shorter archives."""
    path = write_tar(tmp_path / name, [(f"{n}.jpg", bytes([n]) * 700) for n in range(5)])
    data = path.read_bytes()
    end = 5 * (512 + 1024) if name == "a.tar" else len(data)
    for cut in [*range(0, end, 512), end - 1, 100, 513, 2000]:
        if cut < end:
            damaged(path, data[:cut])
    if name == "a.tar":
        assert "cut short" in damaged(path, data[:end])
        path.write_bytes(data[: end + 512])
        assert len(list(tar_members(path))) == 5
        with tarfile.open(fileobj=io.BytesIO(data[: 512 + 1024])) as stock:
            assert len(stock.getmembers()) == 1


@pytest.mark.parametrize("cut", [512, 1024, 1200, 1536 - 1])
def test_a_tar_that_ends_inside_the_headers_of_a_long_name_is_an_error(tmp_path, cut: int):
    data = write_tar(tmp_path / "a.tar", [("x" * 300, b"y")], tarfile.PAX_FORMAT).read_bytes()
    assert "it ends inside a header" in damaged(tmp_path / "a.tar", data[:cut])


def test_a_damaged_header_is_an_error_and_not_the_end(tmp_path):
    data = bytearray(write_tar(tmp_path / "a.tar", [(f"{n}.jpg", b"x" * 700) for n in range(5)]).read_bytes())
    data[2 * 1536 + 3] ^= 1
    assert "bad checksum at byte 3072" in damaged(tmp_path / "a.tar", bytes(data))
    with tarfile.open(fileobj=io.BytesIO(data)) as stock:
        assert len(stock.getmembers()) == 2


def test_a_changed_byte_in_a_gzip_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", [("a.jpg", bytes(range(256)) * 9)])
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    damaged(path, bytes(data))


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100, b"\x1f\x8b" * 40])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_what_is_no_tar_is_an_error(tmp_path, content: bytes, name: str):
    damaged(tmp_path / name, content)


def test_an_extended_header_that_announces_much_is_refused_before_it_is_read(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 200 << 20
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(header.tobuf())
        for _ in range(20):
            stream.write(bytes(10 << 20))
    tracemalloc.start()
    with pytest.raises(OSError, match=f"an extended header of {200 << 20} bytes; the limit is {MAX_HEADER_BYTES}"):
        list(tar_members(path))
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_a_negative_size_is_an_error_and_no_endless_loop(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"size": "-1024"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info)
        archive.addfile(tarfile.TarInfo("b.jpg"))
    assert "-1024 bytes" in damaged(tmp_path / "a.tar", buffer.getvalue())
