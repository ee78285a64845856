"""Settings of tasks. Oracles: LCL's Tab. 8 and A.2, written out, and the values that the test itself wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.evaluation.classification.task import ClassificationSettings
from lcl_megatron.evaluation.retrieval.task import RetrievalSettings
from lcl_megatron.evaluation.transfer.fit import FitConfig
from lcl_megatron.evaluation.transfer.settings import preset_names, read_settings


@dataclass(frozen=True, kw_only=True)
class Settings:
    fit: FitConfig
    name: str = "a"
    scale: tuple[float, float] = (0.0, 1.0)


BODY = "name = 'b'\n[fit]\nsteps = 5\nbatch_size = 2\nlr = 1\n"


def preset(tmp_path: Path, text: str = BODY) -> str:
    path = tmp_path / "my.toml"
    path.write_text(text)
    return str(path)


def test_papers_presets_are_table_8() -> None:
    fit = read_settings(ClassificationSettings, "classification", "paper").fit
    assert (fit.lr, fit.weight_decay, fit.warmup_steps, fit.steps, fit.batch_size) == (1e-4, 1e-4, 1500, 14000, 8192)
    # 90 epochs of the 1,281,167 training images.
    assert fit.steps * fit.batch_size / 1281167 == pytest.approx(90, abs=0.6)
    retrieval = read_settings(RetrievalSettings, "retrieval", "paper").fit
    assert (retrieval.lr, retrieval.pretrained_lr, retrieval.weight_decay) == (1e-3, 1e-5, 1e-4)
    assert (retrieval.warmup_steps, retrieval.steps, retrieval.batch_size) == (500, 5000, 16384)


@pytest.mark.parametrize(
    ("task", "settings"), [("classification", ClassificationSettings), ("retrieval", RetrievalSettings)]
)
def test_every_preset_can_be_read(task: str, settings: type) -> None:
    names = preset_names(task)
    assert {"paper", "cpu"} <= set(names)
    for name in names:
        assert read_settings(settings, task, name).fit.steps > 0


def test_single_values_go_on_top(tmp_path: Path) -> None:
    overrides = ["fit.steps=9", "fit.precision=bf16", "scale=[0.5, 1]", "fit.pretrained_lr=none", "name=c d"]
    settings = read_settings(Settings, "classification", preset(tmp_path), overrides)
    assert settings == Settings(
        fit=FitConfig(steps=9, batch_size=2, lr=1.0, precision="bf16"), name="c d", scale=(0.5, 1.0)
    )


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("a = = 1", (), r"my\.toml: not valid TOML"),
        ("zork = 1", (), r"my\.toml: zork is no setting; known: fit, name, scale"),
        ("[fit]\nzork = 1", (), r"my\.toml: fit\.zork is no setting; known: fit\.steps,"),
        ("[fit]\nsteps = 'a'", (), r"my\.toml: fit\.steps = 'a' is of type str; expected a whole number"),
        ("fit = 3", (), r"my\.toml: fit = 3 is not a table; set its fields"),
        ("name = 'b'", (), r"my\.toml: .*missing 1 required keyword-only argument: 'fit'"),
        ("[fit]\nsteps = 1", (), r"my\.toml: .*missing 2 required"),
        (BODY, ("fit.zork=1",), r"--set: fit\.zork is no setting"),
        (BODY, ("fit.steps",), "--set fit.steps: expected NAME=VALUE"),
        (BODY, ("fit.lr=-1",), "fit.lr = -1.0; expected more than 0"),
    ],
)
def test_wrong_settings_are_explained(tmp_path: Path, text: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(Settings, "classification", preset(tmp_path, text), overrides)


def test_unknown_presets_are_explained() -> None:
    with pytest.raises(ConfigError, match="there is no preset 'zork' of classification; choose cpu or paper"):
        read_settings(Settings, "classification", "zork")
    with pytest.raises(ConfigError, match=r"there is no preset file nowhere\.toml"):
        read_settings(Settings, "classification", "nowhere.toml")
