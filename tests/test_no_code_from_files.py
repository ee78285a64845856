"""No code runs that a file brought along: every loader is given hostile files (the source: ``test_code_runners``).

Oracles: a folder that every payload makes when it is run, and makes indeed when Python, torch or numpy are asked to.
"""

from __future__ import annotations

import builtins
import json
import pickle
import runpy
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lcl_megatron.checkpoint.convert.importing import read_source
from lcl_megatron.checkpoint.convert.official_file import read_official_state
from lcl_megatron.checkpoint.convert.whole_model import MODELING_FILE, modeling_code
from lcl_megatron.checkpoint.export_check import exported_module
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.config import ConfigError, DataConfig
from lcl_megatron.config.toml import from_toml
from lcl_megatron.data.planning import table_cache
from lcl_megatron.data.planning.build_table import build_table
from lcl_megatron.data.planning.compose import Composer
from lcl_megatron.data.planning.table_cache import open_table
from lcl_megatron.data.readers.obelics import read_obelics
from lcl_megatron.data.storage.corpus import IMAGE_ARRAYS, Corpus, manifest_hash
from lcl_megatron.data.storage.indexed_file import CorpusError
from lcl_megatron.data.tokenizer import Tokenizer
from lcl_megatron.evaluation.encoders.encoder import EncoderError
from lcl_megatron.evaluation.encoders.load import load_encoder
from lcl_megatron.evaluation.retrieval.text_encoder import open_tokenizer
from lcl_megatron.evaluation.transfer.feature_cache import FeatureFiles
from lcl_megatron.evaluation.transfer.fit import FitConfig, LossSum, fit
from lcl_megatron.evaluation.vision_language.assembly import AssemblyError, Recipe, assemble
from lcl_megatron.parallel.replicas import Replicas
from tests.data.corpora import NUM_LATENTS, random_documents, write
from tests.evaluation.vision_language.small_data import ENCODER, language_model_folder
from tests.payloads import (
    ARRAY_FILES,
    PICKLES,
    TORCH_FILES,
    Mark,
    write_object_array,
    write_remote_code,
    write_torch_zip,
)
from tests.stock import stock_or_skip

ALONE = Replicas(0, 1, torch.device("cpu"), None)
SMALL = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}

all_pickles = pytest.mark.parametrize("name", PICKLES)


@pytest.fixture
def mark(tmp_path: Path) -> Mark:
    (tmp_path / "hostile").mkdir()
    return Mark(tmp_path / "hostile")


# The payloads are real.


@all_pickles
def test_a_payload_runs_where_it_may(name: str, mark: Mark, tmp_path: Path) -> None:
    content = PICKLES[name](mark)
    try:
        pickle.loads(content)
    except Exception:  # after it has done what it does
        pass
    assert mark.was_made()
    for write_file in TORCH_FILES.values():
        write_file(tmp_path / "file.pt", content)
        try:
            torch.load(tmp_path / "file.pt", weights_only=False)
        except Exception:
            pass
        assert mark.was_made() or write_file is TORCH_FILES["plain"]  # torch wants its magic number first
    for write_file in ARRAY_FILES.values():
        write_file(tmp_path / "file.npy", content)
        try:
            np.load(tmp_path / "file.npy", allow_pickle=True)["arr_0"]
        except Exception:
            pass
        assert mark.was_made()


# Weights.


@pytest.mark.parametrize("kind", TORCH_FILES)
@all_pickles
def test_released_files(name: str, kind: str, mark: Mark, tmp_path: Path) -> None:
    for suffix in (".pt", ".bin", ".safetensors"):
        path = tmp_path / f"file{suffix}"
        TORCH_FILES[kind](path, PICKLES[name](mark))
        for read in (read_official_state, lambda file: read_source(str(file))):
            with pytest.raises(CheckpointError) as caught:
                read(path)
            assert not mark.was_made()
            assert f"file{suffix} cannot be read" in str(caught.value)
            assert "weights_only" not in str(caught.value)  # torch's advice is to read it all the same


@pytest.mark.parametrize("kind", TORCH_FILES)
@all_pickles
def test_saved_states_of_a_fit(name: str, kind: str, mark: Mark, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    TORCH_FILES[kind](path, PICKLES[name](mark))
    module = nn.Linear(2, 1)
    with pytest.raises(OSError, match=r"state\.pt is no saved state of a fit \(\w+\); delete it to begin again"):
        fit(
            module,
            lambda part: LossSum(module.weight.sum(), 1),
            4,
            FitConfig(steps=2, batch_size=2, lr=0.1),
            ALONE,
            state_file=path,
        )
    assert not mark.was_made()


# Folders for stock libraries. Whatever they ask, the user says yes.


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def say_yes(question: object = "") -> str:
        asked.append(str(question))
        return "y"

    monkeypatch.setattr(builtins, "input", say_yes)
    return asked


def timm_folder(folder: Path, mark: Mark) -> Path:
    config = {"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224", "model_args": SMALL}
    write_remote_code(folder, mark, config | {"num_classes": 0, "pretrained_cfg": {"num_classes": 0}})
    write_torch_zip(folder / "pytorch_model.bin", PICKLES["deep"](mark))
    return folder


def clip_folder(folder: Path, mark: Mark) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    write_remote_code(folder, mark, {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16} | sizes)
    write_torch_zip(folder / "pytorch_model.bin", PICKLES["deep"](mark))
    return folder


def open_clip_folder(folder: Path, mark: Mark) -> Path:
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1}
    model = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    write_remote_code(folder, mark, {"model_type": "clip"})
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    write_torch_zip(folder / "open_clip_pytorch_model.bin", PICKLES["deep"](mark))
    return folder


LIBRARIES = {
    "timm": ("timm", timm_folder),
    "clip": ("transformers", clip_folder),
    "open_clip": ("open_clip", open_clip_folder),
}


REFUSED = r".*it holds other things than tensors \(posix\.mkdir\), which are not unpickled"


@pytest.mark.parametrize("kind", LIBRARIES)
def test_folders_of_encoders(kind: str, mark: Mark, tmp_path: Path, yes: list[str]) -> None:
    library, make = LIBRARIES[kind]
    stock_or_skip(library)
    folder = make(tmp_path / "model", mark)
    with pytest.raises(EncoderError, match=rf"encoder '.*model' cannot be loaded: {REFUSED}"):
        load_encoder(str(folder))
    with pytest.raises(CheckpointError, match=rf"model cannot be loaded: {REFUSED}"):
        read_source(str(folder))
    assert not mark.was_made()
    assert yes == []


def test_a_file_of_open_clip(mark: Mark, tmp_path: Path) -> None:
    stock_or_skip("open_clip")
    for name, write_file in (
        ("a.pt", TORCH_FILES["zip"]),
        ("a.npz", ARRAY_FILES["plain"]),
        ("b.npz", write_object_array),
    ):
        write_file(tmp_path / name, PICKLES["reduce"](mark))
        with pytest.raises(EncoderError, match="cannot be loaded"):
            load_encoder(f"open_clip:ViT-S-32-alt/{tmp_path / name}")
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            read_source(f"open_clip:ViT-S-32-alt/{tmp_path / name}")
        assert not mark.was_made()


@pytest.mark.parametrize("prefix", ["", "random:"])
def test_folders_of_language_models_and_tokenizers(prefix: str, mark: Mark, tmp_path: Path, yes: list[str]) -> None:
    stock_or_skip("transformers")
    stock_or_skip("timm")
    folder = write_remote_code(tmp_path / "model", mark, {"model_type": "hostile"})
    with pytest.raises(AssemblyError, match="language model '.*model' cannot be loaded: ValueError"):
        assemble(Recipe(ENCODER, f"{prefix}{folder}", 1, 64, "pad"), torch.device("cpu"))
    with pytest.raises(ConfigError, match="model holds no tokenizer that transformers reads: "):
        open_tokenizer(folder)
    assert not mark.was_made()
    assert yes == []


def test_weights_of_language_models(mark: Mark, tmp_path: Path) -> None:
    stock_or_skip("transformers")
    stock_or_skip("timm")
    folder = language_model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    write_torch_zip(folder / "pytorch_model.bin", PICKLES["deep"](mark))
    with pytest.raises(AssemblyError, match=rf"language model '.*model' cannot be loaded: {REFUSED}"):
        assemble(Recipe(ENCODER, str(folder), 1, 64, "pad"), torch.device("cpu"))
    assert not mark.was_made()


def test_the_code_in_an_export_is_run_if_it_is_ours(mark: Mark, tmp_path: Path) -> None:
    stock_or_skip("transformers")
    stock_or_skip("timm")
    (tmp_path / MODELING_FILE).write_text(modeling_code(), encoding="utf-8")
    assert exported_module(tmp_path).LCLConfig.model_type == "lcl"
    (tmp_path / MODELING_FILE).write_text(f"{modeling_code()}\n{mark.code}\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"modeling_lcl\.py is not the code of this version, which alone is run"):
        exported_module(tmp_path)
    assert not mark.was_made()
    runpy.run_path(str(tmp_path / MODELING_FILE))
    assert mark.was_made()


# Data.


@all_pickles
def test_parts_of_stored_features_are_numbers(name: str, mark: Mark, tmp_path: Path) -> None:
    content = PICKLES[name](mark).ljust(4096, b"\0")
    (tmp_path / "part-000000").write_bytes(content)
    features = FeatureFiles([tmp_path / "part-000000"], 2, (32, 16), torch.float32)
    assert features[np.arange(2)].numpy().tobytes() == content
    assert not mark.was_made()


@pytest.mark.parametrize("kind", ARRAY_FILES)
@pytest.mark.parametrize("array", [*IMAGE_ARRAYS, "document_source"])
def test_side_arrays_of_a_corpus(array: str, kind: str, mark: Mark, tmp_path: Path) -> None:
    corpus = write(tmp_path, random_documents(5, 1)).corpus
    path = corpus.path / f"{array}.npy"
    for content in PICKLES.values():
        path.unlink()
        ARRAY_FILES[kind](path, content(mark))
        manifest = json.loads((corpus.path / "manifest.json").read_text(encoding="utf-8"))
        manifest["files"][path.name]["bytes"] = path.stat().st_size
        # As somebody would who may write there: the manifest's own hash fits again.
        manifest["sha256"] = manifest_hash(manifest)
        (corpus.path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(CorpusError, match=rf"{array}\.npy .*: it is damaged"):
            Corpus.open(corpus.path)
        assert not mark.was_made()


@pytest.mark.parametrize("kind", ARRAY_FILES)
def test_cached_tables_of_rows(
    kind: str, mark: Mark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(table_cache, "CACHED_DOCUMENTS", 0)
    corpus = write(tmp_path, random_documents(50, 1)).corpus
    composer = Composer(corpus, DataConfig(seq_length=96), NUM_LATENTS, 1)
    expected = build_table(composer).table.arrays()
    for content in PICKLES.values():
        open_table(composer)
        (folder,) = (path.parent for path in corpus.path.with_name("corpus.cache").glob("*/table.json"))
        info = json.loads((folder / "table.json").read_text())
        for name in info["crc32"]:
            path = folder / f"{name}.npy"
            path.unlink()
            ARRAY_FILES[kind](path, content(mark))
            info["crc32"][name] = zlib.crc32(path.read_bytes())
        (folder / "table.json").write_text(json.dumps(info))
        caplog.clear()
        found = open_table(composer).table.arrays()
        assert "cannot be used" in caplog.text
        assert all(np.array_equal(found[name], array) for name, array in expected.items())
        assert not mark.was_made()


@all_pickles
def test_tokenizers_and_run_files(name: str, mark: Mark, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(PICKLES[name](mark))
    with pytest.raises(ConfigError, match="is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "tokenizer.model")
    for text in (
        f'x = !!python/object/apply:os.mkdir ["{mark.path}"]',
        f"x = {mark.code}",
        f"[data]\nlr = {mark.code}",
    ):
        with pytest.raises(ConfigError):
            from_toml(text, "run.toml")
    assert not mark.was_made()


@all_pickles
def test_parquet_files_that_name_a_type_of_python(name: str, mark: Mark, tmp_path: Path) -> None:
    """pyarrow before 14.0.1 unpickled such a type when it opened the file (CVE-2023-47248)."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    strings = pa.list_(pa.string())
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": PICKLES[name](mark),
    }
    fields = [pa.field(field, strings, metadata=extension) for field in ("images", "texts")]
    table = pa.Table.from_pylist([{"images": [None], "texts": ["a text"]}], pa.schema(fields))
    pq.write_table(table, tmp_path / "a.parquet")
    _finish(lambda: list(read_obelics(tmp_path / "a.parquet")))
    assert not mark.was_made()


def _finish(read: Callable[[], Any]) -> None:
    """Read a file that is as good as any other but for what it would run, or is refused as damaged."""
    try:
        assert len(read()) == 1
    except (ConfigError, OSError) as error:
        assert "a.parquet" in str(error)  # noqa: PT017 - either outcome is good
