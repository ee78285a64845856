"""What is compared: training objectives, as settings of the same run, and reference encoders.

The objectives are values of ordinary settings of ``pretrain_lcl.py``; nothing here is a branch in the code.

| method | paper | settings |
|---|---|---|
| ``lcl`` | LCL, Eq. (6) | both losses |
| ``contrast_only`` | its ablation | ``generation_loss_weight = 0`` |
| ``generation_only`` | Flamingo's objective | ``contrastive_loss_weight = 0`` |
| ``generation_regression`` | Emu's objective | and ``latent_regression_loss_weight = 1`` |
| ``clip`` | CLIP | contrast alone, of every image with its own sentence |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lcl_megatron.config.toml import SectionValues

Kind = Literal["pretrain", "supervised", "untrained"]
Role = Literal["main", "control", "reference"]


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    """Key in ``results.json``."""
    title: str
    """What it is, in a few words."""
    kind: Kind
    """How the encoder is made: by a training run of this package, with labels, or not at all."""
    role: Role = "main"
    """``control`` = shows that generation alone does learn where looking at images helps to foretell the text."""
    documents: Literal["main", "control"] = "main"
    """Which documents are read."""
    settings: SectionValues = field(default_factory=dict)
    """Settings in which the run differs from the others."""
    trains_text: bool = True
    """Whether the next-token loss is part of the objective; its value means something only then."""


_NO_CONTRAST: SectionValues = {"loss": {"contrastive_loss_weight": 0.0}}
_CAPTIONS: SectionValues = {"data": {"view": ("pairs",), "pair_placement": "image_first"}}
_NO_GENERATION: SectionValues = {"loss": {"generation_loss_weight": 0.0}}

METHODS = (
    Method("lcl", "LCL: generation + contrast", "pretrain"),
    Method("contrast_only", "contrast alone", "pretrain", settings=_NO_GENERATION, trains_text=False),
    Method("generation_only", "generation alone (Flamingo)", "pretrain", settings=_NO_CONTRAST),
    Method(
        "generation_regression",
        "generation + regression of latents (Emu)",
        "pretrain",
        settings={"loss": {"contrastive_loss_weight": 0.0, "latent_regression_loss_weight": 1.0}},
    ),
    Method(
        "clip",
        "CLIP: contrast of image-sentence pairs",
        "pretrain",
        settings=_NO_GENERATION | {"data": {"view": ("pairs",), "pair_placement": "text_first"}},
        trains_text=False,
    ),
    Method("untrained", "untrained encoder", "untrained", role="reference", trains_text=False),
    Method("supervised", "trained with the labels", "supervised", role="reference", trains_text=False),
    Method(
        "generation_only_pairs",
        "generation alone, images before their sentences",
        "pretrain",
        role="control",
        settings=_NO_CONTRAST | _CAPTIONS,
    ),
    Method(
        "generation_only_control",
        "generation alone, control documents",
        "pretrain",
        role="control",
        documents="control",
        settings=_NO_CONTRAST,
    ),
)
"""Everything that is run, in the order of the tables.

Two controls. Pairs are the images and sentences of the main documents without the text around them, image first:
nothing but the image foretells its sentence, and nothing stands before it that it could be contrasted with. The control
documents are whole ones, which announce nothing.
"""


def method_named(name: str) -> Method:
    """Return the method of that name."""
    return next(method for method in METHODS if method.name == name)
