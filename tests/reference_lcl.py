"""The released LCL model again, in plain torch under its own parameter names: oracle for the ``official`` recipe.

Shares no code with the package: ``nn.Conv2d``, ``nn.MultiheadAttention``, a mask for causality, one document per row,
whole logits, whole similarity matrix. ``record_case`` writes a forward and a backward pass of it in the format of the
recorded cases of the released code.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

CONTRASTIVE_WEIGHT = 0.1
PAD = 0


@dataclass(frozen=True)
class Sizes:
    """What a case chooses; the text width is also that of the latents and of the features."""

    image_size: int = 20
    patch_size: int = 4
    vision_width: int = 40
    vision_layers: int = 3
    vision_head_width: int = 8
    text_width: int = 36
    text_layers: int = 2
    text_heads: int = 3
    pool_heads: int = 6
    vocab_size: int = 77
    context_length: int = 96

    @property
    def num_latents(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def special(self) -> dict[str, int]:
        names = ("<start_of_text>", "<end_of_text>", "<img_placehold>", "<start_of_img>", "<end_of_img>")
        return {name: self.vocab_size - len(names) + i for i, name in enumerate(names)}


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    """Patch features without the class token."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.vision_width
        self.conv1 = nn.Conv2d(3, width, sizes.patch_size, sizes.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(sizes.num_latents + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, width // sizes.vision_head_width, sizes.vision_layers)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x)))[:, 1:]


class CrossAttention(nn.Module):
    def __init__(self, width: int, out: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, out, bias=False) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.zeros(out)) for _ in range(3))
        self.proj = nn.Linear(out, out, bias=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return one pooled vector per image, and the values of all patches, both through ``proj``."""
        q, k, v = self.q(q) + self.q_bias, self.k(k) + self.k_bias, self.v(v) + self.v_bias
        pooled = []
        for q_head, k_head, v_head in zip(*(x.chunk(self.heads, dim=-1) for x in (q, k, v)), strict=True):
            scores = q_head @ k_head.transpose(1, 2) / q_head.shape[-1] ** 0.5
            pooled.append(scores.softmax(dim=-1) @ v_head)
        return self.proj(torch.cat(pooled, dim=-1))[:, 0], self.proj(v)


class Pooler(nn.Module):
    def __init__(self, width: int, out: int, heads: int) -> None:
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (nn.LayerNorm(width) for _ in range(3))
        self.cross_attn = CrossAttention(width, out, heads)


class PoolProject(nn.Module):
    def __init__(self, width: int, out: int, heads: int) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pooler = Pooler(width, out, heads)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        pooler = self.pooler
        query = self.query_token.expand(len(features), -1, -1)
        return pooler.cross_attn(pooler.norm1_q(query), pooler.norm1_k(features), pooler.norm1_v(features))


class Text(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.text_width
        self.token_embedding = nn.Embedding(sizes.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.zeros(sizes.context_length, width))
        self.transformer = Transformer(width, sizes.text_heads, sizes.text_layers)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, width))

    def forward(self, embeddings: Tensor) -> Tensor:
        length = embeddings.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        return self.transformer(embeddings + self.positional_embedding[:length], mask)


class ReferenceLCL(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.visual = Visual(sizes)
        self.pool_project = PoolProject(sizes.vision_width, sizes.text_width, sizes.pool_heads)
        self.text = Text(sizes)
        self.lm_head = nn.Sequential(
            nn.LayerNorm(sizes.text_width), nn.Linear(sizes.text_width, sizes.vocab_size, bias=False)
        )
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def randomize(self, seed: int) -> None:
        """Draw every parameter so that each matters: also biases, and LayerNorm weights around 1."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                is_norm = parameter.dim() == 1 and name.endswith("weight")
                parameter.copy_(1 + 0.1 * noise if is_norm else 0.2 * noise)
            self.logit_scale.fill_(2.0)

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        special = self.sizes.special
        pooled, latents = self.pool_project(self.visual(images))
        embeddings = self.text.token_embedding(tokens)
        embeddings = embeddings.masked_scatter((tokens == special["<img_placehold>"])[..., None], latents)
        hidden = self.text(embeddings)
        targets = tokens[:, 1:]
        never = torch.tensor([special["<img_placehold>"], special["<end_of_img>"], PAD])
        is_target = ~torch.isin(targets, never)
        logits, labels = self.lm_head(hidden[:, :-1][is_target]), targets[is_target]
        row, position = (tokens == special["<start_of_img>"]).nonzero(as_tuple=True)
        is_pair = position > 0
        contexts = self.text.ln_final(hidden[row, position]) @ self.text.text_projection
        image_features = F.normalize(pooled, dim=-1)
        text_features = F.normalize(contexts[is_pair], dim=-1)
        scores = self.logit_scale.exp() * image_features[is_pair] @ text_features.T
        own = torch.arange(len(scores))
        return {
            "logits": logits,
            "labels": labels,
            "all_image_features": image_features,
            "image_features": image_features[is_pair],
            "text_features": text_features,
            "generation_loss": F.cross_entropy(logits, labels),
            "contrastive_loss": (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2,
        }


def random_tokens(sizes: Sizes, rows: list[tuple[int, ...]], seed: int) -> Tensor:
    """Return rows of documents; each is given as lengths of text, positive, with 0 for an image."""
    generator, special = torch.Generator().manual_seed(seed), sizes.special
    image = [special["<start_of_img>"], *[special["<img_placehold>"]] * sizes.num_latents, special["<end_of_img>"]]
    documents = []
    for row in rows:
        document: list[int] = []
        for part in row:
            text = torch.randint(1, special["<start_of_text>"], (part,), generator=generator).tolist()
            document += text or image
        documents.append([*document, special["<end_of_text>"]])
    length = max(map(len, documents))
    return torch.tensor([document + [PAD] * (length - len(document)) for document in documents])


def record_case(folder: Path, name: str, sizes: Sizes, rows: list[tuple[int, ...]], seed: int = 0) -> Path:
    """Run the model forward and backward and write ``NAME.safetensors`` and ``NAME.json``; return the former's path."""
    model = ReferenceLCL(sizes)
    model.randomize(seed)
    tokens = random_tokens(sizes, rows, seed)
    num_images = int((tokens == sizes.special["<start_of_img>"]).sum())
    shape = (num_images, 3, sizes.image_size, sizes.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    outputs = model(images, tokens)
    losses = {name: outputs.pop(name) for name in ("generation_loss", "contrastive_loss")}
    losses["loss"] = losses["generation_loss"] + CONTRASTIVE_WEIGHT * losses["contrastive_loss"]
    losses["loss"].backward()
    tensors = {"input.images": images, "input.tokens": tokens}
    tensors |= {f"output.{key}": value.detach() for key, value in outputs.items()}
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{key} is not part of the losses"
        tensors |= {f"weight.{key}": parameter.detach(), f"grad.{key}": parameter.grad}
    description = {
        "config": {
            "vision": {
                "image_size": sizes.image_size,
                "patch_size": sizes.patch_size,
                "width": sizes.vision_width,
                "layers": sizes.vision_layers,
                "head_width": sizes.vision_head_width,
            },
            "text": {
                "context_length": sizes.context_length,
                "vocab_size": sizes.vocab_size,
                "width": sizes.text_width,
                "heads": sizes.text_heads,
                "layers": sizes.text_layers,
            },
            "heads": sizes.pool_heads,
        },
        "special_token_ids": sizes.special,
        "pad_id": PAD,
        **{key: value.item() for key, value in losses.items()},
    }
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    path.with_suffix(".json").write_text(json.dumps(description))
    return path
