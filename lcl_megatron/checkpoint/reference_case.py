"""Compare the ``official`` recipe with recorded outputs and gradients of the released LCL code.

A case is two files: ``NAME.json`` (model configuration, special token ids, losses) and ``NAME.safetensors``
(``input.*``, ``weight.*`` under the released names, ``output.*``, ``grad.*``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from lcl_megatron.checkpoint.convert.official import from_official, to_official
from lcl_megatron.config import (
    DataConfig,
    LanguageConfig,
    ParallelConfig,
    PoolConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.model.lcl import LCLModel, LCLOutput
from lcl_megatron.model.specs import Runtime
from lcl_megatron.parallel.contrastive import PairSlots, contrastive_loss
from lcl_megatron.parallel.groups import initialize

OUTPUT_TOLERANCE = 1e-5
"""Relative to the largest entry of the recorded tensor (fp32)."""
GRADIENT_TOLERANCE = 1e-4
"""Relative to the largest entry of the recorded gradient (fp32)."""
NOISE_FLOOR = 1e-6
"""A gradient whose entries are all below this share of the largest entry of any gradient is zero but for rounding: a
bias of the pool's keys shifts all scores of a query alike, which softmax does not see. Ours must be as small."""


@dataclass(frozen=True)
class Comparison:
    """How far one tensor is from the recorded one."""

    name: str
    """``output.logits``, ``loss``, ``grad.visual.conv1.weight``, ..."""
    error: float
    """Largest absolute difference, divided by the largest recorded entry."""
    tolerance: float
    """Largest error that passes."""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class ReferenceCase:
    """A recorded forward and backward pass of the released code."""

    name: str
    """File name without extension."""
    description: dict[str, Any]
    """Contents of the JSON file."""
    tensors: dict[str, Tensor]
    """Contents of the safetensors file."""

    @classmethod
    def load(cls, path: str | Path) -> ReferenceCase:
        """Read ``NAME.safetensors`` and the ``NAME.json`` beside it.

        Raises:
            FileNotFoundError: one of the two files is not there.
        """
        path = Path(path)
        description_path = path.with_suffix(".json")
        for file in (path, description_path):
            if not file.is_file():
                raise FileNotFoundError(f"{file} does not exist; a case is NAME.safetensors with NAME.json beside it")
        return cls(path.stem, json.loads(description_path.read_text()), load_file(path))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose name starts with ``prefix.``, without it."""
        return {k.removeprefix(f"{prefix}."): v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}

    def config(self) -> RunConfig:
        """Return the ``official`` recipe with the case's sizes."""
        sizes, weights = self.description["config"], self.group("weight")
        vision, text = sizes["vision"], sizes["text"]
        return RunConfig(
            vision=VisionConfig(
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                num_layers=vision["layers"],
                hidden_size=vision["width"],
                ffn_hidden_size=weights["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
                num_attention_heads=vision["width"] // vision["head_width"],
                layer_scale_init=None,
                drop_path_rate=0.0,
            ),
            pool=PoolConfig(num_attention_heads=sizes["heads"]),
            language=LanguageConfig(
                num_layers=text["layers"],
                hidden_size=text["width"],
                ffn_hidden_size=weights["text.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
                num_attention_heads=text["heads"],
                vocab_size=text["vocab_size"],
                max_position_embeddings=text["context_length"],
                activation="gelu",
                tie_embeddings=False,
                context_bias=False,
                make_vocab_size_divisible_by=1,
            ),
            data=DataConfig(seq_length=self.tensors["input.tokens"].shape[1], context_rule="index"),
            training=TrainingConfig(precision="fp32", transformer_impl="torch"),
        )

    def batch(self) -> PackedBatch:
        """Return the recorded tokens and images as one micro-batch, one document per row.

        Targets are the next tokens except image placeholders, ``<EoI>`` and padding; an image is contrasted unless
        its ``<BoI>`` stands at index 0.
        """
        tokens, ids = self.tensors["input.tokens"], self.description["special_token_ids"]
        rows, length = tokens.shape
        never_targets = torch.tensor(
            [ids["<img_placehold>"], ids["<end_of_img>"], self.description["pad_id"]], dtype=tokens.dtype
        )
        labels, loss_mask = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
        labels[:, :-1] = tokens[:, 1:]
        loss_mask[:, :-1] = ~torch.isin(tokens[:, 1:], never_targets)
        context_slots = (tokens.flatten() == ids["<start_of_img>"]).nonzero()[:, 0]
        num_images = context_slots.shape[0]
        return PackedBatch(
            tokens=tokens,
            labels=labels * loss_mask,
            loss_mask=loss_mask,
            position_ids=torch.arange(length).expand(rows, -1),
            cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32),
            max_seqlen=length,
            label_positions=loss_mask.flatten().nonzero()[:, 0],
            image_slots=context_slots + 1,
            context_slots=context_slots,
            has_context=context_slots % length > 0,
            image_keys=torch.arange(num_images),
            image_ok=torch.ones(num_images, dtype=torch.bool),
            images=self.tensors["input.images"],
            num_images=num_images,
        )


def compare(case: ReferenceCase) -> list[Comparison]:
    """Run the case forward and backward and compare every output, loss and gradient."""
    config, batch = case.config(), case.batch()
    groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    try:
        model = LCLModel(config, Runtime(collection=groups.collection)).to(groups.device)
        batch = batch.to(groups.device)
        model.load_state_dict(from_official(case.group("weight"), config), strict=True)
        model.train()
        output = model(batch)
        with torch.no_grad():
            logits = model.target_logits(batch)
        losses = _losses(output, batch, config)
        losses["loss"].backward()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    finally:
        groups.destroy()
    found = {
        "output.logits": logits,
        "output.labels": batch.labels.flatten()[batch.label_positions],
        "output.all_image_features": normalize(output.pooled_ND.float(), dim=-1),
        "output.image_features": normalize(output.pooled_ND.float(), dim=-1)[batch.pair_mask],
        "output.text_features": normalize(output.context_ND.float(), dim=-1)[batch.pair_mask],
    }
    recorded_losses = {name: torch.tensor(case.description[name]) for name in losses}
    official_gradients = to_official(gradients, config)
    return [
        *(
            _comparison(f"output.{n}", found.get(f"output.{n}"), t, OUTPUT_TOLERANCE)
            for n, t in case.group("output").items()
        ),
        *(_comparison(n, losses[n], t, OUTPUT_TOLERANCE) for n, t in recorded_losses.items()),
        *_compare_gradients(case.group("grad"), official_gradients),
    ]


def _compare_gradients(recorded: dict[str, Tensor], found: dict[str, Tensor]) -> list[Comparison]:
    largest = max(float(gradient.abs().max()) for gradient in recorded.values())
    comparisons = []
    for name, gradient in recorded.items():
        if gradient.abs().max() < NOISE_FLOOR * largest and name in found:
            share = float(found[name].abs().max()) / largest
            comparisons.append(Comparison(f"grad.{name} (zero but for rounding)", share, NOISE_FLOOR))
        else:
            comparisons.append(_comparison(f"grad.{name}", found.get(name), gradient, GRADIENT_TOLERANCE))
    return comparisons


def _losses(output: LCLOutput, batch: PackedBatch, config: RunConfig) -> dict[str, Tensor]:
    generation = output.token_losses_K.mean()
    slots = PairSlots([batch.num_image_slots], batch.pair_mask)
    contrast = contrastive_loss(
        output.pooled_ND, output.context_ND, output.logit_scale, slots, None, config.loss.contrastive_tile_size
    )
    contrastive = contrast.loss_sum / max(1, int(batch.pair_mask.sum()))
    return {
        "generation_loss": generation,
        "contrastive_loss": contrastive,
        "loss": generation + config.loss.contrastive_loss_weight * contrastive,
    }


def _comparison(name: str, found: Tensor | None, recorded: Tensor, tolerance: float) -> Comparison:
    if found is None or found.shape != recorded.shape:
        return Comparison(name, float("inf"), tolerance)
    largest = recorded.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = (found.detach().cpu().double() - recorded.double()).abs().max() / largest
    return Comparison(name, float(error), tolerance)
