"""The process groups of a run: who shares a layer (tp), a line of layers (pp), a row (cp), and who holds a copy (dp).

``initialize`` is the first thing a training process calls. It turns the layout of ``ParallelConfig`` into
megatron-core's process groups, and works the same under ``torchrun``, in a test and in a lone process.
Ranks are numbered tp fastest, then cp, then dp, then pp, which is megatron-core's order.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from lcl_megatron.config.errors import ConfigError, require
from lcl_megatron.parallel import cpu_host

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

    from lcl_megatron.config import ParallelConfig

logger = logging.getLogger(__name__)

EmbeddingRanks = Callable[[list[int]], list[int]]
"""Takes the global ranks of one pipeline, first stage first; returns those that hold the token embedding."""


@dataclass(frozen=True)
class ProcessGroups:
    """This process's place in the layout, and the groups it belongs to."""

    rank: int
    """Global rank of this process."""
    world_size: int
    """Number of processes."""
    tp: ProcessGroup
    """Ranks that share every layer's matrices with this one."""
    pp: ProcessGroup
    """Ranks that share the line of layers with this one, first stage first."""
    cp: ProcessGroup
    """Ranks that share a row's positions with this one."""
    dp: ProcessGroup
    """Ranks that hold the same part of the model and read other rows."""
    host: ProcessGroup
    """All ranks, over gloo: for small facts on the host, without waiting for the device."""
    collection: ProcessGroupCollection
    """The same groups, and those derived from them, for megatron-core's layers, DDP, optimizer and schedule."""
    owns_default_group: bool
    """Whether ``initialize`` started ``torch.distributed``, so that ``destroy`` ends it."""

    @property
    def tp_rank(self) -> int:
        """Tensor-parallel rank."""
        return self.tp.rank()

    @property
    def tp_size(self) -> int:
        """Tensor-parallel size."""
        return self.tp.size()

    @property
    def pp_rank(self) -> int:
        """Place of this process in the pipeline, from 0."""
        return self.pp.rank()

    @property
    def pp_size(self) -> int:
        """Ranks of the pipeline."""
        return self.pp.size()

    @property
    def cp_rank(self) -> int:
        """Context-parallel rank."""
        return self.cp.rank()

    @property
    def cp_size(self) -> int:
        """Context-parallel size."""
        return self.cp.size()

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank: which rows of the global batch are this process's."""
        return self.dp.rank()

    @property
    def dp_size(self) -> int:
        """Data-parallel size."""
        return self.dp.size()

    def place(self, rank: int) -> dict[str, int]:
        """Return the coordinates of a global rank, by the names ``tp``, ``cp``, ``dp`` and ``pp``."""
        coordinates = {}
        for name, size in (("tp", self.tp_size), ("cp", self.cp_size), ("dp", self.dp_size), ("pp", self.pp_size)):
            rank, coordinates[name] = divmod(rank, size)
        return coordinates

    def describe(self, rank: int | None = None) -> str:
        """Return rank and coordinates, e.g. ``rank 5 (dp1 pp0 tp1)``: the prefix of every distributed error.

        Under context parallelism its rank is named too: ``rank 5 (dp1 pp0 cp0 tp1)``.

        Args:
            rank: a global rank; None = this process.
        """
        rank = self.rank if rank is None else rank
        place = self.place(rank)
        context = f"cp{place['cp']} " if self.cp_size > 1 else ""
        return f"rank {rank} (dp{place['dp']} pp{place['pp']} {context}tp{place['tp']})"

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """Return, on every rank, which flags are true on some rank.

        Parallel: one all-reduce of bytes over all ranks, on the host.
        """
        said = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.host)
        return tuple(said.bool().tolist())

    def first_rank_text(self, text: str) -> str:
        """Return rank 0's text on every rank. Parallel: two broadcasts over all ranks, on the host."""
        content = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
        length = torch.tensor([len(text.encode())])
        dist.broadcast(length, src=0, group=self.host)
        if self.rank:
            content = torch.empty(max(1, int(length)), dtype=torch.uint8)
        dist.broadcast(content, src=0, group=self.host)
        return bytes(content[: int(length)].tolist()).decode()

    def gather_texts(self, text: str) -> list[str]:
        """Return every rank's text on every rank, by rank. Parallel: two all-gathers over all ranks, on the host."""
        own = bytearray(text.encode())
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([len(own)]), group=self.host)
        longest = max(1, *(int(length) for length in lengths))
        padded = torch.frombuffer(own + bytes(longest - len(own)), dtype=torch.uint8)
        texts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(texts, padded, group=self.host)
        return [bytes(t[: int(n)].tolist()).decode() for t, n in zip(texts, lengths, strict=True)]

    def shared_nonce(self) -> str:
        """Return 16 hex digits that no other call has returned, the same on every rank; as ``first_rank_text``."""
        return self.first_rank_text(os.urandom(8).hex())

    def require_agreement(self, what: str, value: str) -> None:
        """Check that all ranks were started alike; as ``gather_texts``.

        Args:
            what: what is compared, for the message.
            value: this rank's text.

        Raises:
            ConfigError: on every rank, naming those that differ from rank 0; without the check they would train
                something else than the others, or die of a collective of another size.
        """
        digests = self.gather_texts(hashlib.sha256(value.encode()).hexdigest())
        differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        require(
            not differing,
            f"{what} of ranks {differing} differs from that of rank 0; start every process with the same command, "
            "and give every node the same files",
        )

    def barrier(self) -> None:
        """Wait for all ranks, on the host."""
        dist.barrier(group=self.host)

    def destroy(self) -> None:
        """Leave all groups; end ``torch.distributed`` if ``initialize`` started it."""
        parallel_state.destroy_model_parallel()
        # megatron-core 0.16.1 keeps this one; a process forked later would hang when it replaces, so destroys it.
        parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None
        if self.owns_default_group:
            dist.destroy_process_group()


def initialize(parallel: ParallelConfig, embedding_ranks: EmbeddingRanks) -> ProcessGroups:
    """Start ``torch.distributed`` if it is not running, and split its ranks by the layout.

    Uses nccl and the GPU of ``LOCAL_RANK`` where there is a GPU, gloo and the CPU host otherwise. Reads the
    environment that ``torchrun`` sets (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ...); without it, the
    process is alone.

    Args:
        parallel: sizes and timeout.
        embedding_ranks: which ranks of a pipeline hold the token embedding, i.e. the language model's first and
            last stage; their embedding gradients are summed when they are tied.

    Raises:
        ConfigError: the layout does not divide the number of processes, or ``LOCAL_RANK`` has no GPU.
    """
    cpu_host.install()
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    owns_default_group = not dist.is_initialized()
    if owns_default_group:
        _check_layout(parallel, int(os.environ.get("WORLD_SIZE", "1")))
        _start(timeout)
    _check_layout(parallel, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        get_embedding_ranks=embedding_ranks,
        get_position_embedding_ranks=lambda pipeline: embedding_ranks(pipeline)[:1],
        # Only megatron-core's legacy optimizer checkpoints use them.
        create_gloo_process_groups=False,
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return ProcessGroups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp=collection.tp,
        pp=collection.pp,
        cp=collection.cp,
        dp=collection.dp,
        host=_host_group(timeout),
        collection=collection,
        owns_default_group=owns_default_group,
    )


def _check_layout(parallel: ParallelConfig, world_size: int) -> None:
    """Raise ConfigError unless one model's ranks divide the number of processes."""
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    require(
        world_size % (tp * pp * cp) == 0,
        f"{world_size} processes cannot be split into models of {tp * pp * cp} "
        f"(tensor {tp} x pipeline {pp} x context {cp}); start a multiple of {tp * pp * cp} processes or "
        "change parallel.*_parallel_size",
    )


def _host_group(timeout: timedelta) -> ProcessGroup:
    """Return a gloo group of all ranks: the default group if it is one."""
    world = dist.group.WORLD
    if world is not None and dist.get_backend(world) == "gloo":
        return world
    group: ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return group


def _start(timeout: timedelta) -> None:
    """Start ``torch.distributed`` from the launcher's environment, or alone."""
    has_gpu = torch.cuda.is_available()
    backend = "nccl" if has_gpu else "gloo"
    device = None
    if has_gpu:
        local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise ConfigError(
                f"LOCAL_RANK = {local_rank}, but this node has {num_gpus} GPUs; "
                "start at most one process per GPU (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        store, rank, world_size = _store_after_restart(timeout)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device
        )
    elif "RANK" in os.environ:
        _warn_of_restarts()
        dist.init_process_group(backend, timeout=timeout, device_id=device)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but missing from torch's annotations
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=device)


def _store_after_restart(timeout: timedelta) -> tuple[Store, int, int]:
    """Return the launcher's store, this process's rank and their number, for ranks that torchrun has started again.

    The agents of torch 2.13 share one store with their ranks and keep it over restarts, addresses of dead ranks
    included, which the next ranks would call: so these get keys of their own. Their number tells attempts apart on one
    node; agents of several nodes count differently, and there the store must not be shared (``_warn_of_restarts``).
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    if _shares_store() and os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store, rank, world_size


def _shares_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _warn_of_restarts() -> None:
    """Say on rank 0 if the restarts that torchrun was asked for could not work."""
    restarts, nodes = (int(os.environ.get(n, "0")) for n in ("TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE"))
    if restarts and nodes > 1 and _shares_store() and os.environ["RANK"] == "0":
        logger.warning(
            "torchrun --max-restarts %d on %d nodes: ranks that are started again would find the addresses of the "
            "dead ones; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started",
            restarts,
            nodes,
        )
