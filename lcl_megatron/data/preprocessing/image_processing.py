"""What becomes of an image on its way into a corpus: judged, hashed, and made smaller if it is asked for.

An image is stored byte for byte as it was found, or, with ``resize_short_side``, decoded, resized and encoded again as
training itself would do it: RGB before the resize, EXIF orientation ignored, the same antialiased bicubic filter.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from PIL import Image

from lcl_megatron.data.decoding.image_probe import ImageError, parse_header
from lcl_megatron.data.document import ImageSegment
from lcl_megatron.data.image_stores.image_folder import ImageFileError
from lcl_megatron.data.storage.corpus_part import StoredImage, image_hash

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""Formats, by Pillow's names, that a corpus takes; training decodes some more."""
CHROMA = "4:4:4"
"""Chroma at full resolution: pictures made this small have colour edges of a pixel, and training reads every pixel.
At quality 90, measured on photographs, 4:2:0 saves 13% of the bytes and costs 2 dB; from there on 4:4:4 is the better
use of the same bytes."""
MAX_JPEG_SIDE = 65_500
"""libjpeg's limit, in pixels."""


@dataclass(frozen=True)
class ImageRules:
    """How images are judged and stored; the same bytes and rules give the same stored bytes."""

    max_bytes: int
    """Larger images are refused."""
    max_pixels: int
    """Images whose header announces more are refused."""
    decode: bool = False
    """Decode all pixels of every image; else only the header is read."""
    resize_short_side: int = 0
    """Images whose shorter side is longer are resized to it and encoded again; 0 = none."""
    jpeg_quality: int = 90
    """Quality of the encoder, 1 to 100."""

    def store(self, segment: ImageSegment, data: bytes) -> StoredImage:
        """Return an image as it shall stand in the corpus.

        Args:
            segment: Name and place of the image.
            data: Its encoded bytes.

        Raises:
            ImageFileError: If it is no image of an accepted format, too large, or cannot be decoded where that is
                asked for.
        """
        if len(data) > self.max_bytes:
            raise ImageFileError("file too large", f"{len(data)} bytes; the limit is {self.max_bytes}")
        width, height = probe_image(data, self.max_pixels)
        source_hash = image_hash(data)
        size = self._smaller(width, height)
        if size is None:
            if self.decode:
                self._decode(data)
            return StoredImage(segment, data, width, height, source_hash)
        width, height = size
        return StoredImage(segment, self._encode(data, width, height), width, height, source_hash, len(data))

    def _smaller(self, width: int, height: int) -> tuple[int, int] | None:
        """Return width and height to resize to; None if the image stays as it is."""
        short, side = min(width, height), self.resize_short_side
        if side == 0 or short <= side:
            return None
        size = (width * side + short // 2) // short, (height * side + short // 2) // short
        # A strip that is too long to be a JPEG is rare enough to be kept as it is.
        return size if max(size) <= MAX_JPEG_SIDE else None

    def _decode(self, data: bytes) -> object:
        images = _decoder()
        try:
            return images.decode_rgb(data, self.max_pixels)
        except images.ImageError as error:
            raise ImageFileError("cannot be decoded", str(error)) from error

    def _encode(self, data: bytes, width: int, height: int) -> bytes:
        resized = _decoder().resize(self._decode(data), height, width)
        stream = io.BytesIO()
        # Pillow uses libjpeg's accurate transform; simplejpeg, 0.15 ms faster, the fast one at qualities below 96.
        Image.fromarray(resized.permute(1, 2, 0).contiguous().numpy()).save(
            stream, "JPEG", quality=self.jpeg_quality, subsampling=CHROMA
        )
        return stream.getvalue()


def probe_image(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Return width and height in pixels from an image's header; pixels are not decoded.

    Raises:
        ImageFileError: If the bytes are no image of an accepted format, or announce too many pixels.
    """
    try:
        header = parse_header(data)
    except ImageError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise ImageFileError("too many pixels", str(error.__cause__)) from error
        raise ImageFileError("not an image", f"begins with {data[:16]!r}") from error
    if header.format not in IMAGE_FORMATS:
        raise ImageFileError("not an image", f"begins with {data[:16]!r}")
    if header.width * header.height > max_pixels:
        raise ImageFileError("too many pixels", f"{header.width} x {header.height}; the limit is {max_pixels}")
    return header.width, header.height


@cache
def _decoder() -> ModuleType:
    """Import the decoder of training, and with it torch, only into processes that decode: it takes seconds."""
    import torch

    from lcl_megatron.data.decoding import images

    torch.set_num_threads(1)  # one process per core is what runs here
    return images
