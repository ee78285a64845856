"""The one training loop of all transfer tasks: AdamW, warm-up and cosine, in an order that seed and step decide.

A task gives a module and a function from examples to a sum of losses. What a step computes does not depend on the
number of ranks or on the micro-batch size, but for rounding and for drop-path, whose masks each rank draws itself.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lcl_megatron.config.errors import require
from lcl_megatron.data.order import keyed_hash, permute
from lcl_megatron.evaluation.transfer.streams import TransferStream
from lcl_megatron.parallel.replicas import Replicas


class DivergenceError(ValueError):
    """The loss is not finite any more."""


class NothingToLearnError(ValueError):
    """All examples of a step are left out."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How the trainable parameters of a task are fitted; the defaults are what Tab. 8 has for all tasks, or torch's."""

    steps: int
    """Optimizer steps."""
    batch_size: int
    """Examples per step, over all ranks."""
    lr: float
    """Peak learning rate of parameters that start from random values."""
    pretrained_lr: float | None = None
    """Peak learning rate of parameters that start from pre-trained values; none = ``lr``."""
    weight_decay: float = 1e-4
    """Decoupled weight decay; spares parameters of one dimension (biases, norms), as in pre-training."""
    warmup_steps: int = 0
    """Steps of linear warm-up, part of ``steps``; then a cosine down to 0."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients; the paper does not say it."""
    beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients; the paper does not say it."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    grad_clip: float = 0.0
    """Largest norm of the gradient; 0 = it is not clipped."""
    micro_batch_size: int = 0
    """Examples of one rank that are in memory at the same time; 0 = all of the rank's examples of a step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16 (autocast); weights and optimizer stay in float32."""
    log_interval: int = 10
    """Steps between points of the training curve."""
    save_interval: int = 500
    """Steps between saved states, from which an interrupted fit goes on; 0 = only the last one is saved."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_interval"):
            require(getattr(self, name) >= 1, f"fit.{name} = {getattr(self, name)}; expected at least 1")
        for name in ("warmup_steps", "micro_batch_size", "save_interval", "weight_decay", "grad_clip"):
            require(getattr(self, name) >= 0, f"fit.{name} = {getattr(self, name)}; expected 0 or more")
        require(
            self.warmup_steps <= self.steps,
            f"fit.warmup_steps = {self.warmup_steps} of fit.steps = {self.steps}; warm-up is part of the steps: "
            "set fewer",
        )
        require(self.lr > 0, f"fit.lr = {self.lr}; expected more than 0")


class Draw(NamedTuple):
    """Examples that a rank computes at the same time."""

    indices: np.ndarray
    """(n,) int64, which examples of the training set."""
    keys: np.ndarray
    """(n,) int64, unique over the fit: randomness of an example that no number of ranks changes is a hash of it."""
    step: int
    """Optimizer step, from 0."""


class LossSum(NamedTuple):
    """The loss of some examples as a sum, so that parts of a batch add up exactly."""

    total: Tensor
    """() differentiable sum of losses."""
    weight: float
    """What the sum is divided by once all parts are added: examples, pairs, tokens."""


@dataclass(frozen=True)
class Curve:
    """What was logged while fitting; one entry per logged step."""

    steps: tuple[int, ...]
    """Steps, counted from 1."""
    losses: tuple[float, ...]
    """Mean loss since the entry before."""
    lrs: tuple[float, ...]
    """Learning rate of new parameters in the step."""


Loss = Callable[[Draw], LossSum]
"""The loss of some examples, with the module in training mode."""


@dataclass(frozen=True)
class PreparedLoss:
    """A loss in two parts: the first, reading and decoding, runs in a thread while the part before is computed."""

    prepare: Callable[[Draw], Any]
    """Reads what the examples need; touches neither the module nor random state."""
    compute: Callable[[Draw, Any], LossSum]
    """The loss, from the examples and what was prepared for them."""

    def __call__(self, part: Draw) -> LossSum:
        """Return the loss without a thread."""
        return self.compute(part, self.prepare(part))


def draw(num_examples: int, batch_size: int, seed: int, step: int) -> Draw:
    """Return the whole batch of a step: epochs of random order, one behind the other, without a short batch.

    Args:
        num_examples: size of the training set.
        batch_size: examples of the batch.
        seed: of the order.
        step: from 0.
    """
    keys = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, positions = np.divmod(keys, num_examples)
    return Draw(permute(positions, num_examples, keyed_hash(seed, TransferStream.EXAMPLE_ORDER, epochs)), keys, step)


def learning_rate_factor(config: FitConfig, step: int) -> float:
    """Return what the peak is multiplied by in a step, from 0: linear warm-up, then half a cosine that ends near 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / (config.steps - config.warmup_steps)))


def fit(
    module: nn.Module,
    loss: Loss,
    num_examples: int,
    config: FitConfig,
    replicas: Replicas,
    *,
    seed: int = 0,
    pretrained: Iterable[nn.Parameter] = (),
    state_file: Path | None = None,
) -> Curve:
    """Train the parameters of a module that require gradients.

    Args:
        module: on the replica's device; every rank begins with the first rank's weights.
        loss: of some of the ``num_examples`` examples; calls ``module``. A ``PreparedLoss`` reads ahead.
        num_examples: size of the training set.
        config: how.
        replicas: the ranks that share each batch.
        seed: of the order of examples.
        pretrained: those of the module's parameters that start from pre-trained values.
        state_file: where the state is saved every ``save_interval`` steps and at the end, and found again; a fit
            that has ended is not repeated. None = nothing is saved.

    Returns:
        The training curve, the same on every rank.

    Raises:
        DivergenceError: the loss is not finite, or the last step's gradient was not.
        NothingToLearnError: the weight of a whole step's examples is 0.
        ConfigError: the batch cannot be shared evenly, or nothing can be trained.
        OSError: the saved state is damaged or belongs to another fit.

    Parallel: gradients are summed over all ranks in every step.
    """
    run = _Fit(module, loss, num_examples, config, replicas, seed, set(map(id, pretrained)))
    run.load(state_file)
    module.train()
    for step_parts in run.parts():
        run.take_step(step_parts)
        if run.step == config.steps:
            run.check_end()
        is_due = config.save_interval and run.step % config.save_interval == 0
        if state_file is not None and (is_due or run.step == config.steps):
            run.save(state_file)
    module.eval()
    return Curve(tuple(run.log.steps), tuple(run.log.losses), tuple(run.log.lrs))


@dataclass
class _Log:
    """The curve as it grows."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    pending: list[float] = field(default_factory=list)

    def add(self, step: int, loss: float, lr: float, is_point: bool) -> None:
        self.pending.append(loss)
        if is_point:
            self.steps.append(step)
            self.losses.append(sum(self.pending) / len(self.pending))
            self.lrs.append(lr)
            self.pending = []


class _Fit:
    """A fit between two steps."""

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        num_examples: int,
        config: FitConfig,
        replicas: Replicas,
        seed: int,
        pretrained: set[int],
    ) -> None:
        require(num_examples > 0, "the training set is empty")
        require(
            config.batch_size % replicas.size == 0,
            f"fit.batch_size = {config.batch_size} cannot be shared evenly by {replicas.size} processes; "
            "choose a multiple of them",
        )
        self.module, self.loss, self.config, self.replicas = module, loss, config, replicas
        self.num_examples, self.seed = num_examples, seed
        self.trained = [(name, value) for name, value in module.named_parameters() if value.requires_grad]
        require(bool(self.trained), "no parameter requires a gradient; nothing can be trained")
        replicas.copy_from_first([*module.parameters(), *module.buffers()])
        self.step, self.log = 0, _Log()
        self.optimizer = torch.optim.AdamW(
            self._groups(pretrained), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps
        )

    def _groups(self, pretrained: set[int]) -> list[dict[str, object]]:
        """Return AdamW's groups: new or pre-trained, decayed or not; empty ones are left out."""
        config = self.config
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for _, parameter in self.trained:
            is_old = id(parameter) in pretrained
            peak = config.pretrained_lr if is_old and config.pretrained_lr is not None else config.lr
            groups.setdefault((peak, config.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
        return [
            {"params": parameters, "peak": peak, "weight_decay": decay} for (peak, decay), parameters in groups.items()
        ]

    def parts(self) -> Iterator[Iterator[Callable[[], LossSum]]]:
        """Yield, for every step that is left, this rank's parts of the batch as functions that compute their losses."""
        own = self.replicas.share(self.config.batch_size)
        size = self.config.micro_batch_size or len(own)
        begins = range(own.start, own.stop, size)

        def draws() -> Iterator[Draw]:
            for step in range(self.step, self.config.steps):
                batch = draw(self.num_examples, self.config.batch_size, self.seed, step)
                for begin in begins:
                    part = slice(begin, min(begin + size, own.stop))
                    yield Draw(batch.indices[part], batch.keys[part], step)

        losses = _losses(self.loss, draws())
        for _ in range(self.step, self.config.steps):
            yield itertools.islice(losses, len(begins))

    def take_step(self, parts: Iterator[Callable[[], LossSum]]) -> None:
        """Do one optimizer step over the parts of its batch."""
        config, replicas = self.config, self.replicas
        self.optimizer.zero_grad(set_to_none=True)
        # Drop-path and dropout draw from here; a fit that goes on after an interruption draws the same.
        torch.manual_seed(int(keyed_hash(self.seed, TransferStream.DROP_MASKS, self.step, replicas.rank)) >> 1)
        sums = torch.zeros(2, dtype=torch.float64)
        for part in parts:
            with torch.autocast(replicas.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                total, weight = part()
            torch.autograd.backward(total)
            sums += torch.tensor([float(total.detach()), float(weight)], dtype=torch.float64)
        total_loss, total_weight = replicas.sum(sums).tolist()
        if total_weight == 0:
            raise NothingToLearnError(
                f"step {self.step + 1} of {config.steps} has nothing to learn from in its {config.batch_size} "
                "examples: their images are damaged or missing, or their texts were cut off; check the training data"
            )
        mean = total_loss / total_weight
        if not math.isfinite(mean):
            raise DivergenceError(
                f"the loss of step {self.step + 1} of {config.steps} is {mean}; lower fit.lr = {config.lr:g}, lengthen "
                f"fit.warmup_steps = {config.warmup_steps}, or set fit.grad_clip = 1"
            )
        parameters = [parameter for _, parameter in self.trained]
        replicas.sum_gradients(parameters, total_weight)
        if config.grad_clip:
            nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        factor = learning_rate_factor(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.step()
        self.step += 1
        is_point = self.step % config.log_interval == 0 or self.step == config.steps
        self.log.add(self.step, mean, config.lr * factor, is_point)

    def check_end(self) -> None:
        """Raise DivergenceError unless all that was trained is finite: no further loss would tell."""
        if bad := [name for name, value in self.trained if not bool(torch.isfinite(value).all())]:
            raise DivergenceError(
                f"{len(bad)} parameters are not finite after the last step, e.g. {bad[0]}; lower fit.lr = "
                f"{self.config.lr:g}, or set fit.grad_clip = 1"
            )

    @property
    def identity(self) -> str:
        """What has to be equal for a saved state to be taken up."""
        shapes = {name: list(parameter.shape) for name, parameter in self.trained}
        return json.dumps([asdict(self.config), self.num_examples, self.seed, shapes])

    def save(self, path: Path) -> None:
        """Write the state, whole or not at all."""
        if self.replicas.is_first:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.tmp")
            state = {
                "identity": self.identity,
                "step": self.step,
                "log": asdict(self.log),
                "weights": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            torch.save(state, temporary)
            os.replace(temporary, path)
        self.replicas.barrier()

    def load(self, path: Path | None) -> None:
        """Take up a saved state, if there is one."""
        if path is None or not self.replicas.from_first(path.is_file()):
            return
        try:
            state = torch.load(path, map_location=self.replicas.device, weights_only=True)
            found = state["identity"]
        except Exception as error:  # torch raises almost anything for a file that is none of its own
            what = type(error).__name__  # torch's own words advise to read it unsafely
            raise OSError(f"{path} is no saved state of a fit ({what}); delete it to begin again") from error
        if found != self.identity:
            raise OSError(f"{path} belongs to a fit with other settings; delete it or choose another output folder")
        self.module.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.log = state["step"], _Log(**state["log"])


def _losses(loss: Loss, draws: Iterator[Draw]) -> Iterator[Callable[[], LossSum]]:
    """Yield a function for each draw that returns its loss; a ``PreparedLoss`` prepares the next one meanwhile."""
    if not isinstance(loss, PreparedLoss):
        yield from (partial(loss, part) for part in draws)
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for part in draws:
            prepared = pool.submit(loss.prepare, part)
            if ahead is not None:
                yield ahead
            ahead = partial(_compute, loss, part, prepared)
        if ahead is not None:
            yield ahead


def _compute(loss: PreparedLoss, part: Draw, prepared: Future[Any]) -> LossSum:
    return loss.compute(part, prepared.result())
