"""From a configuration to a run: everything that can fail is built and checked before the first step."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from lcl_megatron.checkpoint import native
from lcl_megatron.checkpoint.folders import CONFIG_FILE, is_checkpoint
from lcl_megatron.checkpoint.initial_weights import load_initial_weights
from lcl_megatron.checkpoint.lease import Lease, LeaseError
from lcl_megatron.checkpoint.saver import SaveError, Saver, remove_remains
from lcl_megatron.config import ConfigError, RunConfig
from lcl_megatron.config.sources import describe
from lcl_megatron.config.toml import to_toml
from lcl_megatron.config.validate import data_parallel_size, validate
from lcl_megatron.data.loader import StepLoader
from lcl_megatron.data.planning.plan import Plan
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.model.initialization import count_parameters
from lcl_megatron.parallel import engine as engines
from lcl_megatron.parallel.groups import ProcessGroups
from lcl_megatron.training.guard import Guard
from lcl_megatron.training.ledger import open_ledger
from lcl_megatron.training.metrics_logger import MetricsLogger
from lcl_megatron.training.optimizer import build_optimizer, build_scheduler
from lcl_megatron.training.resume import checkpoint_to_resume, resume
from lcl_megatron.training.run import Run
from lcl_megatron.training.stop import StopSignal
from lcl_megatron.training.watchdog import Watchdog, watch

logger = logging.getLogger(__name__)


@contextmanager
def run_from(config: RunConfig, stop: StopSignal | None = None) -> Iterator[Run]:
    """Build a run, new or continued, on all ranks; leave the process groups at the end.

    Args:
        config: what is trained.
        stop: what listens for signals already; None = it begins to listen here. Closed at the end.

    Raises:
        ConfigError, CorpusError, CheckpointError: the run cannot work as configured; rank 0's message says why.
        CollectiveError: another rank is late or gone.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    stop = stop or StopSignal()
    _configure_logging(int(os.environ.get("RANK", "0")))
    validate(config, world_size)
    corpora = open_corpora(config)
    config = with_vocabulary(config, corpora)
    validate(config, world_size)
    plan = build_plan(config, corpora, data_parallel_size(config, world_size))
    groups = engines.start(config)
    try:
        groups.require_agreement("the configuration", to_toml(config))
        groups.require_agreement("the data", plan.fingerprint)
        attempt = groups.shared_nonce()
        with watch(config, groups) as watchdog, stop, _hold_folder(config, groups, attempt) as lease:
            # Explained before ``stop`` gives SIGTERM back: a launcher sends it as soon as one rank dies, and what the
            # others say takes some seconds.
            with closing(_build(config, plan, groups, stop, attempt, lease, watchdog)) as run, watchdog.explained():
                yield run
    finally:
        groups.destroy()


def open_corpora(config: RunConfig) -> tuple[Corpus, ...]:
    """Open the corpora and check them against their tokenizer."""
    if not config.data.data_path:
        raise ConfigError("data.data_path is empty; give the folders that tools/preprocess_data.py wrote: --data-path")
    return tuple(Corpus.open(path, config.data.tokenizer_model) for path in config.data.data_path)


def with_vocabulary(config: RunConfig, corpora: Sequence[Corpus]) -> RunConfig:
    """Return the configuration with the corpora's vocabulary size filled in.

    Raises:
        ConfigError: ids of the corpus do not fit the model's vocabulary; megatron-core would turn them into silent
            wrong numbers.
    """
    size = config.language.vocab_size
    for corpus in corpora:
        if size and size < corpus.vocab_size:
            raise ConfigError(
                f"language.vocab_size = {size} is smaller than the corpus's vocabulary of {corpus.vocab_size} ids "
                f"({corpus.path}); leave it at 0 or raise it"
            )
    if size:
        return config
    language = dataclasses.replace(config.language, vocab_size=corpora[0].vocab_size)
    return dataclasses.replace(config, language=language)


def build_plan(config: RunConfig, corpora: Sequence[Corpus], dp_size: int) -> Plan:
    """Return the data order of a run."""
    training = config.training
    return Plan(
        corpora,
        config.data,
        config.vision.num_patches,
        training.global_batch_size,
        training.micro_batch_size,
        dp_size,
        training.seed,
    )


@contextmanager
def _hold_folder(config: RunConfig, groups: ProcessGroups, attempt: str) -> Iterator[Lease | None]:
    """Hold the lease of the folder of checkpoints, on rank 0, and remove what killed runs left there.

    Collective over all ranks, on the host.

    Raises:
        LeaseError: another run writes into it; on all ranks.
        SaveError: it cannot be written, or is a checkpoint itself; on all ranks.
    """
    lease, held_by, failure = None, "", ""
    root = Path(config.checkpoint.save)
    if config.checkpoint.save and groups.rank == 0:
        try:
            # A run there would never find what it saves: it would go on from this one for ever.
            if is_checkpoint(root):
                raise OSError(f"it is a checkpoint, by its name or its {CONFIG_FILE}; give the folder that holds it")
            lease = Lease(root, attempt)
            remove_remains(root)
        except LeaseError as error:
            held_by = str(error)
        except OSError as error:
            failure = f"--save {root} cannot be written: {error}"
    try:
        if held_by := groups.first_rank_text(held_by):
            raise LeaseError(held_by)
        if failure := groups.first_rank_text(failure):
            raise SaveError(failure)
        yield lease
    finally:
        if lease is not None:
            lease.close()


def _build(
    config: RunConfig,
    plan: Plan,
    groups: ProcessGroups,
    stop: StopSignal,
    attempt: str,
    lease: Lease | None,
    watchdog: Watchdog,
) -> Run:
    """Build what a run consists of, and load the checkpoint that it goes on from; collective over all ranks."""
    watchdog.mark("load")
    if groups.rank == 0:
        stop.watch_stop_file(config.checkpoint.save)
        logger.info("configuration\n%s", describe(config))
        _log_data(plan)
    checkpoint = checkpoint_to_resume(config.checkpoint, groups)
    engine = engines.build_engine(config, groups)
    watchdog.follow(lambda: engine.work.stretches)
    logger.debug("%s holds %s", groups.describe(), " | ".join(", ".join(stage.pieces) for stage in engine.stages))
    if config.checkpoint.init_weights and checkpoint is None:
        # Before the optimizer, whose float32 values begin as the weights.
        load_initial_weights(config.checkpoint.init_weights, engine, plan.sequence.sources[0].corpus.tokenizer.model)
    optimizer = build_optimizer(engine)
    guard = Guard(config.guard)
    trainable = native.Trainable(engine, optimizer, build_scheduler(config, optimizer), guard)
    progress = resume(config, plan, trainable, checkpoint)
    if groups.rank == 0:
        _log_layout(engine, progress.step)
    stop.begin()
    return Run(
        config=config,
        trainable=trainable,
        plan=plan,
        loader=StepLoader(
            plan,
            groups.dp_rank,
            config.vision.image_size,
            with_images=engine.reads_pixels,
            start_step=progress.step,
            consumed_rows=progress.consumed_rows,
            end_step=config.training.train_iters,
        ),
        logger=MetricsLogger(
            Path(config.logging.log_dir) if config.logging.log_dir else None,
            config.training.train_iters,
            is_writer=groups.rank == 0,
            resume_step=progress.step,
        ),
        guard=guard,
        stop=stop,
        watchdog=watchdog,
        progress=progress,
        saver=Saver(config.checkpoint, groups, attempt, lease) if config.checkpoint.save else None,
        ledger=open_ledger(config, groups, progress, plan.fingerprint, attempt),
    )


def _log_layout(engine: engines.Engine, step: int) -> None:
    """Say how the model is spread, and at which step the run stands."""
    groups = engine.groups
    logger.info(
        "world size %d: tensor %d x pipeline %d%s x context %d x data %d; %.2f M parameters on this rank; "
        "step %d of %d",
        groups.world_size,
        groups.tp_size,
        groups.pp_size,
        f" ({len(engine.chunks)} stages on each rank)" if len(engine.chunks) > 1 else "",
        groups.cp_size,
        groups.dp_size,
        sum(map(count_parameters, engine.models)) / 1e6,
        step,
        engine.config.training.train_iters,
    )


def _log_data(plan: Plan) -> None:
    """Say what is read: rows of each corpus, what is left out, and shares."""
    for source, share in zip(plan.sequence.sources, plan.sequence.row_shares, strict=True):
        images, tokens = source.means
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in source.left_out.items() if number)
        logger.info(
            "%s: %d documents, %d images: %s rows an epoch, %.2f images and %.0f of %d tokens a row, %.1f%% of rows%s",
            source.corpus.path,
            source.corpus.num_documents,
            source.corpus.num_images,
            f"{source.num_rows:,}",
            images,
            tokens,
            plan.sequence.config.seq_length,
            100 * share,
            f"; left out: {left_out}" if left_out else "",
        )


def _configure_logging(rank: int) -> None:
    """Send messages to standard error: rank 0 from INFO on, the others warnings only, with their rank in front."""
    logging.basicConfig(
        stream=sys.stderr,
        format=f"[rank {rank}] %(message)s" if rank else "%(message)s",
        level=logging.WARNING,
    )
    logging.getLogger("lcl_megatron").setLevel(logging.INFO if rank == 0 else logging.WARNING)
