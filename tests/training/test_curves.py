"""Curves page.

Oracles: the numbers that were logged, an HTML and an XML parser, hand-computed means, and the picture's own pixels.
"""

from __future__ import annotations

import base64
import io
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcl_megatron.training.curves import PANELS, _smooth, _thin_out, render_page, write_curves
from lcl_megatron.training.metrics_logger import METRICS_FILE, MetricsLogger
from lcl_megatron.training.metrics_reader import read_metrics


def write_run(folder: Path, reports: int = 50, **extra: float) -> Path:
    """Log a run with every metric of the page, and return its folder."""
    names = [name for panel in PANELS for name, _ in panel.metrics]
    with MetricsLogger(folder, 10 * reports, is_writer=True, console=io.StringIO()) as logger:
        for report in range(1, reports + 1):
            metrics = {name: 1.0 + math.sin(report / 5) ** 2 for name in names}
            logger.log(10 * report, metrics | {"data/consumed_images": 640.0 * report} | extra)
    return folder


class Page(HTMLParser):
    """Collects pictures, table cells and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: dict[str, bytes] = {}
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fields = {key: value or "" for key, value in attrs}
        self.addresses += [fields[key] for key in ("src", "href") if key in fields]
        if tag == "img":
            self.pictures[fields["alt"]] = base64.b64decode(fields["src"].split(",", 1)[1])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


def test_reader_returns_what_was_logged(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path / "run_a", 100, is_writer=True, console=io.StringIO()) as logger:
        logger.log(10, {"loss/total": 3.0})
        logger.log(20, {"loss/total": math.nan, "optimizer/grad_norm": math.inf})
        logger.log(30, {"loss/total": 2.0})
    run = read_metrics(tmp_path / "run_a")
    assert run.name == "run_a"
    np.testing.assert_array_equal(run.steps, [10, 20, 30])
    np.testing.assert_array_equal(run.series["loss/total"].values, [3.0, math.nan, 2.0])
    x, y = run.points("optimizer/grad_norm", "step")
    np.testing.assert_array_equal(x, [20])
    np.testing.assert_array_equal(y, [math.inf])
    assert read_metrics(tmp_path / "run_a" / METRICS_FILE, "other").name == "other"


def test_reader_over_images_uses_the_consumed_images(tmp_path: Path) -> None:
    run = read_metrics(write_run(tmp_path, reports=3))
    np.testing.assert_array_equal(run.points("loss/total", "images")[0], [640, 1280, 1920])


def test_reader_ignores_an_unfinished_last_line_and_names_any_other_bad_line(tmp_path: Path) -> None:
    path = write_run(tmp_path, reports=3) / METRICS_FILE
    good = path.read_text()
    path.write_text(good + '{"step": 40, "ti')
    assert len(read_metrics(path).steps) == 3
    path.write_text('{"step": 1, "time": 1.0}\nnot json\n' + good)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}:2: not a report"):
        read_metrics(path)
    path.write_text('{"loss/total": 1.0}\n')
    with pytest.raises(ValueError, match=":1: not a report"):
        read_metrics(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no report yet"):
        read_metrics(path)


def test_page_is_self_contained_and_holds_every_panel_as_a_valid_drawing(tmp_path: Path) -> None:
    write_curves([write_run(tmp_path / "a"), write_run(tmp_path / "b")], tmp_path / "out" / "curves.html")
    page = Page((tmp_path / "out" / "curves.html").read_text())
    assert set(page.pictures) == {panel.title for panel in PANELS}
    for picture in page.pictures.values():
        assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    assert all(address.startswith("data:") for address in page.addresses)


def test_page_leaves_out_panels_without_data(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, 100, is_writer=True, console=io.StringIO()) as logger:
        logger.log(10, {"loss/generation": 3.0, "perf/step_ms": 7.0})
    page = Page(render_page([read_metrics(tmp_path)]))
    assert set(page.pictures) == {"Generation loss", "Step time"}


def test_table_holds_last_values_and_tail_means_of_every_run(tmp_path: Path) -> None:
    for name, offset in (("a", 0.0), ("b", 1000.0)):
        with MetricsLogger(tmp_path / name, 1000, is_writer=True, console=io.StringIO()) as logger:
            for step in range(1, 101):
                logger.log(step, {"loss/total": step + offset, "data/consumed_rows": 123_456.0 * step})
    page = Page(render_page([read_metrics(tmp_path / "a"), read_metrics(tmp_path / "b")]))
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["steps"] == ["100", "100"]
    assert rows["loss/total"] == ["100", "99.5", "1100", "1099.5"]  # 2% of 100 reports are the last two
    assert rows["data/consumed_rows"][0] == "12,345,600"


def test_equal_input_gives_an_equal_page(tmp_path: Path) -> None:
    run = read_metrics(write_run(tmp_path))
    assert render_page([run]) == render_page([run])


def test_run_names_are_escaped(tmp_path: Path) -> None:
    page = render_page([read_metrics(write_run(tmp_path), "<script>alert(1)</script>")])
    assert "<script>" not in page


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_picture_is_written_in_the_format_of_its_suffix(tmp_path: Path, suffix: str, magic: bytes) -> None:
    output = tmp_path / f"curves{suffix}"
    write_curves([write_run(tmp_path / "a")], output, x_axis="images")
    assert output.read_bytes().startswith(magic)


def red_pixels(path: Path) -> int:
    """Return how many pixels have the colour of the cross for a value that is not finite."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int(((pixels[..., 0] > 180) & (pixels[..., 1] < 40) & (pixels[..., 2] < 40)).sum())


def test_value_that_is_not_finite_is_shown(tmp_path: Path) -> None:
    for name, value in (("healthy", 1.0), ("broken", math.nan)):
        with MetricsLogger(tmp_path / name, 100, is_writer=True, console=io.StringIO()) as logger:
            for step in range(1, 11):
                logger.log(step, {"loss/generation": value if step == 5 else 1.0})
        write_curves([tmp_path / name], tmp_path / f"{name}.png")
    assert red_pixels(tmp_path / "healthy.png") == 0
    assert red_pixels(tmp_path / "broken.png") > 5


def test_smoothing_is_a_centred_mean_that_keeps_a_straight_line() -> None:
    line = np.arange(1000.0)
    np.testing.assert_allclose(_smooth(line)[10:-10], line[10:-10])
    spike = np.zeros(1000)
    spike[500] = 21.0
    expected = np.where(np.abs(line - 500) <= 10, 1.0, 0.0)  # 2% of 1,000: ten on either side
    np.testing.assert_allclose(_smooth(spike), expected, atol=1e-9)
    np.testing.assert_array_equal(_smooth(line[:20]), line[:20])


def test_thinning_keeps_spikes_ends_and_order() -> None:
    x = np.arange(100_000)
    y = np.random.default_rng(0).normal(size=len(x))
    y[77_777], y[33_333] = 100.0, -100.0
    thin_x, thin_y = _thin_out(x, y)
    assert len(thin_x) <= 1500
    assert {0, 33_333, 77_777, 99_999} <= set(thin_x.tolist())
    assert (np.diff(thin_x) > 0).all()
    np.testing.assert_array_equal(thin_y, y[thin_x])


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", reports=2)
    with pytest.raises(ValueError, match=r"choose one of \.html"):
        write_curves([run], tmp_path / "curves.gif")
    with pytest.raises(ValueError, match="2 names for 1 runs"):
        write_curves([run], tmp_path / "curves.html", names=["a", "b"])
    with MetricsLogger(tmp_path / "b", 10, is_writer=True, console=io.StringIO()) as logger:
        logger.log(1, {"loss/total": 1.0})
    with pytest.raises(ValueError, match="run b has reports without data/consumed_images"):
        write_curves([tmp_path / "b"], tmp_path / "curves.html", x_axis="images")


def test_tool_writes_the_page_and_explains_a_missing_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", reports=2)
    root = Path(__file__).parents[2]
    tool = [sys.executable, str(root / "tools" / "plot_curves.py")]
    environment = {"PYTHONPATH": str(root), "PATH": ""}
    made = subprocess.run(
        [*tool, str(run), "--output", str(tmp_path / "c.html"), "--names", "first"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "first" in (tmp_path / "c.html").read_text()
    failed = subprocess.run([*tool, str(tmp_path / "no")], env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "plot_curves: " in failed.stderr
    assert "Traceback" not in failed.stderr
