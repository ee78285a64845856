"""How long a training step takes: stages, pipeline, what communication is seen, what hides behind computation.

One micro-batch on stage i takes F_i forward and B_i backward, recomputation included, with the tensor- and
context-parallel collectives, the transfers between stages and, on the last stage, the contrast, all of which are waited
for. With m micro-batches the pipeline
takes

    sum_i (F_i + B_i) + (m - 1) max_i (F_i + B_i)

``global`` scope with m > 1 begins with the forward pass of all micro-batches: the same sum over forward times, without
token losses (not where graphs are kept). Gradients are reduced behind the last micro-batch's backward pass, bucket by
bucket: of n buckets the last one never hides, and later stages have the time in which earlier ones still work. Updated
parameters are gathered behind the next forward pass if ``overlap_param_gather`` is on. Data are assumed to be there,
and ranks to have equal work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lcl_megatron.config import RunConfig
from lcl_megatron.costs.assumptions import Assumptions
from lcl_megatron.costs.buffers import FLOAT32_BYTES, GRADIENT_BYTES
from lcl_megatron.costs.counts import MicroBatchCounts, RowMeans, StepCounts
from lcl_megatron.costs.devices import Device
from lcl_megatron.costs.memory import RankMemory, rank_memory
from lcl_megatron.costs.network import Network
from lcl_megatron.costs.traffic import Ranks, StepTraffic, Transfer
from lcl_megatron.costs.work import stage_work

ACCUMULATED_BYTES = 8
"""Bytes that adding a micro-batch's gradient to the float32 buffer moves per parameter, beside the gradient itself,
which is written and read."""
UPDATED_BYTES = 40
"""Bytes that norm, clipping and Adam move per parameter that a rank owns, beside the updated parameter."""
CONTRAST_FLOPS = 12
"""Operations per own slot, slot of all ranks and feature: two products forward, four backward."""


@dataclass(frozen=True)
class Scenario:
    """What is trained on what."""

    config: RunConfig
    """The run; layout and micro-batch size are what a plan chooses."""
    means: RowMeans
    """What a row holds."""
    device: Device
    """GPU."""
    assumptions: Assumptions
    """Rates."""


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro-batch on one stage."""

    forward: float
    """Forward pass, collectives included."""
    backward: float
    """Backward pass, collectives and accumulation of gradients included."""
    features: float
    """Forward pass for features alone."""
    communication: float
    """Part of forward and backward pass that waits for other ranks."""

    @property
    def both(self) -> float:
        """Forward and backward pass."""
        return self.forward + self.backward


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what is waited for."""

    compute: float
    """Computation of the busiest stage, gradient accumulation included."""
    bubble: float
    """Idle in the pipeline's beginning and end, and behind slower stages."""
    second_forward: float
    """Forward pass for features, of ``global`` scope."""
    model_communication: float
    """Tensor- and context-parallel collectives and transfers between stages of the busiest stage."""
    contrast: float
    """Gathers of features and the similarity matrix."""
    gradients: float
    """Reduction of gradients that nothing hides."""
    parameters: float
    """Gathering of parameters that nothing hides."""
    optimizer: float
    """Norm, clipping, Adam, zeroing of gradients, fixed costs."""
    agreement: float
    """Agreement of all ranks on the host."""

    @property
    def total(self) -> float:
        """The step."""
        return sum(vars(self).values())

    @property
    def exposed(self) -> float:
        """What is waited for between ranks."""
        return self.model_communication + self.gradients + self.parameters + self.agreement


@dataclass(frozen=True)
class StepEstimate:
    """One layout's step."""

    ranks: Ranks
    """Sizes of the groups."""
    counts: StepCounts
    """What a rank's micro-batches hold."""
    time: StepTime
    """Seconds."""
    memory: tuple[RankMemory, ...]
    """Of a rank of each stage."""
    traffic: tuple[tuple[Transfer, ...], ...]
    """Of a rank of each stage, in one step."""

    def sent_bytes(self) -> float:
        """Return what the busiest rank sends in a step over NVLink and network."""
        return max(
            sum(t.wire_bytes(self.ranks.size(t.group)) for t in transfers if t.group != "host")
            for transfers in self.traffic
        )


def estimate_step(scenario: Scenario, world_size: int) -> StepEstimate:
    """Return memory, traffic and time of a step in the layout that the scenario's configuration names."""
    config = scenario.config
    ranks = Ranks.of(config, world_size)
    counts = StepCounts.of_means(config, scenario.means, ranks.dp)
    stages = [StepTraffic(config, world_size, index) for index in range(ranks.pp)]
    clock = _Clock(scenario, ranks, counts)
    return StepEstimate(
        ranks=ranks,
        counts=counts,
        time=clock.step(stages),
        memory=tuple(rank_memory(t, index, counts) for index, t in enumerate(stages)),
        traffic=tuple(traffic.step(counts) for traffic in stages),
    )


class _Clock:
    """Times the parts of a step in one layout."""

    def __init__(self, scenario: Scenario, ranks: Ranks, counts: StepCounts) -> None:
        self.scenario, self.ranks, self.counts = scenario, ranks, counts
        self.device, self.assumed = scenario.device, scenario.assumptions
        self.network = Network(self.device, self.assumed, ranks)
        self.number = len(counts.micro_batches)
        self.passes_twice = counts.passes_twice(scenario.config.loss)

    def step(self, stages: Sequence[StepTraffic]) -> StepTime:
        micro_batch = self.counts.micro_batches[0]
        times = [self._stage(traffic, micro_batch) for traffic in stages]
        busiest = max(times, key=lambda time: time.both)
        pipeline = sum(time.both for time in times) + (self.number - 1) * busiest.both
        second = 0.0
        if self.passes_twice:
            features = [time.features for time in times]
            second = sum(features) + (self.number - 1) * max(features)
        gradients, parameters = self._exposed(stages, times)
        once = [transfer for traffic in stages for transfer in traffic.once(self.counts)]
        host = self._seconds(once[-1:], lambda transfer: True)
        return StepTime(
            compute=self.number * (busiest.both - busiest.communication),
            bubble=pipeline - self.number * busiest.both,
            second_forward=second,
            model_communication=self.number * busiest.communication,
            contrast=self._contrast(stages[-1]),
            gradients=gradients,
            parameters=parameters,
            optimizer=max(self._update(traffic) for traffic in stages) + self._norm(once),
            agreement=host,
        )

    def _stage(self, traffic: StepTraffic, counts: MicroBatchCounts) -> StageTime:
        scenario = self.scenario
        work = stage_work(scenario.config, traffic.stage, counts, scenario.means, self.assumed)
        forward = (work.layers + work.token_losses).seconds(self.device, self.assumed)
        backward = (work.layers + work.token_losses).times(2).seconds(self.device, self.assumed)
        backward += work.recomputed.seconds(self.device, self.assumed)
        moved = traffic.micro_batch(counts)
        ahead, back = self._seconds(moved, lambda t: not t.backward), self._seconds(moved, lambda t: t.backward)
        # A gradient is written by the product, read, and added to the buffer, which is read and written.
        numel = sum(parameter.numel for parameter in traffic.parameters)
        backward += self._moving(numel * (2 * traffic.element_bytes + ACCUMULATED_BYTES))
        features = work.layers.seconds(self.device, self.assumed)
        features += self._seconds(traffic.features_pass(counts), lambda t: True)
        return StageTime(forward + ahead, backward + back, features, ahead + back)

    def _contrast(self, last: StepTraffic) -> float:
        """Gathers and products of the contrastive loss, of all micro-batches."""
        own = self.counts.contrasted_slots(self.scenario.config.loss)
        width = self.scenario.config.language.hidden_size
        flops = sum(CONTRAST_FLOPS * slots * slots * self.ranks.dp * width for slots in own)
        # Beside each product, tiles of scores pass through memory about four times.
        moved = sum(6 * 4 * FLOAT32_BYTES * slots * slots * self.ranks.dp for slots in own)
        products = flops / (self.device.fp32_tflops * 1e12 * self.assumed.float32_share)
        return products + self._moving(moved) + self._seconds(last.contrast(self.counts), lambda t: True)

    def _exposed(self, stages: Sequence[StepTraffic], times: Sequence[StageTime]) -> tuple[float, float]:
        """Gradient reduction and parameter gathering that nothing hides, on the worst stage."""
        parallel = self.scenario.config.parallel
        gradients = parameters = slack = 0.0
        for traffic, time in zip(stages, times, strict=True):
            once = traffic.once(self.counts)
            reduced = self._seconds(once, lambda t: t.purpose == "gradients" and t.group == "dp_cp")
            others = self._seconds(once, lambda t: t.purpose == "gradients" and t.group != "dp_cp")
            gathered = self._seconds(once, lambda t: t.purpose == "parameters")
            buckets = [bucket.numel for buffer in traffic.buffers for bucket in buffer.buckets]
            early = 1 - buckets[-1] / sum(buckets) if len(buckets) > 1 else 0.0
            behind = self.assumed.overlap_share
            hidden = min(early * reduced, behind * time.backward) if parallel.overlap_grad_reduce else 0.0
            gradients = max(gradients, reduced - hidden - slack + others)
            hidden = min(early * gathered, behind * time.forward) if parallel.overlap_param_gather else 0.0
            parameters = max(parameters, gathered - hidden)
            # The next stage's last backward pass ends before this one's.
            slack += time.backward
        return max(gradients, 0.0), parameters

    def _update(self, traffic: StepTraffic) -> float:
        """Optimizer step of a rank, which owns its share of each buffer."""
        is_sharded = self.scenario.config.parallel.use_distributed_optimizer
        moved = 0.0
        for buffer in traffic.buffers:
            owned = buffer.numel / (self.ranks.replicas if is_sharded else 1)
            moved += owned * (UPDATED_BYTES + buffer.element_bytes) + buffer.numel * GRADIENT_BYTES
        return self._moving(moved) + self.assumed.fixed_ms * 1e-3

    def _norm(self, once: Sequence[Transfer]) -> float:
        norms = [transfer for transfer in once if transfer.purpose == "norm"]
        return self._seconds(norms[:1], lambda transfer: True)

    def _moving(self, size: float) -> float:
        return size / (self.device.memory_tb_s * 1e12 * self.assumed.memory_share)

    def _seconds(self, transfers: Sequence[Transfer], chosen: Callable[[Transfer], bool]) -> float:
        """Time of the chosen transfers between more than one rank."""
        real = [t for t in transfers if chosen(t) and self.ranks.size(t.group) > 1]
        return sum(self.network.seconds(transfer) for transfer in real)
