"""Decodes images from clients, under caps that are checked before a pixel is decoded.

Bytes, pixels and scans bound the time too, which can't be capped by itself: a decoder that has begun can't be stopped.
"""

from __future__ import annotations

import io
import math
import re
import warnings

import PIL.Image

from vaopd.errors import ImageRefused, LimitExceeded
from vaopd.types import EncodedImage

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_ASPECT_RATIO = 200  # the image processors of the Qwen family refuse more
# Encoders make about ten. A scan of 51 bytes took 0.1 s at 31 megapixels: without a cap, 5 MB kept a core for hours.
MAX_JPEG_SCANS = 32
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # not those that occur inside a scan
_TEM, _EOI, _SOS = 0x01, 0xD9, 0xDA


def decode(image: EncodedImage, *, max_bytes: int = 32 * 2**20, max_pixels: int = 32_000_000) -> PIL.Image.Image:
    """Decodes an image to RGB; transparency is laid over white, so that all processes see the same.

    Raises LimitExceeded above `max_bytes`, ImageRefused unless it is a sound PNG, JPEG or WEBP within the caps.
    The libraries' messages are left out on purpose: they hold heap addresses.
    """
    name = f"image {image.sha256[:12]}…"
    if len(image.data) > max_bytes:
        raise LimitExceeded(f"{name} has {len(image.data)} bytes, the limit is {max_bytes}; send a smaller encoding")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # our own cap is checked just below
            opened = PIL.Image.open(io.BytesIO(image.data), formats=FORMATS)
    except PIL.Image.DecompressionBombError:  # Pillow checks its own cap, far above ours, in `open`
        raise ImageRefused(f"{name} claims far more than {max_pixels} pixels, the limit; scale it down") from None
    except Exception:
        raise ImageRefused(f"{name} ({len(image.data)} bytes) is not a PNG, JPEG or WEBP image; re-encode it") from None
    width, height = opened.size
    if width * height > max_pixels:
        raise ImageRefused(f"{name} is {width}×{height} pixels, the limit is {max_pixels} in all; scale it down")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageRefused(f"{name} is {width}×{height}, the limit is an aspect ratio of {MAX_ASPECT_RATIO}; crop it")
    if opened.format in ("PNG", "WEBP") and (frames := getattr(opened, "n_frames", 1)) > 1:
        raise ImageRefused(f"{name} is an animation of {frames} frames, the limit is 1; send one of them")
    if opened.format not in ("PNG", "WEBP") and _count_jpeg_scans(image.data) > MAX_JPEG_SCANS:
        raise ImageRefused(f"{name} is a JPEG of more than {MAX_JPEG_SCANS} scans, the limit; re-encode it")
    try:
        opened.load()
        if opened.has_transparency_data:
            rgba = opened.convert("RGBA")
            white = PIL.Image.new("RGBA", rgba.size, "white")
            return PIL.Image.alpha_composite(white, rgba).convert("RGB")
        return opened.convert("RGB")
    except Exception:
        raise ImageRefused(f"{name} ({width}×{height} {opened.format}) is damaged; re-encode it") from None


def scale_to_bounds(image: PIL.Image.Image, *, min_pixels: int, max_pixels: int) -> PIL.Image.Image:
    """Scales a picture to pixel bounds, each side floored (method.md, "Visual advantage").

    A picture within the bounds is returned as it is. The floor may leave it a little below `min_pixels`.

    >>> scale_to_bounds(PIL.Image.new("RGB", (200, 150)), min_pixels=262_144, max_pixels=4_194_304).size
    (591, 443)
    """
    pixels = image.width * image.height
    wanted = min(max(pixels, min_pixels), max_pixels)
    if wanted == pixels:
        return image
    factor = math.sqrt(wanted / pixels)
    return image.resize((max(1, int(image.width * factor)), max(1, int(image.height * factor))))


def _count_jpeg_scans(data: bytes) -> int:
    """Counts a decoder's passes over the image: the SOS markers before the first EOI. Stops above the limit."""
    scans, position = 0, 2
    while scans <= MAX_JPEG_SCANS and (found := _JPEG_MARKER.search(data, position)):
        if (marker := data[found.end() - 1]) == _EOI:
            break
        scans += marker == _SOS
        length = 0 if marker == _TEM else int.from_bytes(data[found.end() : found.end() + 2])
        position = found.end() + length
    return scans
