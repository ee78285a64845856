"""A corpus for benchmarks, made on the fly in MMC4 layout and preprocessed as any other.

The same arguments give the same corpus. Lengths imitate web documents: log-normal sentences of Zipf-distributed words,
one to six images each. Pictures are smooth colours with noise as JPEG, which costs a decoder about as much as a
photograph of the same size.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lcl_megatron.data.preprocessing.preprocess import PreprocessConfig, preprocess
from lcl_megatron.data.tokenizer import train_tokenizer

NUM_WORDS = 4000
VOCABULARY = 4096


@dataclass(frozen=True)
class SyntheticCorpus:
    """What is made."""

    num_documents: int
    """Documents."""
    image_side: int
    """Width of the pictures, in pixels; the height is three quarters of it."""
    mean_sentences: float = 8.0
    """Sentences of a document, on average; one is added for each image."""
    num_pictures: int = 64
    """Different pictures; documents share them."""
    seed: int = 0
    """Seed of everything."""

    def write(self, folder: Path) -> Path:
        """Write shard, pictures, tokenizer and corpus below ``folder``; return the corpus."""
        rng = np.random.default_rng([self.seed, 1])
        images, shard, model = folder / "images", folder / "docs_shard_0_v2.jsonl", folder / "tokenizer.model"
        images.mkdir(parents=True)
        for number in range(self.num_pictures):
            (images / f"{number}.jpg").write_bytes(self._picture(number))
        words = ["".join(rng.choice(list("abcdefghiklmnoprstuvy"), rng.integers(2, 9))) for _ in range(NUM_WORDS)]
        records = [self._document(rng, words) for _ in range(self.num_documents)]
        shard.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        train_tokenizer((text for record in records for text in record["text_list"]), model, VOCABULARY)
        config = PreprocessConfig(input=(shard,), image_root=images, tokenizer_model=model, output=folder / "corpus")
        return preprocess(config).corpus.path

    def _document(self, rng: np.random.Generator, words: list[str]) -> dict[str, list[object]]:
        num_images = int(rng.integers(1, 7))
        num_texts = num_images + int(rng.poisson(self.mean_sentences))
        lengths = np.clip(rng.lognormal(2.5, 0.7, num_texts), 1, 200).astype(int)
        texts = [" ".join(words[i] for i in np.minimum(rng.zipf(1.3, length), NUM_WORDS) - 1) for length in lengths]
        places = rng.choice(num_texts, num_images, replace=False)
        infos = [
            {
                "image_name": f"{rng.integers(self.num_pictures)}.jpg",
                "matched_text_index": int(place),
                "matched_sim": 0.3,
            }
            for place in places
        ]
        return {"text_list": list(texts), "image_info": list(infos)}

    def _picture(self, number: int) -> bytes:
        rng = np.random.default_rng([self.seed, 2, number])
        size = (self.image_side, self.image_side * 3 // 4)
        smooth = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth, dtype=np.float32) + rng.normal(0, 12, (size[1], size[0], 1))
        stream = io.BytesIO()
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
        return stream.getvalue()
