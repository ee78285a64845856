"""What a run does: data, batch, optimizer, parallel layout, checkpoints, logs; and the whole ``RunConfig``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from lcl_megatron.config.errors import require, require_positive
from lcl_megatron.config.model import LanguageConfig, LossConfig, PoolConfig, VisionConfig

ImageBackend = Literal["auto", "cpu", "dali", "dali_cpu"]
"""Values of ``data.image_backend``."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which corpus is read and how rows are composed from it."""

    data_path: tuple[str, ...] = ()
    """Folders of preprocessed corpora (``tools/preprocess_data.py --output``), made with one tokenizer."""
    mixture_weights: tuple[float, ...] = ()
    """Share of each corpus, in any unit; empty = in proportion to their rows, so that all end an epoch together."""
    mixture_by: Literal["images", "tokens"] = "images"
    """What the shares are shares of."""
    view: tuple[Literal["interleaved", "pairs"], ...] = ("interleaved",)
    """What a document is, for each corpus or for all: ``interleaved`` = as its source wrote it; ``pairs`` = every image
    with the sentence that it is matched to (MMC4-Pair)."""
    pair_placement: Literal["random", "text_first", "image_first"] = "random"
    """Where the image of a pair stands: ``random`` = before or after its sentence, with probability 1/2 each;
    ``text_first`` = after it, so that every pair is contrasted (CLIP: with ``--generation-loss-weight 0``);
    ``image_first`` = before it, so that none is (captioning: with ``--contrastive-loss-weight 0``)."""
    tokenizer_model: str = ""
    """SentencePiece model; empty = the copy inside the corpus. Another tokenizer than the corpora's is refused."""
    seq_length: int = 2048
    """Tokens S of a row, image latents included."""
    min_similarity: float = 0.24
    """Images whose CLIP similarity to their sentence is lower are left out (MMC4 rule of the paper)."""
    max_images_per_document: int = 6
    """At most so many images of a document."""
    too_many_images: Literal["sample", "skip"] = "sample"
    """A document with more: ``sample`` = a random choice per epoch (MMC4); ``skip`` = left out (OBELICS)."""
    layout: Literal["packed", "pad", "window"] = "packed"
    """How documents fill rows: ``packed`` = whole ones, best fit; ``pad`` = one per row (MMC4 in the paper);
    ``window`` = their concatenation is cut into rows, images whole (OBELICS in the paper)."""
    max_images_per_row: int = 0
    """Image budget of a packed row; 0 = no limit beyond the row's tokens."""
    max_images_per_micro_batch: int = 0
    """Image budget of a micro-batch, for the memory of the vision tower; 0 = no limit. A step over it is refused."""
    cache_dir: str = ""
    """Where the tables of rows of large corpora are kept; empty = ``NAME.cache`` beside each corpus."""
    context_rule: Literal["content", "index"] = "content"
    """When an image is contrasted: ``content`` = it has an earlier content token in its document; ``index`` = its
    ``<BoI>`` is not at position 0 of the document (official recipe)."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Area of the random crop, as a share of the image (OpenCLIP)."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """Aspect ratio of the random crop (OpenCLIP)."""
    max_image_pixels: int = 64_000_000
    """Images with more pixels are not decoded."""
    max_decode_megabytes: int = 350
    """Memory that a rank spends on images in the middle of decoding; an image that needs more is not decoded."""
    max_bad_image_rate: float = 0.1
    """Stop when more than this share of the last 1,000 images could not be decoded."""
    image_backend: ImageBackend = "cpu"
    """What decodes images: ``cpu``; ``dali`` = on the GPU; ``dali_cpu`` = DALI without a GPU, for comparison; ``auto``
    = ``dali`` where DALI and a GPU are present, else ``cpu``."""
    num_workers: int = 2
    """Threads per rank that decode images, beside one that composes rows; 0 = the training thread does both."""
    prefetch_factor: int = 2
    """Steps prepared ahead."""

    def __post_init__(self) -> None:
        require(self.seq_length >= 2, f"data.seq_length = {self.seq_length}; at least 2 tokens are needed")
        require_positive(self, "data", "max_images_per_document", "max_image_pixels")
        require_positive(self, "data", "max_decode_megabytes", "prefetch_factor")
        for name in ("max_images_per_row", "max_images_per_micro_batch", "num_workers"):
            value = getattr(self, name)
            require(value >= 0, f"data.{name} = {value}; it must not be negative")
        corpora = len(self.data_path)
        for name, allowed in (("mixture_weights", (0, corpora)), ("view", (1, corpora))):
            value = getattr(self, name)
            require(
                len(value) in allowed,
                f"data.{name} has {len(value)} entries for {corpora} corpora in data.data_path; give one for each",
            )
        require(
            all(0 < weight < math.inf for weight in self.mixture_weights),
            f"data.mixture_weights = {self.mixture_weights}; every weight must be positive",
        )
        require(
            self.layout != "window" or "pairs" not in self.view,
            "data.layout = 'window' cuts documents where rows end; pairs are packed whole: choose packed or pad",
        )
        require(
            self.pair_placement == "random" or "pairs" in self.view,
            f"data.pair_placement = {self.pair_placement!r} places the images of pairs, and data.view = {self.view} "
            "has none: add --view pairs, or leave --pair-placement out",
        )
        scale, ratio = self.crop_scale, self.crop_ratio
        require(
            0 < scale[0] <= scale[1] <= 1,
            f"data.crop_scale = {scale}; give the smallest and the largest share of the image, within (0, 1]",
        )
        require(
            0 < ratio[0] <= ratio[1],
            f"data.crop_ratio = {ratio}; give the smallest and the largest width / height, both positive",
        )
        require(
            0 <= self.max_bad_image_rate <= 1,
            f"data.max_bad_image_rate = {self.max_bad_image_rate} is outside [0, 1]; it is a share of images",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 3e-4
    """Peak learning rate: 3e-4 for interleaved data, 5e-4 for pairs (paper)."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    weight_decay: float = 0.1
    """Decoupled weight decay; biases, LayerNorm, LayerScale and other 1-D parameters are not decayed."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.98
    """Decay of the second moment."""
    adam_eps: float = 1e-6
    """Epsilon of Adam."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    lr_warmup_iters: int = 2000
    """Steps of linear warm-up."""
    lr_decay_iters: int = 0
    """Step at which ``min_lr`` is reached; 0 = ``train_iters``."""

    def __post_init__(self) -> None:
        require(
            0 <= self.min_lr <= self.lr and 0 < self.lr < math.inf,
            f"optimizer.lr = {self.lr}, optimizer.min_lr = {self.min_lr}; expected 0 <= min_lr <= lr, 0 < lr < inf",
        )
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} = {value} is outside [0, 1)")
        require(self.adam_eps > 0, f"optimizer.adam_eps = {self.adam_eps}; it must be positive")
        for name in ("weight_decay", "clip_grad", "lr_warmup_iters", "lr_decay_iters"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"optimizer.{name} = {value}; it must be finite and not negative")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model is spread over processes. What is left of the world size is data parallel."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the line of layers."""
    virtual_pipeline_model_parallel_size: int = 1
    """Stages on each pipeline rank (interleaved 1F1B): the line is cut into this many times as many, and stage i is on
    rank i modulo ``pipeline_model_parallel_size``. Ranks idle less at both ends of a step, and send more. Above 1, each
    data-parallel rank's micro-batches must be a multiple of ``pipeline_model_parallel_size``."""
    context_parallel_size: int = 1
    """Ranks that share the positions, and the images, of each micro-batch: for rows too long for the memory of one
    device. Twice this must divide ``data.seq_length``."""
    sequence_parallel: bool = False
    """Split activations between matrix products over the tensor-parallel ranks."""
    pipeline_cuts: tuple[str, ...] = ()
    """First piece of each stage but the first, e.g. ``vision.6 language.3``; empty = balanced by FLOPs. Pieces:
    ``vision.I``, ``pool``, ``language.embed``, ``language.I``, ``heads``."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = True
    """Reduce gradients while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass goes on."""
    distributed_timeout_minutes: float = 10.0
    """A collective that takes longer ends the run."""

    def __post_init__(self) -> None:
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        require_positive(self, "parallel", *sizes, "virtual_pipeline_model_parallel_size")
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "parallel.sequence_parallel is on with parallel.tensor_model_parallel_size = 1; "
            "it splits activations over tensor-parallel ranks: set a size > 1 or --no-sequence-parallel",
        )
        require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "parallel.overlap_param_gather is on; it needs parallel.use_distributed_optimizer and "
            "parallel.overlap_grad_reduce: switch both on, or --no-overlap-param-gather",
        )
        require(
            self.distributed_timeout_minutes > 0,
            f"parallel.distributed_timeout_minutes = {self.distributed_timeout_minutes}; it must be positive",
        )
        require(
            self.virtual_pipeline_model_parallel_size == 1 or self.pipeline_model_parallel_size > 1,
            f"parallel.virtual_pipeline_model_parallel_size = {self.virtual_pipeline_model_parallel_size} with "
            "parallel.pipeline_model_parallel_size = 1; stages are dealt out to the ranks of a pipeline in turn: set "
            "--pipeline-model-parallel-size to 2 or more, or --virtual-pipeline-model-parallel-size 1",
        )
        cuts, stages = len(self.pipeline_cuts), self.num_stages
        require(
            cuts in (0, stages - 1),
            f"parallel.pipeline_cuts names {cuts} cuts; {stages} stages need {stages - 1} (or none, to balance)",
        )

    @property
    def num_stages(self) -> int:
        """Stages that the line of layers is cut into."""
        return self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch, precision, seed."""

    train_iters: int = 250_000
    """Optimizer steps of the whole run."""
    global_batch_size: int = 2048
    """Rows of one optimizer step, over all data-parallel ranks and micro-batches."""
    micro_batch_size: int = 8
    """Rows of one forward pass on one data-parallel rank."""
    seed: int = 1234
    """Seed of weights, data order, crops and drop-path."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Parameter and activation dtype; losses and optimizer state are float32 in either case."""
    transformer_impl: Literal["auto", "torch", "transformer_engine"] = "auto"
    """Layer backend; ``auto`` = TransformerEngine where it and a GPU are present, else torch."""

    def __post_init__(self) -> None:
        require_positive(self, "training", "train_iters", "global_batch_size", "micro_batch_size")
        require(self.seed >= 0, f"training.seed = {self.seed}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where checkpoints are written and read."""

    save: str = ""
    """Folder for checkpoints, one ``step-NNNNNNNN`` folder each; empty = none is written."""
    load: str = ""
    """Folder of checkpoints to start from (the newest complete one) while ``save`` holds none."""
    init_weights: str = ""
    """Folder of weights (``tools/convert_checkpoint.py import``) that a new run starts from; what it lacks, such as all
    but the vision tower, keeps its random start. A run that continues from a checkpoint ignores it."""
    save_interval: int = 1000
    """Steps between checkpoints; one is also written at the end."""
    async_save: bool = True
    """A process beside each rank writes checkpoints while training goes on, which waits only for the copy to host
    memory (and for an earlier checkpoint that is not finished yet). Off = training waits until it is on disk."""
    keep_last: int = 0
    """Keep only so many of the newest checkpoints in ``save``, at least 2; 0 = all."""
    keep_every: int = 0
    """Keep for good those whose step is a multiple of this, whatever ``keep_last`` says; 0 = none."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """When a checkpoint cannot be written (disk full, no permission): ``continue`` = say so, train on and try again
    after the next interval; ``stop`` = end the run. The one before stays whole either way, and a run whose last
    checkpoint failed ends with an error."""
    save_timeout_minutes: float = 30.0
    """A checkpoint that is not written within this time has failed."""
    verify_checkpoint: bool = True
    """Before a checkpoint is loaded, read all its files, a share on each rank, and compare them with its manifest."""
    allow_data_change: bool = False
    """Continue a checkpoint on other data, or with another seed or composition of rows: weights, optimizer and step go
    on, the new data begin with their first row. Without it such a run is refused."""

    def __post_init__(self) -> None:
        require_positive(self, "checkpoint", "save_interval")
        for name in ("keep_last", "keep_every"):
            value = getattr(self, name)
            require(value >= 0, f"checkpoint.{name} = {value}; it must not be negative")
        require(
            self.keep_last != 1,
            "checkpoint.keep_last = 1; with a single checkpoint, one damaged file would lose the run: keep 2 or more",
        )
        require(
            self.save_timeout_minutes > 0,
            f"checkpoint.save_timeout_minutes = {self.save_timeout_minutes}; it must be positive",
        )


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What watches a run: numbers that go wrong, ranks that hang, are slow or differ, and what was read."""

    max_skipped_steps: int = 10
    """A step whose loss or gradient is not finite on any rank changes no weight on any rank. At most so many in a row
    are skipped; one more ends the run. 0 = the first ends it."""
    spike_threshold: float = 0.0
    """Also skip a step whose gradient norm is more than so many median absolute deviations above the median of the last
    ``spike_window`` steps that were taken; 0 = never. 20 is far beyond what a healthy run shows."""
    spike_window: int = 128
    """Steps that a gradient norm is compared with; skipped ones are not among them. Nothing is a spike before half of
    them are there."""
    compare_replicas_interval: int = 0
    """Steps between comparisons of the weights' hashes over data-parallel ranks, which must be equal: a difference is
    silent data corruption and ends the run, naming the rank; 0 = never."""
    hang_minutes: float = 5.0
    """When a rank gets no further for so long, it writes which ranks are behind, and the stacks of its threads to
    ``hangs/rank-NNNNN.txt`` in the log folder; 0 = nothing is watched, as under a debugger. A collective ends after
    ``parallel.distributed_timeout_minutes``, and with it the run; what hangs elsewhere for a tenth longer ends too."""
    straggler_ratio: float = 1.5
    """At each report, name ranks whose own work (waiting for data, forward passes) takes so many times that of the
    median rank of their pipeline stage; 0 = never."""
    ledger_dir: str = ""
    """Folder for the ledger: each data-parallel rank records which rows it trained on at every step, and
    ``tools/check_ledger.py`` proves that none was lost or repeated; empty = none is kept."""

    def __post_init__(self) -> None:
        for name in ("max_skipped_steps", "spike_threshold", "compare_replicas_interval", "hang_minutes"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"guard.{name} = {value}; it must be finite and not negative")
        require(self.spike_window >= 8, f"guard.spike_window = {self.spike_window}; a median needs at least 8 steps")
        require(
            self.straggler_ratio == 0 or 1 < self.straggler_ratio < math.inf,
            f"guard.straggler_ratio = {self.straggler_ratio}; give 0, or more than 1 times the median",
        )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported, how often, and where."""

    log_interval: int = 10
    """Steps between reports."""
    log_dir: str = ""
    """Folder for ``metrics.jsonl``, ``tensorboard/`` and ``curves.html``; empty = console only."""
    exit_interval: int = 0
    """Stop (with a checkpoint) when the step is a multiple of this; 0 = never. For jobs with a time limit and tests."""

    def __post_init__(self) -> None:
        require_positive(self, "logging", "log_interval")
        require(self.exit_interval >= 0, f"logging.exit_interval = {self.exit_interval}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run. Built once, checked once, never changed."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    """Vision tower."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    """Attention pool."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    """Language model."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Losses."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus and rows."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length, batch, precision."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Watching over the run."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Reports."""
