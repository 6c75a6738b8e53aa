"""Decoding images that somebody else made, under caps that hold before a pixel is decoded."""

from __future__ import annotations

import io
import warnings

import PIL.Image

from vaopd.errors import ImageRefused, LimitExceeded
from vaopd.types import EncodedImage

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_ASPECT_RATIO = 200  # the image processors of the Qwen family refuse more


def decode(image: EncodedImage, *, max_bytes: int = 32 * 2**20, max_pixels: int = 32_000_000) -> PIL.Image.Image:
    """The RGB image. Transparency is laid over white, so that all processes see the same.

    Raises LimitExceeded above `max_bytes`, ImageRefused for all that is not a sound PNG, JPEG or WEBP within bounds.
    Library texts are left out on purpose: they hold heap addresses.
    """
    name = f"image {image.sha256[:12]}…"
    if len(image.data) > max_bytes:
        raise LimitExceeded(f"{name} has {len(image.data)} bytes, the limit is {max_bytes}; send a smaller encoding")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # our own cap is checked just below
            opened = PIL.Image.open(io.BytesIO(image.data), formats=FORMATS)
    except Exception:
        raise ImageRefused(f"{name} ({len(image.data)} bytes) is not a PNG, JPEG or WEBP image; re-encode it") from None
    width, height = opened.size
    if width * height > max_pixels:
        raise ImageRefused(f"{name} is {width}×{height} pixels, the limit is {max_pixels} in all; scale it down")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageRefused(f"{name} is {width}×{height}, the limit is an aspect ratio of {MAX_ASPECT_RATIO}; crop it")
    try:
        opened.load()
        if opened.has_transparency_data:
            rgba = opened.convert("RGBA")
            white = PIL.Image.new("RGBA", rgba.size, "white")
            return PIL.Image.alpha_composite(white, rgba).convert("RGB")
        return opened.convert("RGB")
    except Exception:
        raise ImageRefused(f"{name} ({width}×{height} {opened.format}) is damaged; re-encode it") from None
