"""What the text loss hides: without the contrastive loss the global latents say nothing, and the monitors show it.

Oracle: the data. Everything that is said after an image was said before it, so the language model can do without the
image: both runs must reach the same text loss, and only the contrastive loss gives the encoder something to learn.
The text before an image belongs to it alone, so retrieval at chance (1/32) or perfect is the encoder's merit.
"""

from __future__ import annotations

import pytest

from tests.training.small_runs import DataFolder, redundant_document, small_config, train_and_read

DOCUMENTS = 32


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[float, list[dict[str, float]]]:
    """Reports of two runs that differ in the weight of the contrastive loss only."""
    folder = tmp_path_factory.mktemp("collapse")
    data = DataFolder(folder / "data")
    data.write([redundant_document(number) for number in range(DOCUMENTS)])
    data.preprocess()
    return {
        weight: train_and_read(
            small_config(
                data.corpus,
                data={"seq_length": 36},
                loss={"contrastive_loss_weight": weight},
                training={"train_iters": 100, "global_batch_size": DOCUMENTS, "micro_batch_size": DOCUMENTS},
                optimizer={"lr": 3e-3, "lr_warmup_iters": 20},
                logging={"log_dir": str(folder / f"logs-{weight}"), "log_interval": 20},
            )
        )
        for weight in (0.0, 0.1)
    }


def test_the_text_loss_does_not_show_the_difference(reports: dict[float, list[dict[str, float]]]) -> None:
    # Seen: 0.26 in both runs, of which ln(32) / 19 = 0.18 cannot be foretold.
    alone, both = (reports[weight][-1]["loss/generation"] for weight in (0.0, 0.1))
    assert alone < 0.4
    assert alone == pytest.approx(both, rel=0.15)


def test_retrieval_stays_at_chance(reports: dict[float, list[dict[str, float]]]) -> None:
    # Seen: 0 and 0 of 32 pairs against all 32.
    for direction in ("image_to_context", "context_to_image"):
        assert reports[0.0][-1][f"contrast/{direction}_accuracy"] <= 4 / DOCUMENTS
        assert reports[0.1][-1][f"contrast/{direction}_accuracy"] >= 0.98


def test_pairs_look_like_any_other_image_and_context(reports: dict[float, list[dict[str, float]]]) -> None:
    # Seen: cosine of pairs minus cosine of all others -0.02 against 0.80.
    margins = {
        weight: lines[-1]["contrast/pair_similarity"] - lines[-1]["contrast/background_similarity"]
        for weight, lines in reports.items()
    }
    assert abs(margins[0.0]) < 0.1
    assert margins[0.1] > 0.5


def test_features_use_fewer_directions(reports: dict[float, list[dict[str, float]]]) -> None:
    # Seen, without against with contrast, rank of at most 32 features: pooled 15.3 and 20.9 (std 0.80 and 0.97),
    # context 10.2 and 21.8 (std 0.36 and 0.96). The rank without contrast is that of untrained projections.
    alone, both = reports[0.0][-1], reports[0.1][-1]
    assert alone["features/pooled_effective_rank"] < 0.85 * both["features/pooled_effective_rank"]
    assert alone["features/context_effective_rank"] < 0.7 * both["features/context_effective_rank"]
    assert alone["features/pooled_std"] < 0.9 * both["features/pooled_std"]
    assert alone["features/context_std"] < 0.6 * both["features/context_std"]
    assert both["features/pooled_effective_rank"] > 0.5 * DOCUMENTS
