"""Tables and pictures of results. Oracles: the cells written out by hand, and Pillow, which opens the picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lcl_megatron.evaluation.transfer.report import draw_results, markdown_table, merge_results, write_results
from lcl_megatron.evaluation.transfer.results import MetricSummary, ResultError, read_json, write_json
from tests.evaluation.transfer.test_results import make_result


def test_encoders_of_a_test_set_share_a_table() -> None:
    results = [make_result(), make_result("a|b", mode=""), make_result("other", test="dogs")]
    lines = markdown_table(results).splitlines()
    assert lines[0] == "## classification: cats"
    assert lines[2] == "| encoder | transfer | seeds | top-1 | CIDEr |"
    assert lines[4] == "| ours | frozen | 2 | 55.0 (examples 50.0 to 58.0; seeds 10.0 to 100.0) | 81.25 |"
    assert lines[5].startswith("| a\\|b | - | 2 |")
    assert lines[6] == "| chance | | | 10.0 |  |"
    assert "## classification: dogs" in lines
    assert "bootstrap over the test images" in lines[-2] + lines[-1]


def test_results_of_several_files_become_one(tmp_path: Path) -> None:
    write_results([make_result()], tmp_path / "a")
    write_results([make_result("theirs")], tmp_path / "b")
    merged = merge_results([tmp_path / "a", tmp_path / "b" / "results.json"])
    write_results(merged, tmp_path / "c")
    assert read_json(tmp_path / "c") == [make_result(), make_result("theirs")]
    text = (tmp_path / "c" / "results.md").read_text()
    assert text.count("## ") == 1
    assert "| ours |" in text
    assert "| theirs |" in text


def test_no_results_are_an_error(tmp_path: Path) -> None:
    write_json([], tmp_path / "results.json")
    with pytest.raises(ResultError, match="there are no results in the given files"):
        merge_results([tmp_path])


def test_picture_has_a_row_for_each_test_set(tmp_path: Path) -> None:
    # The mean may lie outside a percentile interval, which must not be drawn as a negative error.
    odd = (MetricSummary("top-1", {"0": 0.5}, 0.5, (0.51, 0.6), None),)
    sizes = []
    for name, results in (
        ("one", [make_result(metrics=odd)]),
        ("two", [make_result(), make_result(test="dogs", curves={})]),
    ):
        draw_results(results, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            sizes.append(image.size)
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] == 2 * sizes[0][1]


def test_picture_of_what_is_not_trained_has_no_room_for_curves(tmp_path: Path) -> None:
    draw_results([make_result()], tmp_path / "trained.png")
    draw_results([make_result(curves={})], tmp_path / "not.png")
    with Image.open(tmp_path / "trained.png") as trained, Image.open(tmp_path / "not.png") as other:
        assert trained.size == (2 * other.size[0], other.size[1])
