"""Useful floating-point operations of one training step, and what share of the device's peak they are.

*Useful* means what the mathematics asks for, whatever the implementation executes:

- matrix products only (2 operations per multiply-add); norms, softmax and element-wise work are left out;
- text positions of documents only, no padding;
- causal attention at one half, within each document; the vision tower's attention in full, class token included;
- language-model head on text targets only, over the real vocabulary, not its padded rows;
- backward = 2 x forward, for every product;
- nothing for residual branches that drop-path leaves out (``vision.drop_path_mode = subset``), on average; those that
  it multiplies by 0 count;
- nothing for recomputed activations, and nothing for the similarity matrix of the contrastive loss (below 0.1% of a
  ViT-L/14 step at a global batch of 65,536 images).

A share of peak computed from these numbers is comparable between layouts, kernels and machines, and falls when a
run recomputes, pads or waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lcl_megatron.config.errors import require
from lcl_megatron.model.drop_rates import computed_share

if TYPE_CHECKING:
    from lcl_megatron.config import LanguageConfig, RunConfig, VisionConfig
    from lcl_megatron.data.batch import StepLayout

FORWARD_AND_BACKWARD = 3
"""Cost of a training step in forward passes: one forward, two for the gradients of inputs and of weights."""


def step_flops(
    config: RunConfig, num_images: int, document_lengths: Sequence[int] | np.ndarray, num_targets: int
) -> float:
    """Return the useful FLOPs of one training step.

    The result is additive: FLOPs of a global batch are the sum over its micro-batches and ranks, so every rank may
    compute its own share and the shares may be summed.

    Args:
        config: run whose ``vision`` and ``language`` sections give the shapes.
        num_images: images that are encoded.
        document_lengths: tokens of each document, image latents included, padding left out.
        num_targets: text positions that have a label.

    Returns:
        Floating-point operations, forward and backward.

    Raises:
        ConfigError: the vocabulary size is not known yet, so that the head would be counted as free.
    """
    lengths = np.asarray(document_lengths, dtype=np.float64)
    return _flops(config, num_images, (float(lengths.sum()), float(np.square(lengths).sum())), num_targets)


def layout_flops(config: RunConfig, layout: StepLayout) -> float:
    """Return ``step_flops`` of a global batch from the counts that its plan gives."""
    lengths = (layout.num_tokens, layout.sum_squared_lengths)
    return _flops(config, int(layout.num_images.sum()), lengths, layout.num_targets)


def _flops(config: RunConfig, num_images: int, lengths: tuple[float, float], num_targets: int) -> float:
    num_tokens, sum_squared_lengths = lengths
    forward = (
        num_images * (vision_forward_flops(config.vision) + pool_forward_flops(config))
        + language_forward_flops(config.language, num_tokens, sum_squared_lengths)
        + head_forward_flops(config.language, num_targets)
    )
    return FORWARD_AND_BACKWARD * forward


def vision_forward_flops(vision: VisionConfig) -> float:
    """Return the forward FLOPs of the vision tower on one image, in training on average."""
    tokens, width = vision.num_tokens, vision.hidden_size
    patch_embedding = 2 * vision.num_patches * width * 3 * vision.patch_size**2
    linear = 2 * tokens * (4 * width**2 + 2 * width * vision.ffn_hidden_size)
    attention = 4 * tokens**2 * width
    layers = sum(computed_share(vision, layer) for layer in range(vision.num_layers))
    return float(patch_embedding + layers * (linear + attention))


def pool_forward_flops(config: RunConfig) -> float:
    """Return the forward FLOPs of one image in the attention pool and of its context in the context head.

    Keys and values of every patch, attention of the one learned query, output projection of every latent and of the
    pooled latent. The projection of the query itself is shared by all images of a micro-batch and not counted. The
    context head is applied once, and once more for every latent that is regressed.
    """
    latents, width, hidden = config.vision.num_patches, config.vision.hidden_size, config.language.hidden_size
    keys_and_values = 2 * latents * 2 * width * hidden
    attention = 4 * latents * hidden
    output = 2 * (latents + 1) * hidden**2
    regressed = latents if config.loss.latent_regression_loss_weight > 0 else 0
    context_head = 2 * (1 + regressed) * hidden**2
    return float(keys_and_values + attention + output + context_head)


def language_forward_flops(language: LanguageConfig, num_tokens: float, sum_squared_lengths: float) -> float:
    """Return the forward FLOPs of the language model's layers.

    Args:
        language: shapes.
        num_tokens: sum of the documents' lengths.
        sum_squared_lengths: sum of the squares of the documents' lengths; causal attention costs half of each.
    """
    linear = 2 * num_tokens * (4 * language.hidden_size**2 + 2 * language.hidden_size * language.ffn_hidden_size)
    attention = 4 * sum_squared_lengths * language.hidden_size / 2
    return float(language.num_layers * (linear + attention))


def head_forward_flops(language: LanguageConfig, num_targets: int) -> float:
    """Return the forward FLOPs of the logits of ``num_targets`` text positions."""
    require(
        language.vocab_size > 0,
        f"language.vocab_size = {language.vocab_size}; FLOPs can be counted once the corpus's tokenizer is known",
    )
    return float(2 * num_targets * language.hidden_size * language.vocab_size)


class _Peak(NamedTuple):
    """Datasheet peak of one device, dense, in TFLOP/s."""

    words: tuple[str, ...]
    """Words that must all occur in the device's name."""
    bf16: float
    """Matrix units, bfloat16 with float32 accumulation, without structured sparsity."""
    fp32: float | None
    """Plain float32 (no TF32); None = the vendor gives no figure for it."""


# From the vendors' datasheets; NVIDIA's tensor figures are printed with sparsity and halved here. First match
# counts, so a variant stands before its family. AMD's MI250X shows its two dies as two devices: half each.
_PEAKS = (
    _Peak(("GB300",), 2500.0, None),
    _Peak(("GB200",), 2500.0, 80.0),
    _Peak(("B300",), 2250.0, 75.0),
    _Peak(("B200",), 2250.0, 75.0),
    _Peak(("GH200",), 989.4, 67.0),
    _Peak(("H200", "NVL"), 835.5, 60.0),
    _Peak(("H200",), 989.4, 67.0),
    _Peak(("H100", "NVL"), 835.5, 60.0),
    _Peak(("H100", "PCIE"), 756.0, 51.0),
    _Peak(("H100",), 989.4, 67.0),
    _Peak(("H20",), 148.0, 44.0),
    _Peak(("A100",), 312.0, 19.5),
    _Peak(("A800",), 312.0, 19.5),
    _Peak(("A40",), 149.7, 37.4),
    _Peak(("A30",), 165.0, 10.3),
    _Peak(("A10",), 125.0, 31.2),
    _Peak(("L40S",), 362.0, 91.6),
    _Peak(("L40",), 181.0, 90.5),
    _Peak(("L4",), 121.0, 30.3),
    _Peak(("RTX", "A6000"), 154.8, 38.7),
    _Peak(("RTX", "4090"), 165.2, 82.6),
    _Peak(("RTX", "3090"), 71.0, 35.6),
    _Peak(("MI325X",), 1307.4, 163.4),
    _Peak(("MI300X",), 1307.4, 163.4),
    _Peak(("MI250X",), 191.5, 23.95),
)


def device_peak_flops(device_name: str, precision: Literal["bf16", "fp32"]) -> float | None:
    """Return the datasheet peak of a device in FLOP/s, dense.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it, e.g. ``NVIDIA H100 80GB HBM3``; anything for a CPU.
        precision: ``bf16`` = matrix units; ``fp32`` = plain float32, TF32 off as torch leaves it.

    Returns:
        FLOP/s, or None for a CPU, for an unknown device and for a slice of a device (MIG): a utilisation against a
        guessed peak would be read as a measurement.
    """
    words = set(device_name.upper().replace("-", " ").replace("/", " ").split())
    if "MIG" in words:
        return None
    for peak in _PEAKS:
        if words.issuperset(peak.words):
            tflops = peak.bf16 if precision == "bf16" else peak.fp32
            return None if tflops is None else tflops * 1e12
    return None


def model_flops_utilization(
    flops: float, step_seconds: float, num_devices: int, peak_flops: float | None
) -> float | None:
    """Return the share of the devices' peak that useful work reached (MFU), 0 to 1; None without a known peak.

    Args:
        flops: useful FLOPs of the global batch, see ``step_flops``.
        step_seconds: wall time of the step, waiting included.
        num_devices: devices that worked on it, of every parallel axis.
        peak_flops: ``device_peak_flops`` of one device.
    """
    if peak_flops is None:
        return None
    return flops / (step_seconds * num_devices * peak_flops)
