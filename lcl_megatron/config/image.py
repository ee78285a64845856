"""Pixel constants of the OpenCLIP image transform; decoder and model must agree on them."""

from __future__ import annotations

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of R, G, B on the 0..1 scale."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of R, G, B on the 0..1 scale."""
BLANK_PIXEL = (123, 117, 104)
"""The mean colour as uint8: fills slots without an image and images that could not be decoded."""
