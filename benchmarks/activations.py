"""What each tower keeps for the backward pass, and what it executes, by what it recomputes and how it drops paths.

python benchmarks/activations.py                                     ViT-B/16 with OPT-125M, bf16
python benchmarks/activations.py --preset vit_l14_opt125m --images 2

Bytes are counted, not modelled: all storages that autograd holds when the forward pass of a tower's layers has ended,
parameters left out. FLOPs are those of torch's counter over forward and backward pass, matrix products and attention,
recomputation included. Neither depends on the machine's load. Prints one line per tower and mode and, last, one JSON
object: ``..._mib`` per image or row, ``..._flops`` relative to the tower that keeps everything.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lcl_megatron.config import LanguageConfig, RunConfig, VisionConfig
from lcl_megatron.config.sources import load_run_config
from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.model.drop_path import DropPath
from lcl_megatron.model.language import LanguageModel
from lcl_megatron.model.specs import Runtime
from lcl_megatron.model.vision import VisionTower
from lcl_megatron.parallel import engine as engines

GRANULARITIES = ("none", "selective", "full")
_ATEN = torch.ops.aten
# torch's counter knows the attention kernels of GPUs only.
CPU_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What is measured."""

    preset: str = "vit_b16_opt125m"
    """Shipped configuration that gives the shapes."""
    drop_path_rate: float = 0.2
    """Stochastic depth of the vision tower's last layer, as in training."""
    images: int = 8
    """Images of the micro-batch."""
    documents: int = 4
    """Documents in the one row of text, all of one length."""
    precision: str = "bf16"
    """dtype of parameters and activations: bf16 or fp32."""
    threads: int = 1
    """torch threads."""


@dataclass(frozen=True)
class Measured:
    """One forward and backward pass of a tower's layers."""

    saved_bytes: int
    """Kept between the two."""
    flops: int
    """Executed by both."""


def measure(tower: nn.Module, run: Callable[[], Tensor]) -> Measured:
    """Run a tower forward and backward once."""
    parameters = {parameter.untyped_storage()._cdata for parameter in tower.parameters()}
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.02)
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = run()
        # Storages that were emptied since they were noted count as what they are now: nothing.
        sizes = {storage: tensor.untyped_storage().nbytes() for storage, tensor in saved.items()}
        saved.clear()
        output.sum().backward()
    kept = sum(size for storage, size in sizes.items() if storage not in parameters)
    return Measured(kept, counter.get_total_flops())


def vision_cost(vision: VisionConfig, runtime: Runtime, images: int) -> Measured:
    """Measure the layers of the vision tower."""
    tower = VisionTower(vision, runtime, has_embedding=False, has_final_layernorm=False).to(_device())
    patches = torch.randn(images * vision.num_tokens, 1, vision.hidden_size, device=_device())
    patches = patches.to(runtime.params_dtype).requires_grad_()
    drop_path = DropPath(vision.drop_path_rate, vision.num_layers, seed=1, step=0)
    # The input is another module's output, not a leaf that lives in any case.
    return measure(tower, lambda: tower.encode(patches * 1, torch.arange(images, device=_device()), drop_path))


def language_cost(language: LanguageConfig, runtime: Runtime, seq_length: int, documents: int) -> Measured:
    """Measure the layers of the language model on one row."""
    tower = LanguageModel(language, runtime, has_embedding=False, heads_chunk_size=None).to(_device())
    hidden = torch.randn(seq_length, 1, language.hidden_size, device=_device())
    hidden = hidden.to(runtime.params_dtype).requires_grad_()
    batch = _row(seq_length, documents).to(_device())
    return measure(tower, lambda: tower.decode(hidden * 1, batch))


def _row(seq_length: int, documents: int) -> PackedBatch:
    """Return a row of documents of one length, without images."""
    zeros = torch.zeros(1, seq_length, dtype=torch.int64)
    nothing = torch.zeros(0, dtype=torch.int64)
    borders = torch.arange(0, documents + 1, dtype=torch.int32) * (seq_length // documents)
    borders[-1] = seq_length
    return PackedBatch(
        tokens=zeros,
        labels=zeros,
        loss_mask=zeros.bool(),
        position_ids=zeros,
        cu_seqlens=borders,
        max_seqlen=int(borders.diff().max()),
        label_positions=nothing,
        image_slots=nothing,
        context_slots=nothing,
        has_context=nothing.bool(),
        image_keys=nothing,
        image_ok=nothing.bool(),
        images=None,
        num_images=0,
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compare(config: RunConfig, runtime: Runtime, flags: Flags) -> dict[str, float]:
    """Measure every mode; return the figures by name."""
    costs: dict[str, tuple[Measured, int, str]] = {}
    for mode in ("mask", "subset"):
        for granularity in GRANULARITIES:
            vision = dataclasses.replace(
                config.vision,
                drop_path_rate=flags.drop_path_rate,
                drop_path_mode=mode,
                recompute_granularity=granularity,
            )
            cost = vision_cost(vision, runtime, flags.images)
            costs[f"vision_{mode}_{granularity}"] = cost, flags.images, "image"
    for granularity in GRANULARITIES:
        language = dataclasses.replace(config.language, recompute_granularity=granularity)
        cost = language_cost(language, runtime, config.data.seq_length, flags.documents)
        costs[f"language_{granularity}"] = cost, 1, "row"
    result = {}
    for name, (cost, count, unit) in costs.items():
        whole = costs["vision_mask_none" if name.startswith("vision") else "language_none"][0]
        result[f"{name}_mib"] = cost.saved_bytes / count / 2**20
        result[f"{name}_flops"] = cost.flops / whole.flops
        share, executed = cost.saved_bytes / whole.saved_bytes, cost.flops / whole.flops
        print(
            f"{name.replace('_', ', '):24} {result[f'{name}_mib']:9.3f} MiB per {unit:5} ({share:6.1%}), "
            f"{executed:6.1%} of the operations"
        )
    return result


def main() -> None:
    """Read the flags, measure, print."""
    flags = tyro.cli(Flags, description=__doc__)
    torch.set_num_threads(flags.threads)
    config = load_run_config(["--preset", flags.preset, "--language.vocab-size", "50272"])
    groups = engines.start(config)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[flags.precision]
    result = compare(config, Runtime(collection=groups.collection, params_dtype=dtype), flags)
    groups.destroy()
    report: dict[str, Any] = result | dataclasses.asdict(flags) | {"torch_version": torch.__version__}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
