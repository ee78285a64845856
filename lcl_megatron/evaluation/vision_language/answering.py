"""Answers of a vision-language model to many prompts, shared by all ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from lcl_megatron.evaluation.transfer.image_sets import ImageSet, PixelReader
from lcl_megatron.evaluation.vision_language.assembly import Assembled
from lcl_megatron.evaluation.vision_language.model import Generation
from lcl_megatron.evaluation.vision_language.pixels import fit_image
from lcl_megatron.evaluation.vision_language.sequences import TokenSequence, collate
from lcl_megatron.parallel.replicas import Replicas


def pixel_reader(assembled: Assembled, images: ImageSet) -> PixelReader:
    """Return a reader of images as the model sees them."""
    preprocessing, image_fit = assembled.encoder.preprocessing, assembled.recipe.image_fit
    return PixelReader(images, lambda data, _key: fit_image(data, preprocessing, image_fit))


def answer_prompts(
    assembled: Assembled,
    prompts: Sequence[tuple[TokenSequence, tuple[int, ...]]],
    images: ImageSet,
    how: Generation,
    replicas: Replicas,
    *,
    batch_size: int,
    bf16: bool = False,
) -> list[str]:
    """Return the text that follows each prompt, without special tokens and surrounding white space.

    Args:
        assembled: the model, in evaluation mode.
        prompts: sequences, and which images of the set stand in their places.
        images: the set.
        how: length and search.
        replicas: the ranks, each of which answers its share.
        batch_size: prompts that a rank answers at the same time.
        bf16: matrix products in bfloat16.

    Returns:
        All answers, in order, the same on every rank.

    Raises:
        DataError: an image cannot be read or decoded.
    """
    read, device = pixel_reader(assembled, images), replicas.device
    # Prompts of equal length beside each other: a short one would wait for the long one in its batch.
    order = sorted(replicas.share(len(prompts)), key=lambda index: (len(prompts[index][0].ids), index))
    answers: dict[int, str] = {}
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        numbers = np.array([n for index in chosen for n in prompts[index][1]], dtype=np.int64)
        size = assembled.encoder.image_size
        pixels = read(numbers) if len(numbers) else torch.zeros(0, 3, size, size, dtype=torch.uint8)
        batch = collate([prompts[index][0] for index in chosen], pixels).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            tokens = assembled.model.generate(batch, how, assembled.tokenizer.eos_token_id, assembled.pad_token_id)
        texts = assembled.tokenizer.batch_decode(tokens.cpu(), skip_special_tokens=True)
        answers.update(zip(chosen, (text.strip() for text in texts), strict=True))
    own = [answers[index] for index in replicas.share(len(prompts))]
    return list(itertools.chain.from_iterable(replicas.gather_objects(own)))
