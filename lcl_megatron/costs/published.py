"""The time model beside published weak-scaling runs of other models: ``python -m lcl_megatron.costs.published``.

Nothing is fitted to them. They are plain data-parallel runs of transformers, so that the same layers, network and
overlap rules apply; what a publication does not say is assumed, and said in ``docs/planning.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

from lcl_megatron.costs.assumptions import Assumptions
from lcl_megatron.costs.devices import find_device
from lcl_megatron.costs.network import Network
from lcl_megatron.costs.traffic import Ranks, Transfer
from lcl_megatron.costs.work import LOGIT_PASS_BYTES, Tower, Work, at_full_rate

GRADIENT_BYTES, PARAMETER_BYTES, STATE_BYTES, ACCUMULATED_BYTES = 4, 2, 42, 12


@dataclass(frozen=True)
class Layers:
    """A tower of a published model, and what one GPU feeds it per step."""

    number: int
    """Layers."""
    width: int
    """Of the residual stream."""
    ffn_width: int
    """Of the MLP's hidden layer."""
    length: int
    """Tokens of a sequence."""
    is_causal: bool = False
    """Language."""


@dataclass(frozen=True)
class PublishedRun:
    """A published run on several numbers of GPUs."""

    name: str
    """Model and source."""
    device: str
    """GPU of the table."""
    towers: tuple[Layers, ...]
    """The model."""
    parameters: float
    """Parameters, all of which are synchronised."""
    sequences: int
    """Sequences of a GPU in one step."""
    vocabulary: int
    """Ids that every token of the last tower is projected on; 0 = none."""
    per_gpu: dict[int, float]
    """Published sequences per second and GPU, by number of GPUs."""
    buckets: int
    """Parts in which gradients are reduced behind the backward pass; 1 = nothing hides."""

    def seconds(self, gpus: int, assumed: Assumptions) -> float:
        """Return the predicted time of a step."""
        device = find_device(self.device)
        work = Work()
        for tower in self.towers:
            tokens = self.sequences * tower.length
            layer = Tower(tower.width, tower.ffn_width)
            one = layer.layer(tokens, tokens * tower.length, tower.is_causal, assumed)
            work += one.times(tower.number)
        if self.vocabulary:
            logits = self.sequences * self.towers[-1].length * self.vocabulary
            flops = 2 * logits * self.towers[-1].width
            work += Work(at_full_rate(flops, self.towers[-1].width, assumed), 0, LOGIT_PASS_BYTES * logits)
        forward, backward = work.seconds(device, assumed), work.times(2).seconds(device, assumed)
        size = int(self.parameters / self.buckets)
        network = Network(device, assumed, Ranks(1, 1, gpus))
        reduced = network.seconds(Transfer("dp", "reduce_scatter", "gradients", self.buckets, size * GRADIENT_BYTES))
        gathered = network.seconds(Transfer("dp", "all_gather", "parameters", self.buckets, size * PARAMETER_BYTES))
        early = 1 - 1 / self.buckets
        exposed = reduced - min(early * reduced, assumed.overlap_share * backward)
        exposed += gathered - min(early * gathered, assumed.overlap_share * forward)
        moved = self.parameters * (STATE_BYTES / gpus + GRADIENT_BYTES + ACCUMULATED_BYTES)
        update = moved / (device.memory_tb_s * 1e12 * assumed.memory_share) + assumed.fixed_ms * 1e-3
        return forward + backward + exposed + update


_MPT = (Layers(24, 2048, 8192, 2048, is_causal=True),)
_CLIP = (Layers(40, 1408, 6144, 257), Layers(24, 1024, 4096, 77, is_causal=True))
_NEMO_H100 = {8: 935 / 8, 16: 1795 / 16, 32: 3502 / 32, 64: 6771 / 64, 128: 13829 / 128}
_NEMO_A100 = {8: 559 / 8, 16: 1115 / 16, 32: 2190 / 32, 64: 4407 / 64, 128: 8633 / 128}
_MOSAIC = {8: 45455 / 2048, 128: 44123 / 2048, 256: 42555 / 2048, 512: 39837 / 2048}
RUNS = (
    PublishedRun("MPT-1B, 12 x 2,048 tokens, overlapped", "H100", _MPT, 1.316e9, 12, 50_368, _MOSAIC, 24),
    PublishedRun("NeMo CLIP g/14, 64 images, overlapped", "H100", _CLIP, 1.37e9, 64, 0, _NEMO_H100, 24),
    PublishedRun("NeMo CLIP g/14, 64 images, nothing hidden", "H100", _CLIP, 1.37e9, 64, 0, _NEMO_H100, 1),
    PublishedRun("NeMo CLIP g/14, 64 images, overlapped", "A100-80G", _CLIP, 1.37e9, 64, 0, _NEMO_A100, 24),
    PublishedRun("NeMo CLIP g/14, 64 images, nothing hidden", "A100-80G", _CLIP, 1.37e9, 64, 0, _NEMO_A100, 1),
)
"""Sources: mosaicml/llm-foundry, scripts/train/benchmarking/README.md; NeMo framework user guide, CLIP performance."""


def comparison(assumed: Assumptions) -> str:
    """Return a Markdown table of published and predicted throughput and efficiency."""
    lines = [
        "| run | GPU | GPUs | sequences/s per GPU | predicted | efficiency, % | predicted |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for run in RUNS:
        first = min(run.per_gpu)
        base = run.seconds(first, assumed)
        for gpus, published in run.per_gpu.items():
            seconds = run.seconds(gpus, assumed)
            lines.append(
                f"| {run.name} | {run.device} | {gpus} | {published:.1f} | {run.sequences / seconds:.1f} | "
                f"{100 * published / run.per_gpu[first]:.1f} | {100 * base / seconds:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(comparison(Assumptions()))  # noqa: T201
