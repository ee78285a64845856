"""Reports mean what their names say.

Oracle: counts read off the micro-batches' tensors (not off the plan's announcement), the corpus, and features of the
last micro-batch, by hand; several processes against one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lcl_megatron.config import RunConfig
from lcl_megatron.training.flops import step_flops
from lcl_megatron.training.loop import train
from lcl_megatron.training.meter import Meter
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.step import train_step
from tests.distributed import run_distributed
from tests.training.small_runs import DataFolder, plain_document, read_reports, small_config

STEPS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = DataFolder(tmp_path_factory.mktemp("meter") / "data")
    data.write([plain_document(number) for number in range(12)])
    data.truncate("5a.png")
    data.truncate("9b.png")
    data.preprocess()
    return data.corpus


def count_by_hand(run: Any, batches: list[Any]) -> dict[str, Any]:
    """Everything that a report counts, from the tensors of the steps."""
    counts: dict[str, Any] = {"images": 0, "tokens": 0, "pairs": 0, "targets": 0, "lengths": [], "bad": 0}
    special = run.plan.sequence.special_tokens
    for batch in batches:
        counts["bad"] += len(batch.bad_images)
        for micro in batch.micro_batches:
            counts["images"] += int((micro.tokens == special.boi).sum())
            counts["tokens"] += int((micro.tokens != special.pad).sum())
            counts["pairs"] += int((micro.has_context & micro.image_ok).sum())
            counts["targets"] += int(micro.loss_mask.sum())
            flat = micro.tokens.flatten()
            begins = (flat == special.bos).nonzero()[:, 0]
            ends = (flat == special.eos).nonzero()[:, 0]
            counts["lengths"] += (ends - begins + 1).tolist()
    return counts


def test_a_report_equals_a_count_by_hand(corpus: Path) -> None:
    config = small_config(corpus, training={"micro_batch_size": 2})
    with run_from(config) as run:
        meter, batches, results = Meter(run), [], []
        for batch, _ in zip(run.loader, range(STEPS), strict=False):
            results.append(train_step(run, batch))
            batches.append(batch)
            meter.add(results[-1], batch, data_wait_s=0.25)
        report = meter.report(bad_images=7)
        counts = count_by_hand(run, batches)
        resolved: RunConfig = run.config

    seconds = STEPS * report["perf/step_ms"] / 1000
    assert report["perf/images_per_s"] * seconds == pytest.approx(counts["images"])
    assert report["perf/tokens_per_s"] * seconds == pytest.approx(counts["tokens"])
    assert report["perf/data_wait_ms"] == pytest.approx(250)
    flops = step_flops(resolved, counts["images"], counts["lengths"], counts["targets"])
    assert report["perf/tflops_per_device"] * 1e12 * seconds == pytest.approx(flops)
    assert "perf/model_flops_utilization" not in report  # no peak is known for a CPU
    assert report["data/fill"] == pytest.approx(counts["tokens"] / (STEPS * 4 * 48))
    assert report["data/bad_images"] == 7
    assert report["contrast/num_pairs"] == pytest.approx(counts["pairs"] / STEPS)

    losses = [part for result in results for part in result.losses]
    assert len(losses) == 2 * STEPS
    generation = sum(float(part.generation_loss) for part in losses) / STEPS
    contrastive = sum(float(part.contrastive_loss) for part in losses) / STEPS
    assert report["loss/generation"] == pytest.approx(generation, rel=1e-6)
    assert report["loss/contrastive"] == pytest.approx(contrastive, rel=1e-6)
    assert report["loss/total"] == pytest.approx(generation + 0.1 * contrastive, rel=1e-6)
    for name, attribute in (("image_to_context", "image_hits"), ("context_to_image", "context_hits")):
        hits = sum(float(getattr(part.contrast, attribute)) for part in losses)
        assert report[f"contrast/{name}_accuracy"] == pytest.approx(hits / counts["pairs"])

    last = losses[-1].contrast
    images, contexts = last.images_GD[last.is_pair_G], last.contexts_GD[last.is_pair_G]
    cosines = images @ contexts.T
    others = cosines[~torch.eye(len(images), dtype=torch.bool)]
    assert report["contrast/pair_similarity"] == pytest.approx(float(cosines.diag().mean()), abs=1e-6)
    assert report["contrast/background_similarity"] == pytest.approx(float(others.mean()), abs=1e-6)
    assert report["contrast/num_negatives"] == len(images) - 1
    assert report["contrast/logit_scale"] == pytest.approx(float(losses[-1].logit_scale.exp()))
    assert report["optimizer/grad_norm"] == results[-1].grad_norm
    assert report["optimizer/learning_rate"] == results[-1].learning_rate


def test_latent_regression_is_reported_where_it_is_on(corpus: Path) -> None:
    config = small_config(corpus, training={"micro_batch_size": 2}, loss={"latent_regression_loss_weight": 3.0})
    with run_from(config) as run:
        meter, losses = Meter(run), []
        for batch, _ in zip(run.loader, range(STEPS), strict=False):
            result = train_step(run, batch)
            losses += result.losses
            meter.add(result, batch, 0.0)
        report = meter.report(0)
    regression = sum(float(part.latent_regression_loss) for part in losses) / STEPS  # type: ignore[arg-type]
    assert regression > 0
    assert report["loss/latent_regression"] == pytest.approx(regression, rel=1e-6)
    expected = report["loss/generation"] + 0.1 * report["loss/contrastive"] + 3.0 * regression
    assert report["loss/total"] == pytest.approx(expected, rel=1e-6)
    with run_from(small_config(corpus)) as run:
        meter = Meter(run)
        batch = next(iter(run.loader))
        meter.add(train_step(run, batch), batch, 0.0)
        assert "loss/latent_regression" not in meter.report(0)


def test_a_report_covers_the_steps_since_the_last(corpus: Path) -> None:
    with run_from(small_config(corpus)) as run:
        meter, generation = Meter(run), []
        for batch in run.loader:
            result = train_step(run, batch)
            meter.add(result, batch, 0.0)
            generation.append(float(result.losses[0].generation_loss))
            if batch.step in (2, 4):
                report = meter.report(0)
                since = generation[:3] if batch.step == 2 else generation[3:]
                assert report["loss/generation"] == pytest.approx(sum(since) / len(since))
                assert report["perf/data_wait_ms"] == 0.0


def test_the_loop_counts_consumed_rows_images_and_bad_images(corpus: Path, tmp_path: Path) -> None:
    config = small_config(
        corpus, logging={"log_dir": str(tmp_path), "log_interval": 2}, data={"max_bad_image_rate": 1.0}
    )
    with run_from(config) as run:
        batches = list(run.loader)
        train(run)
        by_step = [count_by_hand(run, batches[:step]) for step in (2, 4, 6, 8)]
    for report, counts in zip(read_reports(tmp_path), by_step, strict=True):
        assert report["data/consumed_rows"] == 4 * report["step"]
        assert report["data/consumed_images"] == counts["images"]
        assert report["data/bad_images"] == counts["bad"]
    assert by_step[-1]["bad"] > 0


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    with run_from(config) as run:
        train(run)


@pytest.mark.parametrize(
    "layout",
    [
        "dp2",
        "tp2",
        "pp2",
        "pp2 x 2 stages",
        "cp2",
        "dp2, global",
        "pp2, global",
        "cp2, global",
        "dp2, global, graphs kept",
    ],
)
def test_two_processes_report_what_one_does(corpus: Path, tmp_path: Path, layout: str) -> None:
    """Rates are of the whole run, shares are not doubled, and every rank's part is in the sums.

    Contrast of the whole batch, in four micro-batches, reports what one micro-batch of the whole batch does.
    """
    sections: dict[str, dict[str, Any]] = {
        "dp2": {"training": {"micro_batch_size": 2}},
        "tp2": {"parallel": {"tensor_model_parallel_size": 2}},
        "pp2": {"parallel": {"pipeline_model_parallel_size": 2}},
        "cp2": {"parallel": {"context_parallel_size": 2}},
        "dp2, global": {"training": {"micro_batch_size": 1}, "loss": {"contrastive_scope": "global"}},
        "pp2, global": {
            "training": {"micro_batch_size": 1},
            "loss": {"contrastive_scope": "global"},
            "parallel": {"pipeline_model_parallel_size": 2},
        },
        "dp2, global, graphs kept": {
            "training": {"micro_batch_size": 1},
            "loss": {"contrastive_scope": "global", "contrastive_keep_graphs": True},
        },
        "cp2, global": {
            "training": {"micro_batch_size": 1},
            "loss": {"contrastive_scope": "global"},
            "parallel": {"context_parallel_size": 2},
        },
        "pp2 x 2 stages": {
            "parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "training": {"micro_batch_size": 2},
            "loss": {"contrastive_scope": "global"},
        },
    }
    for name, world_size, changes in (("two", 2, sections[layout]), ("one", 1, {})):
        logging = {"log_dir": str(tmp_path / name), "exit_interval": 2}
        run_distributed(_train, world_size, small_config(corpus, **changes, logging=logging))
    assert len(read_reports(tmp_path / "one")) == 2
    clocks = ("perf/", "time")
    for two, one in zip(read_reports(tmp_path / "two"), read_reports(tmp_path / "one"), strict=True):
        assert two.keys() == one.keys()
        for name in (key for key in one if not key.startswith(clocks)):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
        # Images and FLOPs of the global batch; FLOPs are given per process.
        assert two["perf/images_per_s"] * two["perf/step_ms"] == pytest.approx(
            one["perf/images_per_s"] * one["perf/step_ms"]
        )
        assert 2 * two["perf/tflops_per_device"] * two["perf/step_ms"] == pytest.approx(
            one["perf/tflops_per_device"] * one["perf/step_ms"]
        )
