"""Training speed on one GPU, beside what its matrix products and attention kernels can do at exactly these shapes.

python benchmarks/gpu.py                                   ViT-B/16 with OPT-125M, bf16, 100 steps per backend
python benchmarks/gpu.py --preset vit_l14_opt125m --rows 8

Whole steps on a synthetic corpus: agreement, copy to the device, forward, backward, optimizer. A few steps are
prepared beforehand and used in turn, so that no loader can hide behind the device or the device behind a loader.
The last line is one JSON object. Without a CUDA device the program says so and ends with status 0 and
``{"skipped": ...}`` in that line, so that it can stand in a list of checks for any machine.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from synthetic import SyntheticCorpus
from torch.nn.functional import scaled_dot_product_attention

from lcl_megatron.config import ConfigError, RunConfig
from lcl_megatron.config.sources import load_run_config
from lcl_megatron.data.batch import PackedBatch, StepBatch
from lcl_megatron.model.attention import PackedSequences, TorchCoreAttention
from lcl_megatron.model.specs import resolve_transformer_impl
from lcl_megatron.training.flops import device_peak_flops, layout_flops
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.step import train_step

BACKENDS = ("torch", "transformer_engine")
ROTATED = 3
"""Sets of inputs that a kernel is timed on in turn, so that no cache serves two runs."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What is measured."""

    preset: str = "vit_b16_opt125m"
    """Shipped configuration."""
    rows: int = 16
    """Rows of the one micro-batch of a step."""
    steps: int = 100
    """Measured steps of each backend."""
    warmup_steps: int = 10
    """Steps before them."""
    distinct_steps: int = 4
    """Steps that are prepared and used in turn."""
    vocab_size: int = 50272
    """Size of the vocabulary, that of OPT; the synthetic tokenizer is smaller."""
    num_documents: int = 2000
    """Documents of the synthetic corpus."""
    num_workers: int = 8
    """Loader processes that prepare the steps."""

    def config(self, corpus: Path, backend: str) -> RunConfig:
        """Return the run that is measured."""
        return load_run_config(
            [
                "--preset",
                self.preset,
                "--data-path",
                str(corpus),
                "--transformer-impl",
                backend,
                "--global-batch-size",
                str(self.rows),
                "--micro-batch-size",
                str(self.rows),
                "--precision",
                "bf16",
                "--language.vocab-size",
                str(self.vocab_size),
                "--num-workers",
                str(self.num_workers),
            ]
        )


def measure_backend(flags: Flags, corpus: Path, backend: str) -> tuple[dict[str, float], StepBatch]:
    """Train with one layer backend; return its figures and one of the steps."""
    torch.cuda.reset_peak_memory_stats()
    with run_from(flags.config(corpus, backend)) as run:
        prepared = list(itertools.islice(run.loader, flags.distinct_steps))
        total = flags.warmup_steps + flags.steps
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(flags.steps + 1)]
        for step in range(total):
            if step >= flags.warmup_steps:
                marks[step - flags.warmup_steps].record()
            batch = dataclasses.replace(prepared[step % len(prepared)], step=step)
            result = train_step(run, batch)
        marks[-1].record()
        torch.cuda.synchronize()
        resolved, loss = run.config, sum(float(part.generation_loss) for part in result.losses)
    times = [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(marks)]
    step_s = statistics.median(times)
    measured = [prepared[step % len(prepared)].layout for step in range(flags.warmup_steps, total)]
    flops = statistics.mean(layout_flops(resolved, layout) for layout in measured)
    images = statistics.mean(int(layout.num_images.sum()) for layout in measured)
    figures = {
        "images_per_s": images / step_s,
        "tokens_per_s": statistics.mean(layout.num_tokens for layout in measured) / step_s,
        "tflops": flops / step_s / 1e12,
        "step_ms": 1000 * step_s,
        "step_ms_p95": 1000 * statistics.quantiles(times, n=20)[-1],
        "images_per_step": images,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "last_generation_loss": loss,
    }
    peak = device_peak_flops(torch.cuda.get_device_name(), "bf16")
    return figures | ({"mfu": flops / step_s / peak} if peak else {}), prepared[0]


def device_seconds(kernel: Callable[[int], object], repeats: int = 20) -> float:
    """Return the median time of ``kernel(i)``, i counting the sets of inputs, after three warm-ups."""
    for turn in range(3):
        kernel(turn % ROTATED)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for turn in range(repeats):
        marks[turn].record()
        kernel(turn % ROTATED)
    marks[-1].record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)) / 1000


def random_tensors(*shape: int, grad: bool = False) -> list[torch.Tensor]:
    """Return ``ROTATED`` bf16 tensors of random numbers on the device."""
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_(grad) for _ in range(ROTATED)]


def product_ceilings(config: RunConfig, batch: PackedBatch) -> dict[str, float]:
    """Return TFLOP/s of the forward matrix products (rows x inputs x outputs) of a step, alone."""
    vision, language = config.vision, config.language
    rows = {"vision": batch.num_images * vision.num_tokens, "language": batch.tokens.numel()}
    shapes = {}
    for name, tower in (("vision", vision), ("language", language)):
        width, inner = tower.hidden_size, tower.ffn_hidden_size
        products = {
            "qkv": (width, 3 * width),
            "projection": (width, width),
            "fc1": (width, inner),
            "fc2": (inner, width),
        }
        shapes |= {f"{name} {product}": (rows[name], *sides) for product, sides in products.items()}
    targets = min(len(batch.label_positions), config.loss.cross_entropy_chunk_size)
    shapes["head, one chunk"] = (targets, language.hidden_size, language.padded_vocab_size)
    ceilings = {}
    for name, (m, k, n) in shapes.items():
        inputs, weights = random_tensors(m, k), random_tensors(n, k)
        seconds = device_seconds(lambda i, x=inputs, w=weights: torch.nn.functional.linear(x[i], w[i]))
        ceilings[f"{name} {m}x{k}x{n}"] = 2 * m * k * n / seconds / 1e12
    return ceilings


def attention_ceilings(config: RunConfig, batch: PackedBatch) -> dict[str, float]:
    """Return useful TFLOP/s of attention, forward and backward, alone: both towers, and the torch backend's masks.

    Causal attention counts one half, packed attention only pairs within a document; backward is 2.5 x forward.
    """
    vision, language = config.vision, config.language
    size = language.hidden_size // language.num_attention_heads
    tokens, (rows, length) = batch.tokens.numel(), batch.tokens.shape
    shape = (rows, language.num_attention_heads, length, size)
    square = 4.0 * language.hidden_size * 3.5 / 2
    documents = float((batch.cu_seqlens.diff().double() ** 2).sum())
    image_size = vision.hidden_size // vision.num_attention_heads
    image_shape = (batch.num_images, vision.num_attention_heads, vision.num_tokens, image_size)
    found = {
        "vision": (
            2 * square / language.hidden_size * vision.hidden_size * vision.num_tokens**2 * batch.num_images,
            _sdpa(image_shape, is_causal=False),
        ),
        "language, one causal document per row": (square * length**2 * rows, _sdpa(shape, is_causal=True)),
        "language, packed, torch backend": (square * documents, _packed(tokens, shape, batch)),
    }
    return {name: flops / device_seconds(kernel) / 1e12 for name, (flops, kernel) in found.items()}


def _sdpa(shape: tuple[int, ...], is_causal: bool) -> Callable[[int], object]:
    query, key, value = (random_tensors(*shape, grad=True) for _ in range(3))
    gradient = random_tensors(*shape)

    def kernel(i: int) -> None:
        output = scaled_dot_product_attention(query[i], key[i], value[i], is_causal=is_causal)
        torch.autograd.backward(output, gradient[i], inputs=[query[i], key[i], value[i]])
        query[i].grad = key[i].grad = value[i].grad = None

    return kernel


def _packed(tokens: int, shape: tuple[int, ...], batch: PackedBatch) -> Callable[[int], object]:
    flat = (tokens, shape[1], shape[3])
    query, key, value = (random_tensors(*flat, grad=True) for _ in range(3))
    gradient = random_tensors(tokens, shape[1] * shape[3])
    borders = PackedSequences.of(batch.cu_seqlens.cuda(), batch.max_seqlen, row_length=shape[2])
    layer = TransformerConfig(num_layers=1, hidden_size=shape[1] * shape[3], num_attention_heads=shape[1])
    attention = TorchCoreAttention(layer, 1, AttnMaskType.causal)

    def kernel(i: int) -> None:
        output = attention(query[i], key[i], value[i], None, packed_seq_params=borders)
        torch.autograd.backward(output, gradient[i], inputs=[query[i], key[i], value[i]])
        query[i].grad = key[i].grad = value[i].grad = None

    return kernel


def main() -> None:
    """Measure every backend that can run here and the ceilings; print a table and JSON."""
    flags = tyro.cli(Flags, description=__doc__)
    if not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device; nothing was measured")
        print(json.dumps({"skipped": "no CUDA device"}))
        return
    device = torch.cuda.get_device_name()
    report: dict[str, Any] = {"device": device, "torch_version": torch.__version__, **dataclasses.asdict(flags)}
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        corpus = SyntheticCorpus(flags.num_documents, image_side=320, mean_sentences=16).write(Path(folder) / "data")
        for backend in BACKENDS:
            try:
                resolve_transformer_impl(backend)
            except ConfigError as error:
                print(f"{backend}: skipped: {error}")
                report[backend] = {"skipped": str(error)}
                continue
            figures, step = measure_backend(flags, corpus, backend)
            report[backend] = figures
            print(f"{backend}: " + ", ".join(f"{name} {value:,.3g}" for name, value in figures.items()))
        (batch,), config = step.micro_batches, flags.config(corpus, "torch")
    for kind, measure in (("product", product_ceilings), ("attention", attention_ceilings)):
        report[f"{kind}_tflops"] = ceilings = measure(config, batch)
        for name, value in ceilings.items():
            print(f"{kind:9} {name:44} {value:7.1f} TFLOP/s")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
