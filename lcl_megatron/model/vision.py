"""The vision tower: a pre-norm Vision Transformer over megatron-core layers.

Shape letters: N image slots, P tokens of one image (patches and class token), C vision width, T = N * P flattened
tokens (padded to a multiple of the sequence edge).
"""

from __future__ import annotations

import functools

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional as F

from lcl_megatron.config import VisionConfig
from lcl_megatron.config.image import CLIP_MEAN, CLIP_STD
from lcl_megatron.model.attention import PackedSequences
from lcl_megatron.model.drop_path import DropPath
from lcl_megatron.model.layers import LayerStack
from lcl_megatron.model.parts import present
from lcl_megatron.model.residual import Drop, KeptImages
from lcl_megatron.model.specs import Runtime, vision_layer_spec, vision_transformer_config


def normalize_images(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return images (N, 3, H, W) on the scale the encoder reads; uint8 is normalised, float is taken as done."""
    if images.dtype == torch.uint8:
        mean, std = _pixel_statistics(images.device)
        images = (images.float() - mean) / std
    return images.to(dtype)


@functools.cache
def _pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (3, 1, 1) of pixels 0..255; copied to a device once, as each copy waits."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (CLIP_MEAN, CLIP_STD))
    return mean, std


class PatchEmbedding(MegatronModule):
    """Cut images into patches, project them, add the class token and positions, normalise (``ln_pre``).

    Parallel: replicated over tp; every rank computes the same and receives the whole gradient.
    """

    def __init__(self, vision: VisionConfig, runtime: Runtime) -> None:
        super().__init__(config=vision_transformer_config(vision, runtime))
        self.vision = vision
        width, dtype = vision.hidden_size, runtime.params_dtype
        shape = (width, 3, vision.patch_size, vision.patch_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.register_parameter("class_token", None)
        if vision.class_token:
            self.class_token = nn.Parameter(torch.empty(width, dtype=dtype))
        self.position_embeddings = nn.Parameter(torch.empty(vision.num_tokens, width, dtype=dtype))
        self.layernorm = nn.LayerNorm(width, eps=vision.layernorm_epsilon, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings (N, P, C) of images (N, 3, H, W), uint8 or normalised float."""
        size = self.vision.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images of shape {tuple(images.shape)}; expected (N, 3, {size}, {size})")
        pixels = normalize_images(images, self.weight.dtype)
        # Patches do not overlap, so the convolution is one matrix product.
        patches_NPK = F.unfold(pixels, self.vision.patch_size, stride=self.vision.patch_size).transpose(1, 2)
        embeddings_NPC = F.linear(patches_NPK, self.weight.flatten(1))
        if self.class_token is not None:
            class_N1C = self.class_token.expand(images.shape[0], 1, -1)
            embeddings_NPC = torch.cat([class_N1C, embeddings_NPC], dim=1)
        return self.layernorm(embeddings_NPC + self.position_embeddings)


class VisionTower(MegatronModule):
    """The parts of the tower that one pipeline stage holds; absent parts are None."""

    def __init__(
        self,
        vision: VisionConfig,
        runtime: Runtime,
        layers: range | None = None,
        has_embedding: bool = True,
        has_final_layernorm: bool = True,
    ) -> None:
        super().__init__(config=vision_transformer_config(vision, runtime))
        self.vision = vision
        self.edge = runtime.edge
        layers = range(vision.num_layers) if layers is None else layers
        self.embedding = PatchEmbedding(vision, runtime) if has_embedding else None
        spec = vision_layer_spec(vision, runtime)
        self.layers = LayerStack(self.config, spec, layers, runtime.collection, vision)
        self.final_layernorm = None
        if has_final_layernorm:
            self.final_layernorm = nn.LayerNorm(
                vision.hidden_size, eps=vision.layernorm_epsilon, dtype=runtime.params_dtype
            )

    def num_rows(self, num_images: int) -> int:
        """Return T: flattened tokens of ``num_images`` images, padded to a multiple of the sequence edge."""
        tokens = num_images * self.vision.num_tokens
        return -(-tokens // self.edge.multiple) * self.edge.multiple

    def embed(self, images: Tensor) -> Tensor:
        """Return this rank's rows of the flattened embeddings, (T, 1, C)."""
        embeddings_TC = present(self.embedding)(images).flatten(0, 1)
        padding = self.num_rows(images.shape[0]) - embeddings_TC.shape[0]
        return self.edge.scatter(F.pad(embeddings_TC, (0, 0, 0, padding))[:, None])

    def encode(self, patches_T1C: Tensor, image_keys: Tensor, drop_path: DropPath | None) -> Tensor:
        """Run this stage's layers.

        Args:
            patches_T1C: this rank's rows of the flattened patch features.
            image_keys: (N,) int64, seeds drop-path.
            drop_path: None = evaluation, no branch is dropped.

        Returns:
            (T, 1, C).
        """
        num_images = image_keys.shape[0]
        sequences = self._sequences(num_images, image_keys.device)
        for index, layer in self.layers.items():
            drop = tuple(self._drop(drop_path, image_keys, index, branch) for branch in (0, 1))
            patches_T1C, _ = layer(patches_T1C, attention_mask=None, drop=drop, packed_seq_params=sequences)
        return patches_T1C

    def finish(self, patches_T1C: Tensor, num_images: int) -> Tensor:
        """Return normalised features of all patches, (N, P, C) without the class token, whole on every rank."""
        tokens = self.vision.num_tokens
        features_NPC = self.edge.gather(patches_T1C)[: num_images * tokens, 0].unflatten(0, (num_images, tokens))
        return present(self.final_layernorm)(features_NPC)[:, int(self.vision.class_token) :]

    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, P, C) of images in evaluation mode; needs the whole tower."""
        keys = torch.zeros(images.shape[0], dtype=torch.int64, device=images.device)
        return self.finish(self.encode(self.embed(images), keys, None), images.shape[0])

    def _sequences(self, num_images: int, device: torch.device) -> PackedSequences:
        tokens, rows = self.vision.num_tokens, self.num_rows(num_images)
        borders = torch.arange(0, num_images * tokens + 1, tokens, dtype=torch.int32, device=device)
        if rows > num_images * tokens:
            borders = F.pad(borders, (0, 1), value=rows)
        return PackedSequences.of(borders, tokens, row_length=tokens, one_per_row=True)

    def _drop(self, drop_path: DropPath | None, image_keys: Tensor, layer: int, branch: int) -> Drop:
        if drop_path is None:
            return None
        if self.vision.drop_path_mode == "subset":
            assert self.edge.multiple == 1, "whole images cannot be taken from a part of the sequence; see validate.py"
            images_M = drop_path.subset(image_keys, layer, branch)
            if images_M is None:
                return None
            sequences = self._sequences(images_M.shape[0], image_keys.device)
            return KeptImages(images_M, image_keys.shape[0], sequences)
        keep_N = drop_path.keep(image_keys, layer, branch)
        if keep_N is None:
            return None
        keep_T = keep_N.repeat_interleave(self.vision.num_tokens)
        padding = self.num_rows(image_keys.shape[0]) - keep_T.shape[0]
        return self.edge.shard(F.pad(keep_T, (0, padding)))[:, None, None]
