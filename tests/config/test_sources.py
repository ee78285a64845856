"""Oracle: each source of values alone, by hand; a frozen list of flags; Python's own dataclass constructors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lcl_megatron.config import ConfigError, RunConfig
from lcl_megatron.config.reference import BEGIN, END, PREFIXED, field_docstrings, flag, with_reference
from lcl_megatron.config.sources import _CommandLine, describe, load_run_config, preset_names, preset_text
from lcl_megatron.config.toml import field_types, section_types, to_toml

ROOT = Path(__file__).parents[2]
GOLDEN_FLAGS = Path(__file__).parent / "golden" / "cli_flags.txt"


def test_no_argument_gives_the_defaults() -> None:
    assert load_run_config([]) == RunConfig()


def test_flags_override_file_overrides_preset_overrides_defaults(tmp_path: Path) -> None:
    tiny = load_run_config(["--preset", "tiny"])
    file = tmp_path / "mine.toml"
    file.write_text("[vision]\nnum_layers = 5\n[training]\ntrain_iters = 7\n[language]\nnum_layers = 2\n")
    arguments = ["--preset", "tiny", "--config", str(file), "--train-iters", "9", "--vision.patch-size", "4"]
    config = load_run_config(arguments)
    assert config.optimizer.adam_beta2 == RunConfig().optimizer.adam_beta2  # default
    assert config.language.hidden_size == tiny.language.hidden_size != RunConfig().language.hidden_size  # preset
    assert (config.vision.num_layers, config.language.num_layers) == (5, 2)  # file over preset
    assert (config.training.train_iters, config.vision.patch_size) == (9, 4)  # flag over file, flag over preset


def test_order_of_arguments_does_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[training]\ntrain_iters = 7\n")
    one = load_run_config(["--train-iters", "9", "--config", str(file), "--preset=tiny"])
    assert one == load_run_config(["--preset", "tiny", "--config", str(file), "--train-iters", "9"])
    assert one.training.train_iters == 9


def test_flags_of_every_type() -> None:
    config = load_run_config(
        "--no-use-distributed-optimizer --no-overlap-grad-reduce --crop-scale 0.5 1 --vision.layer-scale-init None "
        "--pipeline-model-parallel-size 3 --pipeline-cuts vision.6 language.3 --precision fp32 --data-path a/b".split()
    )
    assert config.parallel.use_distributed_optimizer is False
    assert config.data.crop_scale == (0.5, 1.0)
    assert config.vision.layer_scale_init is None
    assert config.parallel.pipeline_cuts == ("vision.6", "language.3")
    assert (config.training.precision, config.data.data_path) == ("fp32", ("a/b",))


def test_parts_that_are_only_right_together_may_come_from_two_sources(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[parallel]\nsequence_parallel = true\n")
    config = load_run_config(["--config", str(file), "--tensor-model-parallel-size", "2"])
    assert config.parallel.sequence_parallel
    with pytest.raises(ConfigError, match="sequence_parallel is on with parallel.tensor_model_parallel_size = 1"):
        load_run_config(["--config", str(file)])


@pytest.mark.parametrize("preset", preset_names())
def test_resolved_config_as_file_repeats_the_run(preset: str, tmp_path: Path) -> None:
    config = load_run_config(["--preset", preset, "--seed", "77", "--save", str(tmp_path)])
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_run_config(["--config", str(file)]) == config


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError) as raised:
        load_run_config(["--preset", "vit_g"])
    assert "--preset vit_g: there is no such preset" in str(raised.value)
    assert all(name in str(raised.value) for name in preset_names())


def test_unreadable_file_raises_naming_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config .*absent.toml: cannot be read: .*No such file"):
        load_run_config(["--config", str(tmp_path / "absent.toml")])
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"--config .*binary.toml: cannot be read"):
        load_run_config(["--config", str(tmp_path / "binary.toml")])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--train-iter", "5"], "--train-iters"),
        (["--precision", "fp8"], "bf16"),
        (["--train-iters", "many"], "--train-iters"),
        (["--num-layers", "3"], "--num-layers"),
    ],
)
def test_wrong_flag_ends_with_status_2_and_names_it(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_run_config(arguments)
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


def test_help_shows_every_flag_its_meaning_and_the_presets_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_run_config(["--preset", "tiny", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert not [name for name in GOLDEN_FLAGS.read_text().split() if name not in shown]
    assert "Ranks that share every layer's matrices" in shown
    assert "(default: 32)" in shown  # image_size of the preset


def test_flags_equal_the_frozen_list() -> None:
    """A flag that disappears breaks other people's scripts: change the list on purpose, with a line in CHANGELOG."""
    flags = [flag(section, name) for section in section_types() for name in field_types(section)]
    assert sorted([*flags, "--preset", "--config"]) == GOLDEN_FLAGS.read_text().split()


@pytest.mark.parametrize("section", list(section_types()))
def test_flag_names_are_what_the_parser_takes(section: str) -> None:
    default = getattr(RunConfig(), section)
    for name, hint in field_types(section).items():
        if hint in (int, float):
            value = getattr(default, name)
            config = load_run_config([flag(section, name), str(value)])
            assert getattr(config, section) == default, name


def test_command_line_has_the_sections_of_the_run() -> None:
    own = {field.name for field in dataclasses.fields(_CommandLine)} - {"preset", "config"}
    assert own == {field.name for field in dataclasses.fields(RunConfig)}
    prefixed = {name for name, hint in _CommandLine.__annotations__.items() if "_NoPrefix" not in str(hint)}
    assert prefixed == set(PREFIXED)


def test_every_field_says_what_it_means() -> None:
    for section, cls in section_types().items():
        docs = field_docstrings(cls)
        assert [name for name in field_types(section) if not docs.get(name)] == []


def test_describe_shows_every_value_and_marks_what_is_not_default() -> None:
    lines = describe(load_run_config(["--train-iters", "9"])).splitlines()
    assert [line for line in lines if "(default" in line] == ["  train_iters       = 9    (default 250000)"]
    assert len(lines) == len(section_types()) + sum(len(field_types(section)) for section in section_types())


def test_documentation_holds_the_present_settings_and_presets() -> None:
    """``python -m lcl_megatron.config.reference docs/configuration.md`` brings the page up to date."""
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert BEGIN in page
    assert END in page
    assert page == with_reference(page)
    assert [name for name in preset_names() if f"`{name}`" not in page] == []


@pytest.mark.parametrize("preset", preset_names())
def test_preset_begins_with_source_command_and_hardware(preset: str) -> None:
    header = [line for line in preset_text(preset).splitlines() if line.startswith("#")]
    for word in ("# Source:", "# Command:", "# Hardware:"):
        assert any(line.startswith(word) for line in header), word
