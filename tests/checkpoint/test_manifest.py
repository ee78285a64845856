"""What proves that a checkpoint is whole. Oracles: hashlib; files damaged on purpose."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lcl_megatron.checkpoint.manifest import (
    MANIFEST_FILE,
    DamagedCheckpointError,
    FileEntry,
    Manifest,
    file_sha256,
    read_manifest,
    verify,
    write_file,
)

FILES = {"a.safetensors": bytes(range(256)) * 5, "b.safetensors": bytes(range(255, -1, -1)) * 5, "state.json": b"{}"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step-00000012"
    folder.mkdir()
    entries = {name: write_file(folder / name, content) for name, content in FILES.items()}
    (folder / MANIFEST_FILE).write_text(Manifest(12, "abcd", entries).text())
    return folder


def test_what_was_written_is_what_the_manifest_says(checkpoint: Path) -> None:
    manifest = verify(checkpoint)
    assert (manifest.step, manifest.attempt) == (12, "abcd")
    assert manifest == read_manifest(checkpoint)
    for name, content in FILES.items():
        assert manifest.files[name] == FileEntry(len(content), hashlib.sha256(content).hexdigest())
        assert file_sha256(checkpoint / name) == manifest.files[name].sha256


def test_every_flipped_bit_is_found_and_its_file_named(checkpoint: Path) -> None:
    rng = random.Random(0)
    for name in [*FILES, MANIFEST_FILE]:
        path = checkpoint / name
        content = path.read_bytes()
        for _ in range(60):
            place = rng.randrange(8 * len(content))
            changed = bytearray(content)
            changed[place // 8] ^= 1 << place % 8
            path.write_bytes(changed)
            with pytest.raises(DamagedCheckpointError, match=name):
                verify(checkpoint)
        path.write_bytes(content)
    verify(checkpoint)


def _swap(folder: Path) -> None:
    first, second = (folder / name for name in ("a.safetensors", "b.safetensors"))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def _edit(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / MANIFEST_FILE).read_text())
        (folder / MANIFEST_FILE).write_text(json.dumps(content | changes))

    return edit


def _foreign(folder: Path) -> None:
    """The manifest of another step, itself intact."""
    (folder / MANIFEST_FILE).write_text(Manifest(13, "abcd", {}).text())


def _names(name: str) -> Callable[[Path], object]:
    """A manifest, itself intact, that names one file."""
    return lambda folder: (folder / MANIFEST_FILE).write_text(Manifest(12, "abcd", {name: FileEntry(1, "")}).text())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.safetensors").unlink(), "a.safetensors cannot be read: No such file"),
        (lambda folder: (folder / "a.safetensors").write_bytes(b""), "a.safetensors holds 0 bytes instead of 1280"),
        (_swap, "a.safetensors was changed after it was written; b.safetensors was changed"),
        (lambda folder: (folder / MANIFEST_FILE).unlink(), "has no manifest.json: it is no complete checkpoint"),
        (lambda folder: (folder / MANIFEST_FILE).write_bytes(b""), "manifest.json is damaged: JSONDecodeError"),
        (lambda folder: (folder / MANIFEST_FILE).write_text("[" * 100_000), "manifest.json is damaged: RecursionError"),
        (lambda folder: (folder / MANIFEST_FILE).write_text("[]"), "manifest.json is damaged"),
        (_edit(attempt="efgh"), "manifest.json was changed after it was written"),
        (_edit(step=11), "manifest.json was changed after it was written"),
        (_edit(format_version=99), "manifest.json was changed after it was written|format .* 99"),
        (_foreign, "manifest.json belongs to step 13, and not to a folder of this name"),
        (_edit(step=float("inf")), "manifest.json is damaged: OverflowError"),
        (_names("../a.safetensors"), r"names files outside the checkpoint: '\.\./a.safetensors'"),
        (_names(".."), r"names files outside the checkpoint: '\.\.'"),
        (_names(""), r"names files outside the checkpoint: ''"),
        (_names("a\0b"), r"names files outside the checkpoint: 'a\\x00b'"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], object], message: str, checkpoint: Path) -> None:
    damage(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=message):
        verify(checkpoint)


def test_a_copy_may_have_any_name_but_that_of_another_step(checkpoint: Path) -> None:
    best = checkpoint.rename(checkpoint.with_name("best"))
    assert verify(best).step == 12
    with pytest.raises(DamagedCheckpointError, match="belongs to step 12"):
        verify(best.rename(best.with_name("step-00000014")))


def test_a_file_is_never_written_over_another(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"first")
    with pytest.raises(FileExistsError, match="file"):
        write_file(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
