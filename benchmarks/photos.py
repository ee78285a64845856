"""Pictures that cost a decoder what photographs do: 1/f noise, hard edges, strokes and sensor noise.

The same arguments give the same picture.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw

SPECTRUM = 1.45
"""Amplitudes fall with frequency to this power, as in photographs."""
SENSOR_NOISE = 4.0
"""Standard deviation, of 255."""
NUM_SHAPES = 18


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Draw a picture, RGB."""
    rng = np.random.default_rng(seed)
    base = _noise(rng, width, height, SPECTRUM)
    channels = [128 + 55 * (0.85 * base + 0.35 * _noise(rng, width, height, SPECTRUM + 0.2)) for _ in range(3)]
    image = Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(NUM_SHAPES):
        x, y = (int(value) for value in (rng.integers(width), rng.integers(height)))
        right, bottom = x + int(rng.integers(2, width // 3 + 3)), y + int(rng.integers(2, height // 3 + 3))
        color = (*(int(value) for value in rng.integers(0, 256, 3)), int(rng.integers(60, 256)))
        shape = rng.integers(4)
        if shape == 0:
            draw.ellipse((x, y, right, bottom), fill=color)
        elif shape == 1:
            draw.rectangle((x, y, right, bottom), fill=color)
        elif shape == 2:
            draw.line((x, y, right, bottom), fill=color, width=int(rng.integers(1, 6)))
        else:
            draw.text((x, y), f"words in picture {seed}", fill=color)
    noisy = np.asarray(image, dtype=np.float32) + rng.normal(0, SENSOR_NOISE, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, format_name: str = "JPEG", **options: object) -> bytes:
    """Encode a picture; ``options`` are those of Pillow's ``save``."""
    stream = io.BytesIO()
    image.save(stream, format_name, **options)
    return stream.getvalue()


def _noise(rng: np.random.Generator, width: int, height: int, power: float) -> np.ndarray:
    """Return (height, width) noise with a 1/f spectrum, mean 0 and standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1
    spectrum = (rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)) / frequency**power
    values = np.fft.irfft2(spectrum, s=(height, width))
    return (values - values.mean()) / values.std()
