"""What a checkpoint must have in common with a run that takes it up. Oracle: the fields of the sections themselves."""

from __future__ import annotations

import dataclasses

from lcl_megatron.config import RunConfig
from lcl_megatron.config.validate import architecture, architecture_difference
from tests.config.test_validate import change


def test_architecture_holds_every_model_field_but_those_that_only_steer_training() -> None:
    names = {
        f"{section}.{field.name}"
        for section in ("vision", "pool", "language")
        for field in dataclasses.fields(getattr(RunConfig(), section))
    }
    free = {"vision.drop_path_rate", "vision.drop_path_mode", "vision.layer_scale_init"}
    free |= {f"{tower}.recompute_{what}" for tower in ("vision", "language") for what in ("granularity", "num_layers")}
    assert set(architecture(RunConfig())) == names - free | {"vision.layer_scale"}


def test_architecture_difference_names_field_and_both_values() -> None:
    stored = architecture(RunConfig())
    run = architecture(
        change(
            RunConfig(),
            vision__num_layers=24,
            vision__layer_scale_init=None,
            vision__drop_path_rate=0.5,
            vision__drop_path_mode="subset",
            language__recompute_granularity="full",
            optimizer__lr=1.0,
        )
    )
    assert architecture_difference(stored, run) == [
        "vision.num_layers: 12 in the checkpoint, 24 in this run",
        "vision.layer_scale: True in the checkpoint, False in this run",
    ]
    assert architecture_difference(stored, stored) == []
    assert architecture_difference({}, {"pool.x": 1}) == ["pool.x: 'absent' in the checkpoint, 1 in this run"]


def test_other_layer_scale_start_is_the_same_architecture() -> None:
    other = change(RunConfig(), vision__layer_scale_init=1e-5)
    assert architecture_difference(architecture(RunConfig()), architecture(other)) == []
