"""The weights of a model, or of whole parts of one, apart from training: what exporters read and importers write.

    FOLDER/model.safetensors     parameters of ``LCLModel`` under their names, whole
    FOLDER/run.toml              the resolved configuration
    FOLDER/tokenizer.model       the corpus's tokenizer, if there is one
    FOLDER/progress.json         how far the run had come, if there was one

A training checkpoint of any layout gives the same, without megatron-core, GPU, launcher or process group, and some
parts of the model without the files of the others. Nothing that a file holds can be run: see ``reader.py``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lcl_megatron.checkpoint.durable_files import commit_folder
from lcl_megatron.checkpoint.folders import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    Progress,
    read_config,
)
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.parameters import PARTS, VALUE, optimizer_name, parameter_shapes
from lcl_megatron.checkpoint.reader import CheckpointReader, from_newest
from lcl_megatron.checkpoint.shard_file import StoredTensor
from lcl_megatron.checkpoint.tensor_files import write_tensors
from lcl_megatron.config import RunConfig
from lcl_megatron.config.toml import to_toml

WEIGHTS_FILE = "model.safetensors"
PROGRESS_FILE = "progress.json"
FUSED_NAMES = (("input_layernorm", "self_attention.linear_qkv"), ("pre_mlp_layernorm", "mlp.linear_fc1"))
"""LayerNorms that a checkpoint stores under the name of the linear layer that reads them."""


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """Every parameter of a model or of some of its parts, such as the vision tower, and what is needed to use them.

    Raises:
        CheckpointError: names or shapes are not those of the configuration's model, or values are not finite.
    """

    config: RunConfig
    """The run that made them, or a configuration whose model they fit; sections of absent parts mean nothing, and
    ``language.vocab_size`` is set if the language model is there."""
    state: dict[str, Tensor]
    """By the names of ``LCLModel`` with the ``torch`` backend (``vision.layers.0.mlp.linear_fc1.weight``); whole."""
    tokenizer: bytes | None = None
    """SentencePiece model of the corpus."""
    progress: Progress | None = None
    """How far the run had come; None = not from a run of this package."""

    def __post_init__(self) -> None:
        if not self.state:
            raise CheckpointError("there are no weights at all; expected parameters of " + ", ".join(PARTS))
        check_parameters(self.state, self.config, self.parts)
        if bad := [name for name, tensor in self.state.items() if not bool(tensor.isfinite().all())]:
            raise CheckpointError(
                f"{len(bad)} of {len(self.state)} parameters have values that are not finite, e.g. {bad[0]}: the run "
                "had diverged, or the file is damaged; take an earlier checkpoint"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the model that are there, in the order of the model; each is there as a whole."""
        return tuple(part for part in PARTS if any(name.split(".")[0] == part for name in self.state))

    def require(self, *parts: str) -> None:
        """Raise CheckpointError unless the named parts are there."""
        if missing := [part for part in parts if part not in self.parts]:
            raise CheckpointError(
                f"the weights hold {', '.join(self.parts)} only, and not {', '.join(missing)}; weights of another "
                "library's encoder have no more; take a checkpoint of a run"
            )


def check_parameters(state: Mapping[str, Tensor], config: RunConfig, parts: Collection[str] = PARTS) -> None:
    """Raise CheckpointError, naming every difference, unless names and shapes are those of the configuration's model.

    Args:
        state: tensors under the names of ``LCLModel``.
        config: decides which parameters there are.
        parts: the parts of the model that must be there, and no others.
    """
    expected = parameter_shapes(config, parts)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    differences = [
        f"{name}: {found.get(name, 'absent')}, expected {expected.get(name, 'none of this name')}"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]
    if differences:
        listed = "\n  ".join(differences[:20])
        more = f"\n  ... and {len(differences) - 20} more" if len(differences) > 20 else ""
        raise CheckpointError(
            f"the weights are not those of the configured model:\n  {listed}{more}\n"
            "compare the sections vision, pool and language of the configuration"
        )


def read_weights(path: str | Path, parts: Collection[str] = PARTS) -> ModelWeights:
    """Return the weights of a weights folder, a training checkpoint, or the newest whole one of a folder of them.

    Of a checkpoint in bfloat16, the optimizer's float32 values are returned: rounded, they are the model's.

    Args:
        path: a folder that ``write_weights`` wrote, ``step-NNNNNNNN``, or a folder that holds some.
        parts: of a training checkpoint, these parts of the model; only their files are read, and need to be there.

    Raises:
        CheckpointError: it is none of these, is damaged, or holds another model than its configuration says.
    """
    path = Path(path)
    if (path / WEIGHTS_FILE).is_file():
        return _read_folder(path)
    weights = from_newest(path, lambda checkpoint: _read_checkpoint(checkpoint, parts))
    if weights is not None:
        return weights
    raise CheckpointError(
        f"{path} is neither a folder of weights ({WEIGHTS_FILE}, {CONFIG_FILE}) nor a training checkpoint: "
        "expected a step-NNNNNNNN folder, or one that holds some"
    )


def write_weights(weights: ModelWeights, folder: str | Path) -> None:
    """Write a weights folder; it exists only when it is complete. ``read_weights`` of it gives the same bits.

    Raises:
        CheckpointError: the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} exists; weights are never written over others: name another folder")
    staging = folder.with_name(f".staging-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    state = {name: tensor.detach().contiguous() for name, tensor in weights.state.items()}
    write_tensors(state, staging / WEIGHTS_FILE)
    (staging / CONFIG_FILE).write_text(to_toml(weights.config), encoding="utf-8")
    if weights.tokenizer is not None:
        (staging / TOKENIZER_FILE).write_bytes(weights.tokenizer)
    if weights.progress is not None:
        text = json.dumps(asdict(weights.progress), indent=2, ensure_ascii=False) + "\n"
        (staging / PROGRESS_FILE).write_text(text, encoding="utf-8")
    commit_folder(staging, folder)


def _read_folder(folder: Path) -> ModelWeights:
    try:
        state = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} is damaged: {error}; export or import it again") from error
    progress = None
    if (path := folder / PROGRESS_FILE).is_file():
        try:
            progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} does not hold the progress of a run: {error}") from error
    return _weights(folder, read_config(folder), state, progress)


def _read_checkpoint(checkpoint: Path, parts: Collection[str]) -> ModelWeights:
    reader = CheckpointReader(checkpoint)
    progress = reader.progress()
    config = read_config(checkpoint)
    stored = reader.tensors
    names = {name: _stored_name(name, stored) for name in parameter_shapes(config, parts)}
    tensors = reader.read(name for name in names.values() if name in stored)
    state = {name: tensors[source] for name, source in names.items() if source in tensors}
    weights = _weights(checkpoint, config, state, progress)
    # A part that is not there at all would pass for one that was never meant to be.
    weights.require(*parts)
    return weights


def _stored_name(name: str, stored: Mapping[str, StoredTensor]) -> str:
    """Return the name in a checkpoint under which a parameter has its most precise values."""
    for own, fused in FUSED_NAMES:
        name = re.sub(rf"^(\w+\.layers\.\d+)\.{own}\.", rf"\1.{fused}.layer_norm_", name)
    precise = optimizer_name(VALUE, name)
    if precise in stored and stored[name].dtype != "F32":
        return precise
    return name


def _weights(folder: Path, config: RunConfig, state: dict[str, Tensor], progress: Progress | None) -> ModelWeights:
    tokenizer = folder / TOKENIZER_FILE
    try:
        return ModelWeights(config, state, tokenizer.read_bytes() if tokenizer.is_file() else None, progress)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
