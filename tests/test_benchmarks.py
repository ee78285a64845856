"""Benchmarks run, and their figures are those of what they ran.

Oracle: arithmetic between the figures of one run, the size of the corpus, and the shapes that were asked for.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcl_megatron.checkpoint.weights import read_weights
from lcl_megatron.config.sources import load_run_config, preset_text
from lcl_megatron.config.toml import from_toml
from lcl_megatron.data.storage.corpus import Corpus
from tests.stock import stock_or_skip

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SMALL = [
    "--steps",
    "2",
    "--warmup-steps",
    "1",
    "--rows",
    "4",
    "--micro-batch-size",
    "2",
    "--seq-length",
    "128",
    "--image-size",
    "32",
    "--vision-layers",
    "1",
    "--vision-width",
    "64",
    "--language-layers",
    "1",
    "--language-width",
    "64",
    "--picture-side",
    "40",
]


def run(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, output: Any) -> tuple[list[str], Any]:
    """Run a benchmark in this process; return its lines and the JSON object in the last one."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    lines = output.readouterr().out.splitlines()
    return lines, json.loads(lines[-1])


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus that the benchmarks make."""
    module = runpy.run_path(str(BENCHMARKS / "synthetic.py"))
    return module["SyntheticCorpus"](60, 40).write(tmp_path_factory.mktemp("synthetic") / "data")


def test_the_synthetic_corpus_is_reproducible_and_of_the_lengths_it_says(synthetic: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(synthetic)
    assert corpus.num_documents == 60
    images = corpus.document_images[1:] - corpus.document_images[:-1]
    assert (images.min(), images.max()) == (1, 6)
    sentences = corpus.document_segments[1:] - corpus.document_segments[:-1] - images
    assert 7 < sentences.mean() < 9
    module = runpy.run_path(str(BENCHMARKS / "synthetic.py"))
    again = module["SyntheticCorpus"](60, 40).write(tmp_path / "data")
    assert Corpus.open(again).fingerprint == corpus.fingerprint


@pytest.mark.parametrize("extra", [[], ["--profile", "--precision", "bf16"]], ids=["fp32", "bf16 profiled"])
def test_step_cpu(
    extra: list[str], synthetic: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, report = run("step_cpu.py", [*SMALL, "--data-path", str(synthetic), *extra], monkeypatch, capsys)
    assert report["images_per_s"] * report["step_ms"] / 1000 == pytest.approx(report["images_per_step"])
    assert report["tokens_per_s"] * report["step_ms"] / 1000 == pytest.approx(report["tokens_per_step"])
    assert report["tokens_per_step"] == pytest.approx(report["fill"] * 4 * 128)
    assert 0.5 < report["fill"] <= 1.0
    # An image of 4 patches takes 6 positions, and every row has an image.
    assert 4 <= report["images_per_step"] <= report["tokens_per_step"] / 6
    assert 0 < report["data_ms"] < report["step_ms"]
    assert report["peak_rss_mib"] > 100
    assert report["seq_length"] == 128
    assert any("aten::" in line for line in lines) == ("--profile" in extra)


def test_step_cpu_makes_a_corpus_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, report = run("step_cpu.py", SMALL, monkeypatch, capsys)
    assert report["data_path"] == ""
    assert report["images_per_s"] > 0


ROWS = ["--num-latents", "16"]


def test_packing(synthetic: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data-path", str(synthetic), *ROWS, "--seq-length", "512", "--min-seconds", "0.05"]
    lines, report = run("packing.py", arguments, monkeypatch, capsys)
    assert "60 documents" in lines[0]
    assert report["documents"] == 60
    assert report["fill_one_per_row"] < report["fill"] <= report["fill_window"] <= 1.0


def test_balance(synthetic: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data-path", str(synthetic), *ROWS, "--ranks", "4", "--rows-per-rank", "8", "--steps", "5"]
    _, report = run("balance.py", arguments, monkeypatch, capsys)
    assert 1.0 <= report["mean_max_over_mean"] <= report["max_over_mean"] < report["max_over_mean_undealt"]
    # Counts are integers: no deal is better than the mean rounded up.
    assert report["max_over_mean"] <= -(-report["images_per_rank"] // 1) / report["images_per_rank"] + 0.1


def test_mixture(synthetic: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    paths, views = [str(synthetic)] * 2, ["pairs", "interleaved"]
    for unit in ("images", "tokens"):
        arguments = ["--data-path", *paths, "--view", *views, *ROWS, "--weights", "1", "3", "--by", unit]
        lines, report = run("mixture.py", [*arguments, "--rows", "3000"], monkeypatch, capsys)
        assert 0 < report["max_share_error"] < 0.01
        shares = [float(line.split(": ")[1].split("%")[0]) for line in lines[-3:-1]]
        assert sum(shares) == pytest.approx(100, abs=0.11)


def test_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--documents", "30000", "--folder", str(tmp_path)]
    lines, report = run("plan.py", arguments, monkeypatch, capsys)
    assert lines[0].startswith("making the index of 30,000 documents")
    assert 30_000 / 6 < report["rows_per_epoch"] < 30_000 / 2
    assert 0.97 < report["fill"] <= 1.0
    assert 0 < report["row_ms"] < report["step_ms"]
    again, _ = run("plan.py", arguments, monkeypatch, capsys)
    assert not again[0].startswith("making")
    corpus = Corpus.open(tmp_path / "index-30000")
    assert corpus.num_documents == 30_000
    assert np.array_equal(np.diff(corpus.text_tokens_before(np.arange(1000))), corpus.segment_lengths[:999])
    owner = np.repeat(np.arange(30_000), np.diff(corpus.document_images))
    assert (corpus.image_segment < np.diff(corpus.document_segments)[owner]).all()


def test_activations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "tiny", "--precision", "fp32", "--images", "10", "--drop-path-rate", "0.5"]
    lines, report = run("activations.py", arguments, monkeypatch, capsys)
    assert len(lines) == 10
    for tower in ("vision_mask", "vision_subset", "language"):
        sizes = [report[f"{tower}_{granularity}_mib"] for granularity in ("none", "selective", "full")]
        assert sizes == sorted(sizes, reverse=True)
        assert report[f"{tower}_selective_flops"] == report[f"{tower}_none_flops"]
        assert report[f"{tower}_full_flops"] > 1.3 * report[f"{tower}_none_flops"]
    # Of ten images, each layer of the vision tower computes round(10 x (1 - rate)).
    layers = load_run_config(["--preset", "tiny"]).vision.num_layers
    kept = sum(int(10 * (1 - 0.5 * layer / (layers - 1)) + 0.5) for layer in range(layers)) / (10 * layers)
    assert report["vision_subset_none_flops"] == pytest.approx(kept)
    assert report["vision_subset_none_mib"] == pytest.approx(kept * report["vision_mask_none_mib"], rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself would run")
def test_gpu_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines, report = run("gpu.py", [], monkeypatch, capsys)
    assert report == {"skipped": "no CUDA device"}
    assert "no CUDA device; nothing was measured" in lines[0]


@pytest.mark.gpu
def test_gpu_measures_steps_and_ceilings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "5", "--warmup-steps", "2", "--rows", "2", "--num-documents", "60", "--num-workers", "2"]
    _, report = run("gpu.py", arguments, monkeypatch, capsys)
    figures = report["torch"]
    assert figures["images_per_s"] * figures["step_ms"] / 1000 == pytest.approx(figures["images_per_step"])
    # No step runs faster than its fastest matrix products alone.
    assert 0 < figures["tflops"] < max(report["product_tflops"].values())
    assert min(report["attention_tflops"].values()) > 0


def test_images_compares_with_openclip_and_webdataset(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """On images so small that every crop is enlarged, and on larger ones, of which none is."""
    pytest.importorskip("webdataset")
    flags = ["--images", "4", "--rounds", "1", "--sizes", "120", "480"]
    lines, result = run("images.py", flags, monkeypatch, capsys)
    assert lines[0].startswith("120 px, ")
    for size in (120, 480):
        speeds = result[f"images_per_s_{size}"], result[f"reference_{size}"]
        assert result[f"speedup_{size}"] == pytest.approx(speeds[0] / speeds[1])
    assert result["max_abs_diff"] <= 1
    assert result["max_abs_diff_enlarged"] <= 2
    ends = [result["end_to_end_speedup_120"], result["end_to_end_speedup_480"]]
    assert result["end_to_end_speedup"] == pytest.approx(sum(ends) / 2)


def test_converters_compare_models_of_the_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What they wrote is kept and looked at: it has the sizes of the preset, and values that no map can hide."""
    for library in ("timm", "transformers", "open_clip"):
        stock_or_skip(library)
    folder, imported = tmp_path / "kept", ("from_clip", "from_open_clip", "from_timm", "from_official")
    lines, report = run("converters.py", ["--vocab-size", "512", "--folder", str(folder)], monkeypatch, capsys)
    assert report["passed"] is True
    exported = ("timm", "auto_model", "clip_vision", "language_model", "whole_model")
    for name in (*exported, *imported, "official"):
        # Two implementations never agree in every bit; --verify allows 1e-5 of the outputs, which are below 20.
        assert 0 < report[name] < 2e-4, name
    exact = [name for name in report if name.endswith(("_round_trip", "_written"))]
    assert len(exact) == 1 + 2 * 5
    assert {report[name] for name in exact} == {0.0}
    assert sum("  ok  " in line for line in lines) == 5 + 3 * 5

    expected = from_toml(preset_text("tiny"), "tiny").vision
    weights = read_weights(folder / "weights")
    assert report["parameters"] == sum(tensor.numel() for tensor in weights.state.values())
    sizes = ("image_size", "patch_size", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    for name in ("weights", *imported):
        found = read_weights(folder / name)
        assert all(getattr(found.config.vision, size) == getattr(expected, size) for size in sizes), name
        for tensor in found.state.values():
            assert ((tensor != 0) & (tensor != 1)).all()
            assert tensor.numel() == 1 or tensor.std() > 0


def test_contrastive_counts_bytes_and_agrees_with_open_clip(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Closed form: a rank sends W - 1 times its rows; ours 2 D + 2 floats a pair, open_clip's 2 D and 2 D back."""
    pytest.importorskip("open_clip")
    _, report = run("contrastive.py", ["--quick"], monkeypatch, capsys)
    assert report["backward_feature_bytes"] == 0
    assert report["bytes_as_on_real_ranks"]
    # float32 on both sides; seen: below 1e-6.
    for name in ("value_difference", "gradient_difference", "value_difference_at_size"):
        assert 0 <= report[name] < 1e-5
    rows = {(row["pairs"], row["loss"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 6
    for (pairs, loss), row in rows.items():
        ranks, features = pairs // 512, 512 * 2 * 64 * 4
        assert row["ranks"] == ranks
        if (pairs, loss) == (2048, "open_clip_full"):
            assert row["peak_mib"] is row["cpu_s"] is row["forward_bytes"] is None
        elif loss == "ours":
            assert row["forward_bytes"] == (ranks - 1) * (features + 512 * 2 * 4)
            assert row["backward_bytes"] == row["backward_calls"] == 0
        else:
            assert row["forward_bytes"] == row["backward_bytes"] == (ranks - 1) * features
    for key, name in (("peak_mib", "memory_ratio"), ("cpu_s", "time_ratio")):
        assert report[name] == pytest.approx(rows[2048, "ours"][key] / rows[2048, "open_clip_local"][key], abs=6e-4)


def test_contrastive_refuses_sizes_that_ranks_cannot_share(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run("contrastive.py", ["--sizes", "4096", "3000"], monkeypatch, capsys)
    assert "expected multiples of 2048 pairs" in " ".join(capsys.readouterr().err.split())


def test_bytes_that_nobody_counts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of three that do not exist: what they send is this rank's features, rotated; other calls are errors."""
    module = runpy.run_path(str(BENCHMARKS / "counted_wire.py"))
    features, gathered = torch.arange(8.0).view(1, 8), torch.empty(3, 8)
    with module["one_rank_of_many"](3, 4) as wire:
        torch.distributed.all_gather_into_tensor(gathered, features)
        with pytest.raises(RuntimeError, match="all_reduce was called, whose bytes are not counted"):
            torch.distributed.all_reduce(features)
    assert gathered.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [3, 0, 1, 2, 7, 4, 5, 6], [2, 3, 0, 1, 6, 7, 4, 5]]
    assert dict(wire.sent) == {"forward": 2 * 8 * 4}
    assert not torch.distributed.is_initialized()


def test_scopes_runs_that_are_the_same_function_agree(
    synthetic: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, report = run("scopes.py", ["--quick", "--data-path", str(synthetic)], monkeypatch, capsys)
    runs = report["runs"]
    # The same batches and weights on all layouts, in float32.
    assert report["loss_difference"] < 1e-4
    generation = [seen["generation"][0] for seen in runs.values()]
    assert max(generation) - min(generation) < 1e-4 * min(generation)
    # Fewer negatives make another, smaller loss; with one micro-batch both scopes have all.
    contrastive = {name: seen["contrastive"][0] for name, seen in runs.items()}
    assert contrastive["micro_batch"] < contrastive["global"] - 0.1
    assert contrastive["one_micro_batch"] == pytest.approx(contrastive["global"], rel=1e-4)
    assert report["scope_time_ratio"] == pytest.approx(runs["global"]["cpu_ms"] / runs["micro_batch"]["cpu_ms"])
    assert set(report["layout_ratio"]) == {"dp2", "tp2", "pp2"}


def test_checkpoints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, report = run("checkpoints.py", ["--preset", "tiny", "--no-baseline", "--repeats", "1"], monkeypatch, capsys)
    # fp32: weights, the optimizer's values and two moments; and what says where they lie.
    assert 16 < 1000 * report["gigabytes"] / report["parameters_m"] < 16.2
    assert 0 < report["wait_s"] <= report["durable_s"]
    assert min(report["verify_s"], report["load_s"]) > 0
