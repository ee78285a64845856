"""Compare every folder of an export, loaded by the stock library it is for, with the model's own forward pass.

Needs megatron-core, whose layers the model consists of, and the stock libraries. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lcl_megatron.checkpoint.convert.export_targets import ExportSource
from lcl_megatron.checkpoint.convert.measurement import Measurement
from lcl_megatron.checkpoint.convert.whole_model import MODELING_FILE, modeling_code
from lcl_megatron.checkpoint.export import ExportReport
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.stock_libraries import stock_library
from lcl_megatron.checkpoint.weights import WEIGHTS_FILE, ModelWeights
from lcl_megatron.config import ParallelConfig
from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.data.tokenizer import SpecialTokens
from lcl_megatron.model.lcl import LCLModel
from lcl_megatron.model.parts import present
from lcl_megatron.model.specs import Runtime
from lcl_megatron.parallel.groups import initialize

_TEXT_TOKENS = 12
"""Length of each stretch of text between images."""
_MOST_POSITIONS = 256
"""Length of the text for the language model alone."""
_NUM_IMAGES = 2


@torch.no_grad()
def measure(report: ExportReport, weights: ModelWeights, folder: Path) -> dict[str, Measurement]:
    """Load every folder that was written and return its figures by name.

    Args:
        report: says which folders there are.
        weights: the model that was exported.
        folder: the export.

    Raises:
        LibraryError: timm or transformers is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    stock_library("transformers").utils.logging.disable_progress_bar()
    source = ExportSource(weights)
    written = [name for name, part in report.folders.items() if part.skipped is None]
    checks: dict[str, Callable[[Reference, Path], dict[str, Measurement]]] = {
        "vision": _check_vision,
        "clip_vision": _check_clip_vision,
        "language_model": _check_language_model,
        "whole_model": _check_whole_model,
    }
    measurements: dict[str, Measurement] = {}
    with reference(source) as model:
        for name in written:
            measurements |= checks[name](model, folder / report.folders[name].folder)
    return measurements


@dataclasses.dataclass(frozen=True)
class Reference:
    """The model itself, in float32 on one process, and inputs for it."""

    model: LCLModel
    """In evaluation mode."""
    special: SpecialTokens | None
    """Ids of the special tokens."""
    images: Tensor
    """(2, 3, size, size) float32, as if normalised."""
    text: Tensor
    """(1, S) int64 random ids."""
    device: torch.device
    """Where the model is; everything that is given or returned is on the CPU."""

    def image_tokens(self) -> Tensor:
        """Return (N, tokens, C): all normalised tokens of the tower, the class token first."""
        vision, images = present(self.model.vision), self.images.to(self.device)
        keys = torch.zeros(len(images), dtype=torch.int64, device=self.device)
        tokens_T1C = vision.encode(vision.embed(images), keys, None)
        tokens_NPC = tokens_T1C[: len(images) * vision.vision.num_tokens, 0].unflatten(0, (len(images), -1))
        return present(vision.final_layernorm)(tokens_NPC).cpu()

    def text_logits(self) -> Tensor:
        """Return (1, S, V) logits of the text."""
        language = present(self.model.language)
        config = self.model.run_config
        batch = document_batch(self.text, torch.zeros(0, dtype=torch.int64), self.images[:0]).to(self.device)
        latents = torch.zeros(0, config.vision.num_patches, config.language.hidden_size, device=self.device)
        hidden_TH = language.decode(language.embed(batch, latents), batch)[:, 0]
        heads = present(language.heads)
        logits_TV = heads.logits(heads.normalized(hidden_TH), language.vocabulary_matrix())
        return logits_TV[None, :, : config.language.vocab_size].cpu()

    def logits(self, batch: PackedBatch) -> Tensor:
        """Return (S, V) logits of a document with images."""
        return self.model.target_logits(batch.to(self.device))[:, : self.model.run_config.language.vocab_size].cpu()

    def features(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return pooled latents (N, D), context features (N, D) and ``logit_scale`` () of a document with images."""
        output = self.model(batch.to(self.device))
        return output.pooled_ND.cpu(), output.context_ND.cpu(), output.logit_scale.cpu()

    def interleaved(self, special: SpecialTokens) -> PackedBatch:
        """Return a document ``<s> text <BoI> image <EoI> text ...`` with one or two images, as many as find room."""
        config = self.model.run_config
        image, positions = config.vision.num_patches + 2, config.language.max_position_embeddings
        stretch = min(_TEXT_TOKENS, (positions - 1 - image) // 2)
        num_images = min(_NUM_IMAGES, (positions - 1 - stretch) // (image + stretch))
        text = self.text[0].tolist()
        ids, slots = [special.bos], []
        for index in range(num_images):
            ids += [*text[index : index + stretch], special.boi]
            slots.append(len(ids))
            ids += [special.image] * config.vision.num_patches + [special.eoi]
        ids += text[num_images : num_images + stretch]
        return document_batch(torch.tensor([ids]), torch.tensor(slots, dtype=torch.int64), self.images[:num_images])


@contextmanager
def reference(source: ExportSource) -> Iterator[Reference]:
    """Yield the model of some weights, ready to run on the CPU or the GPU of this process."""
    config = source.config
    generator = torch.Generator().manual_seed(0)
    size, positions = config.vision.image_size, config.language.max_position_embeddings
    images = torch.randn(_NUM_IMAGES, 3, size, size, generator=generator)
    # Ids of text follow the special tokens where there are any; where there are none, all ids are text.
    first = 0 if source.special is None else max(dataclasses.astuple(source.special)) + 1
    first = first if first < config.language.vocab_size else 0
    shape = (1, min(_MOST_POSITIONS, positions))
    text = torch.randint(first, config.language.vocab_size, shape, generator=generator)
    groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    try:
        model = LCLModel(config, Runtime(collection=groups.collection))
        model.load_state_dict({name: tensor.float() for name, tensor in source.weights.state.items()}, strict=True)
        yield Reference(model.to(groups.device).eval(), source.special, images, text, groups.device)
    finally:
        groups.destroy()


def document_batch(tokens_1S: Tensor, image_slots: Tensor, images: Tensor) -> PackedBatch:
    """Return one document as a micro-batch in which every position has a target.

    Args:
        tokens_1S: (1, S) int64.
        image_slots: (N,) int64, position of each image's first latent.
        images: (N, 3, size, size) float32, as if normalised.
    """
    length, num_images = tokens_1S.shape[1], len(image_slots)
    return PackedBatch(
        tokens=tokens_1S,
        labels=torch.zeros_like(tokens_1S),
        loss_mask=torch.ones_like(tokens_1S, dtype=torch.bool),
        position_ids=torch.arange(length)[None],
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        max_seqlen=length,
        label_positions=torch.arange(length),
        image_slots=image_slots,
        context_slots=image_slots - 1,
        has_context=torch.ones(num_images, dtype=torch.bool),
        image_keys=torch.zeros(num_images, dtype=torch.int64),
        image_ok=torch.ones(num_images, dtype=torch.bool),
        images=images,
        num_images=num_images,
    )


def _check_vision(model: Reference, folder: Path) -> dict[str, Measurement]:
    expected = model.image_tokens()
    encoder = stock_library("timm").create_model(f"local-dir:{folder}", pretrained=True).eval()
    auto, keys = _pretrained("AutoModel", folder)
    found = auto(pixel_values=model.images).last_hidden_state
    return {
        "timm": _measurement(
            encoder, [(encoder.forward_features(model.images), expected)], _key_difference(encoder, folder)
        ),
        "auto_model": _measurement(auto, [(found, expected)], keys),
    }


def _check_clip_vision(model: Reference, folder: Path) -> dict[str, Measurement]:
    tower, keys = _pretrained("CLIPVisionModel", folder)
    output, expected = tower(model.images), model.image_tokens()
    last = getattr(tower, "vision_model", tower).post_layernorm
    pairs = [(last(output.last_hidden_state), expected), (output.pooler_output, expected[:, 0])]
    return {"clip_vision": _measurement(tower, pairs, keys)}


def _check_language_model(model: Reference, folder: Path) -> dict[str, Measurement]:
    language, keys = _pretrained("OPTForCausalLM", folder)
    pairs = [(language(model.text).logits, model.text_logits())]
    return {"language_model": _measurement(language, pairs, keys)}


def _check_whole_model(model: Reference, folder: Path) -> dict[str, Measurement]:
    stock_library("timm")
    stock_library("transformers")
    module = exported_module(folder)
    whole, info = module.LCLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    whole.eval()
    batch = model.interleaved(present(model.special))
    pooled, context, logit_scale = model.features(batch)
    first = int(batch.context_slots[0])
    pairs = [
        (whole(batch.tokens, batch.images).logits[0], model.logits(batch)),
        (whole.encode_image(batch.images, normalize=False), pooled),
        (whole.encode_text(batch.tokens[:, : first + 1], normalize=False), context[:1]),
        (whole.logit_scale, logit_scale[None]),
    ]
    return {"whole_model": _measurement(whole, pairs, _keys(info))}


def exported_module(folder: Path) -> Any:
    """Return the module in an exported folder: the file itself, as transformers would run it, but without a copy.

    Raises:
        CheckpointError: it is not the file that an export writes; nothing of it is run.
    """
    path = folder / MODELING_FILE
    if not path.is_file() or path.read_text(encoding="utf-8") != modeling_code():
        raise CheckpointError(f"{path} is not the code of this version, which alone is run; export the model again")
    spec = importlib.util.spec_from_file_location("exported_modeling_lcl", path)
    module = importlib.util.module_from_spec(present(spec))
    present(present(spec).loader).exec_module(module)
    return module


def _pretrained(name: str, folder: Path) -> tuple[Any, tuple[list[str], list[str]]]:
    """Load a folder by a class of transformers; return the model and the names of missing and unexpected tensors."""
    loaded, info = getattr(stock_library("transformers"), name).from_pretrained(folder, output_loading_info=True)
    return loaded.eval(), _keys(info)


def _keys(info: dict[str, Any]) -> tuple[list[str], list[str]]:
    mismatched = [str(key) for key in info["mismatched_keys"]]
    return sorted([*info["missing_keys"], *mismatched]), sorted(info["unexpected_keys"])


def _key_difference(module: nn.Module, folder: Path) -> tuple[list[str], list[str]]:
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        stored = set(file.keys())
    own = set(module.state_dict())
    return sorted(own - stored), sorted(stored - own)


def _measurement(
    loaded: nn.Module, pairs: list[tuple[Tensor, Tensor]], keys: tuple[list[str], list[str]]
) -> Measurement:
    """Judge outputs by the largest entry of the model's own; of several outputs, the worst counts."""
    measured = [
        Measurement.of_outputs(
            f"{type(loaded).__module__}.{type(loaded).__name__}", found, expected, tuple(keys[0]), tuple(keys[1])
        )
        for found, expected in pairs
    ]
    return max(measured, key=_badness)


def _badness(one: Measurement) -> float:
    """Return the difference as a share of the outputs; of NaN, to which nothing compares, infinity."""
    share = one.max_abs_difference / max(1.0, one.largest_output)
    return float("inf") if math.isnan(share) else share
