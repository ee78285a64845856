"""Parts of tensors out of pieces of any layout. Oracle: numpy, on the whole tensor; safetensors' own reader."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lcl_megatron.checkpoint.manifest import MANIFEST_FILE, DamagedCheckpointError, read_manifest, write_file
from lcl_megatron.checkpoint.reader import CheckpointReader
from lcl_megatron.checkpoint.shard_file import NewPiece, Region, Shape, file_header, index_of, read_index, read_pieces
from lcl_megatron.checkpoint.shard_writer import complete


def _cuts(length: int, places: Sequence[int]) -> list[tuple[int, int]]:
    borders = sorted({0, length, *(place % (length + 1) for place in places)})
    return list(itertools.pairwise(borders))


def _partition(shape: Shape, places: Sequence[int], shares: int) -> list[Region]:
    """Cut a tensor into boxes, and each box's elements into ranges."""
    axes = [_cuts(length, places[axis:]) for axis, length in enumerate(shape)]
    regions = []
    for box in itertools.product(*axes):
        whole = Region.box(shape, [begin for begin, _ in box], [end - begin for begin, end in box])
        share = -(-whole.numel // shares)
        for begin in range(0, whole.numel, share):
            regions.append(replace(whole, begin=begin, end=min(begin + share, whole.numel)))
    return regions


def _values(whole: np.ndarray, region: Region) -> np.ndarray:
    box = whole[tuple(slice(o, o + s) for o, s in zip(region.offset, region.size, strict=True))]
    return box.reshape(-1)[region.begin : region.end]


def write_checkpoint(folder: Path, tensors: dict[str, tuple[np.ndarray, list[Region]]], files: int = 2) -> Path:
    """Write tensors, cut into pieces that are dealt to some files, as runs do."""
    staging = folder / "staging"
    staging.mkdir()
    written = {}
    for number in range(files):
        mine = [
            (NewPiece(name, region, "F32", 4), _values(whole, region))
            for name, (whole, regions) in tensors.items()
            for region in regions[number::files]
        ]
        content = file_header([entry for entry, _ in mine]) + b"".join(values.tobytes() for _, values in mine)
        name = f"part-{number}.safetensors"
        entry = write_file(staging / name, content)
        written[name] = (entry.size, entry.sha256)
    complete(str(staging), str(folder / "step-00000001"), 1, "test", written, None, (0, 0))
    return folder / "step-00000001"


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    saved=st.lists(st.integers(0, 7), min_size=3, max_size=6),
    asked=st.lists(st.integers(0, 7), min_size=3, max_size=6),
    shares=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_any_part_of_any_layout(
    shape: list[int],
    saved: list[int],
    asked: list[int],
    shares: tuple[int, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    whole = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    regions = _partition(tuple(shape), saved, shares[0])
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), {"a.weight": (whole, regions)})
    reader = CheckpointReader(checkpoint)
    for region in _partition(tuple(shape), asked, shares[1]):
        np.testing.assert_array_equal(reader.region("a.weight", region).numpy(), _values(whole, region))
    np.testing.assert_array_equal(reader.read(["a.weight"])["a.weight"].numpy(), whole)


def test_files_are_safetensors_and_say_where_their_pieces_lie(tmp_path: Path) -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    lower = Region.box((4, 6), (2, 0), (2, 6))
    regions = [Region.box((4, 6), (0, 0), (2, 6)), replace(lower, end=5), replace(lower, begin=5)]
    checkpoint = write_checkpoint(tmp_path, {"a": (whole, regions), "b": (whole[0], [Region.whole((6,))])}, files=1)
    path = checkpoint / "part-0.safetensors"
    with safe_open(path, "pt") as file:
        assert file.get_tensor("b").tolist() == whole[0].tolist()
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}
    assert sorted(shapes.values()) == [(2, 6), (5,), (6,), (7,)]
    assert [stored.region for name, _, stored in read_pieces(path) if name == "a"] == regions
    assert read_index(checkpoint / "index.json") == index_of([path])


def test_pieces_that_do_not_add_up_are_no_checkpoint(tmp_path: Path) -> None:
    whole = np.zeros((4, 6), dtype=np.float32)
    with pytest.raises(ValueError, match="a has 24 elements, and the files hold 12 of it"):
        write_checkpoint(tmp_path, {"a": (whole, [Region.box((4, 6), (0, 0), (2, 6))])})
    assert not (tmp_path / "step-00000001").exists()


def test_files_that_contradict_each_other_are_no_checkpoint(tmp_path: Path) -> None:
    paths = []
    for number, shape in enumerate([(4,), (5,)]):
        paths.append(tmp_path / f"{number}.safetensors")
        paths[-1].write_bytes(file_header([NewPiece("a", Region.whole(shape), "F32", 4)]) + bytes(4 * math.prod(shape)))
    with pytest.raises(ValueError, match=r"1.safetensors: a is F32 \(5,\) here and F32 \(4,\) elsewhere"):
        index_of(paths)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, {"a": (np.zeros((4, 6), np.float32), [Region.whole((4, 6))])})
    with pytest.raises(DamagedCheckpointError, match=r"a has shape \(4, 6\) in the checkpoint, expected \(6, 4\)"):
        CheckpointReader(checkpoint).region("a", Region.whole((6, 4)))


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 40, (10).to_bytes(8, "little") + b"[1, 2, 3] ", (2).to_bytes(8, "little") + b"{}"]
)
def test_file_of_something_else_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="x.safetensors is not a file of tensor pieces"):
        read_pieces(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', '{"a": {"dtype": "F32", "shape": [1], "pieces": [1]}}'])
def test_index_of_something_else_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match="index.json is not the index of a checkpoint"):
        read_index(tmp_path / "index.json")


def test_dtypes_keep_their_bits(tmp_path: Path) -> None:
    """bfloat16 has no numpy dtype: its bytes go through as they are."""
    values = torch.randn(5).bfloat16()
    content = file_header([NewPiece("a", Region.whole((5,)), "BF16", 2)]) + values.view(torch.uint8).numpy().tobytes()
    staging = tmp_path / "staging"
    staging.mkdir()
    entry = write_file(staging / "x.safetensors", content)
    complete(str(staging), str(tmp_path / "c"), 1, "t", {"x.safetensors": (entry.size, entry.sha256)}, None, (0, 0))
    assert torch.equal(CheckpointReader(tmp_path / "c").read(["a"])["a"], values)


def _region(**changes: object) -> dict[str, object]:
    return {"shape": [4, 6], "offset": [0, 0], "size": [4, 6], "begin": 0, "end": 24} | changes


@pytest.mark.parametrize(
    "edit",
    [
        {"position": -8},
        {"position": 10**15},
        {"region": _region(begin=-1, end=23)},
        {"region": _region(begin=0, end=25)},
        {"region": _region(begin=24, end=0)},
        {"region": _region(offset=[1, 0])},
        {"region": _region(offset=[-1, 0])},
        {"region": _region(size=[24])},
        {"region": _region(size=[-4, -6])},
        {"region": _region(shape=[4, 7])},
        {"region": _region(size=[2, 6], end=12)},
        {"dtype": "F8"},
        {"shape": [10**12, 10**6]},
    ],
    ids=str,
)
def test_an_index_of_the_impossible_is_refused_though_its_hash_is_right(
    edit: dict[str, object], tmp_path: Path
) -> None:
    """Not out of the file's bounds, nor with an allocation of its size."""
    whole = np.zeros((4, 6), dtype=np.float32)
    checkpoint = write_checkpoint(tmp_path, {"a": (whole, [Region.whole((4, 6))])}, files=1)
    index = json.loads((checkpoint / "index.json").read_text())
    (index["a"] if edit.keys() & index["a"].keys() else index["a"]["pieces"][0]).update(edit)
    _rewrite(checkpoint, json.dumps(index))
    with pytest.raises(DamagedCheckpointError, match=r"index.json: the pieces of a are not all inside the tensor"):
        CheckpointReader(checkpoint)


def test_a_piece_that_is_there_twice_does_not_make_up_for_a_gap(tmp_path: Path) -> None:
    whole = np.arange(24, dtype=np.float32)
    regions = [replace(Region.whole((24,)), begin=begin, end=begin + 8) for begin in (0, 8, 16)]
    twice = [regions[0], regions[0], regions[2]]
    (tmp_path / "bad").mkdir()
    with pytest.raises(ValueError, match=r"a: elements of its box \[24\] at \[0\] are in no file, or in two"):
        write_checkpoint(tmp_path / "bad", {"a": (whole, twice)})
    checkpoint = write_checkpoint(tmp_path, {"a": (whole, regions)}, files=1)
    index = json.loads((checkpoint / "index.json").read_text())
    index["a"]["pieces"][1]["region"] |= {"begin": 0, "end": 8}
    _rewrite(checkpoint, json.dumps(index))
    with pytest.raises(DamagedCheckpointError, match="8 of 24 values of a are there"):
        CheckpointReader(checkpoint).read(["a"])


def test_numbers_beyond_all_bounds_are_damage(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, {"a": (np.zeros(4, np.float32), [Region.whole((4,))])}, files=1)
    text = (checkpoint / "index.json").read_text()
    _rewrite(checkpoint, text.replace('"position": ', '"position": 1e999'))
    with pytest.raises(DamagedCheckpointError, match=r"index.json is not the index of a checkpoint: OverflowError"):
        CheckpointReader(checkpoint)


def _rewrite(checkpoint: Path, index: str) -> None:
    """Replace the index by one with which the manifest agrees."""
    path = checkpoint / "index.json"
    path.unlink()
    manifest = read_manifest(checkpoint)
    files = manifest.files | {"index.json": write_file(path, index.encode())}
    (checkpoint / MANIFEST_FILE).write_text(replace(manifest, files=files).text())
