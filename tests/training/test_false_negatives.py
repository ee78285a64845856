"""Runs on a corpus with copies of documents and images: counts, masks and the loss.

Oracles: pixels and tokens of the micro-batches, compared all with all; the full matrix of the features of the step;
one process against two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcl_megatron.config import RunConfig
from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.training.loop import train
from lcl_megatron.training.meter import Meter
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.step import train_step
from tests.distributed import run_distributed
from tests.training.small_runs import DataFolder, memory_document, read_reports, sentence, small_config

COUNTS = ("contrast/num_same_image", "contrast/num_same_context", "contrast/num_empty_context")
STEPS = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents, two of them twice; an image under another text; a text before other images."""
    data = DataFolder(tmp_path_factory.mktemp("repeats") / "data")
    documents = [memory_document(number) for number in (0, 1, 2, 3, 0, 1)]
    documents.append((("", sentence(7), ""), (("2a.png", 0), ("3b.png", 2))))
    documents += [((sentence(8), ""), ((f"{name}.png", 1),)) for name in ("8", "9")]
    data.write(documents)
    data.truncate("3a.png")
    data.preprocess()
    return data.corpus


def config_of(corpus: Path, masks: tuple[bool, bool], **sections: dict[str, Any]) -> RunConfig:
    loss = {"mask_same_image": masks[0], "mask_same_context": masks[1], "contrastive_tile_size": 3}
    data = {"context_rule": "index", "max_bad_image_rate": 1.0}
    return small_config(corpus, loss=loss, data=data, **sections)


def shown_by(batch: PackedBatch, special: Any) -> list[tuple[bytes, tuple[Any, ...]]]:
    """Pixels, and pixels and tokens before it in its document, of every pair of a micro-batch; () = no content."""
    assert batch.images is not None
    pixels = [image.numpy().tobytes() for image in batch.images]
    content: list[Any] = batch.tokens.flatten().tolist()
    for slot, data in zip(batch.context_slots.tolist(), pixels, strict=True):
        content[slot] = data
    shown = []
    for index in batch.pair_mask.nonzero()[:, 0].tolist():
        slot = int(batch.context_slots[index])
        begin = max(border for border in batch.cu_seqlens.tolist() if border <= slot)
        before = tuple(content[begin:slot])
        shown.append((pixels[index], () if set(before) <= {special.bos} else before))
    return shown


def comparison(shown: list[tuple[bytes, tuple[Any, ...]]], kind: int) -> Tensor:
    """(pairs, pairs) bool: which other pairs have the same image (0) or context (1)."""
    same = torch.tensor([[a[kind] == b[kind] for b in shown] for a in shown])
    return same & ~torch.eye(len(shown), dtype=torch.bool)


@pytest.mark.parametrize("masks", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_a_report_and_the_loss_are_those_of_a_comparison_of_all_pairs(
    corpus: Path, masks: tuple[bool, bool], micro_batch_size: int
) -> None:
    expected = torch.zeros(3)
    with run_from(config_of(corpus, masks, training={"micro_batch_size": micro_batch_size})) as run:
        meter = Meter(run)
        for batch, _ in zip(run.loader, range(STEPS), strict=False):
            scale = float(run.engine.model.logit_scale.detach().exp())
            result = train_step(run, batch)
            meter.add(result, batch, 0.0)
            for part, micro in zip(result.losses, result.agreed.micro_batches, strict=True):
                shown = shown_by(micro, run.plan.sequence.special_tokens)
                same = [comparison(shown, kind) for kind in (0, 1)]
                expected += torch.tensor(
                    [*(float(m.any(dim=1).sum()) for m in same), sum(context == () for _, context in shown)]
                )
                left_out = (same[0] & masks[0]) | (same[1] & masks[1])
                contrast = part.contrast
                images, contexts = contrast.images_GD[contrast.is_pair_G], contrast.contexts_GD[contrast.is_pair_G]
                scores = scale * images @ contexts.T
                scores.masked_fill_(left_out, -torch.inf)
                losses = (scores.logsumexp(0) + scores.logsumexp(1)) / 2 - scores.diagonal()
                assert float(part.contrastive_loss) == pytest.approx(
                    float(losses.sum()) / result.agreed.num_pairs, rel=1e-5, abs=1e-6
                )
        report = meter.report(0)
    assert [report[name] for name in COUNTS] == pytest.approx((expected / STEPS).tolist())
    assert min(expected) > 0
    negatives = (~left_out).sum().item() / len(shown) - 1
    assert report["contrast/num_negatives"] == pytest.approx(negatives)
    assert (negatives < len(shown) - 1) == any(masks)


def test_under_the_content_rule_no_pair_has_an_empty_context(corpus: Path) -> None:
    with run_from(small_config(corpus, data={"max_bad_image_rate": 1.0})) as run:
        meter = Meter(run)
        for batch, _ in zip(run.loader, range(STEPS), strict=False):
            meter.add(train_step(run, batch), batch, 0.0)
        report = meter.report(0)
    assert report["contrast/num_empty_context"] == 0
    assert min(report[name] for name in COUNTS[:2]) > 0


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    with run_from(config) as run:
        train(run)


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_two_processes_find_what_one_does(corpus: Path, tmp_path: Path, layout: str) -> None:
    """The second stage of a pipeline reads no pixels."""
    sections: dict[str, dict[str, Any]] = {
        "dp2": {"training": {"micro_batch_size": 2}},
        "pp2": {"parallel": {"pipeline_model_parallel_size": 2}},
    }
    for name, world_size, changes in (("two", 2, sections[layout]), ("one", 1, {})):
        logging = {"log_dir": str(tmp_path / name), "exit_interval": 2}
        run_distributed(_train, world_size, config_of(corpus, (True, True), **changes, logging=logging))
    ones, twos = (read_reports(tmp_path / name) for name in ("one", "two"))
    assert len(ones) == 2
    for one, two in zip(ones, twos, strict=True):
        for name in (*COUNTS, "contrast/num_negatives", "contrast/num_pairs"):
            assert two[name] == pytest.approx(one[name], rel=1e-6)
        assert two["loss/contrastive"] == pytest.approx(one["loss/contrastive"], rel=1e-3)
    assert sum(one[COUNTS[0]] for one in ones) > 0
