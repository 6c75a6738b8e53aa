"""Decodes images from clients, under caps that are checked before a pixel is decoded.

Bytes, pixels and scans bound the time too, which can't be capped by itself: a decoder that has begun can't be stopped.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageFile

from vaopd.errors import ImageRefused, LimitExceeded
from vaopd.types import EncodedImage

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_ASPECT_RATIO = 200  # the image processors of the Qwen family refuse more
# Encoders make about ten. A scan of 51 bytes took 0.1 s at 31 megapixels: without a cap, 5 MB kept a core for hours.
MAX_JPEG_SCANS = 32
_MAX_PARTS = 32_768
"""Chunks of a PNG or segments of a JPEG, one for about 8 KB. Python code walks them, here and in Pillow."""
_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"RIFF": "WEBP"}
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # not those that occur inside a scan
_TEM, _EOI, _SOS = 0x01, 0xD9, 0xDA
_MAX_PROFILE_BYTES = 4 * 2**20  # a press's tables take up to about three
_SAME_COLOUR = 2
"""Levels of 255. The many spellings of sRGB differ by less, and pictures that say "sRGB" stay as they are stored."""
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}

_SRGB = PIL.ImageCms.createProfile("sRGB")


@contextlib.contextmanager
def _ignore_warnings() -> Iterator[None]:
    """Ignores Pillow's warnings: damaged metadata can cause 65 000 of them, each a line of the log."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@_ignore_warnings()
def decode(image: EncodedImage, *, max_bytes: int = 32 * 2**20, max_pixels: int = 32_000_000) -> PIL.Image.Image:
    """Decodes an image to 8-bit RGB as a viewer shows it; every process reads pictures here.

    16-bit samples keep their high byte, an ICC profile is applied, transparency lies over white, and the picture stands
    as its EXIF orientation says (MAX_ASPECT_RATIO and `max_pixels` hold either way).
    Raises LimitExceeded above `max_bytes`, ImageRefused unless it is a sound PNG, JPEG or WEBP within the caps.
    The libraries' messages are left out on purpose: they hold heap addresses.
    """
    name = f"image {image.sha256[:12]}…"
    if len(image.data) > max_bytes:
        raise LimitExceeded(f"{name} has {len(image.data)} bytes, the limit is {max_bytes}; send a smaller encoding")
    kind = next((kind for beginning, kind in _SIGNATURES.items() if image.data.startswith(beginning)), None)
    structure = _walk(image.data, kind)
    if structure.parts >= _MAX_PARTS:
        raise ImageRefused(f"{name} is a {kind} of more than {_MAX_PARTS} parts, the limit; re-encode it")
    if structure.scans > MAX_JPEG_SCANS:
        raise ImageRefused(f"{name} is a JPEG of more than {MAX_JPEG_SCANS} scans, the limit; re-encode it")
    try:
        opened = PIL.Image.open(io.BytesIO(image.data), formats=FORMATS)
    except PIL.Image.DecompressionBombError:  # Pillow checks its own cap, far above ours, in `open`
        raise ImageRefused(f"{name} claims far more than {max_pixels} pixels, the limit; scale it down") from None
    except Exception as error:
        if kind == "PNG" and "MAX_TEXT" in str(error):
            raise ImageRefused(f"{name} holds a text or profile of over 1 MiB, the limit; leave it out") from None
        what = f", {kind}) is damaged" if kind else ") is not a PNG, JPEG or WEBP image"
        raise ImageRefused(f"{name} ({len(image.data)} bytes{what}; re-encode it") from None
    width, height = opened.size
    if width * height > max_pixels:
        raise ImageRefused(f"{name} is {width}×{height} pixels, the limit is {max_pixels} in all; scale it down")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageRefused(f"{name} is {width}×{height}, the limit is an aspect ratio of {MAX_ASPECT_RATIO}; crop it")
    if opened.format in ("PNG", "WEBP") and (frames := getattr(opened, "n_frames", 1)) > 1:
        raise ImageRefused(f"{name} is an animation of {frames} frames, the limit is 1; send one of them")
    if not structure.ends:
        what = f"{width}×{height} {kind}, ends early or has a wrong checksum"
        raise ImageRefused(f"{name} ({what}) is damaged; re-encode it")
    try:
        return _draw(opened, image.data)
    except Exception:
        raise ImageRefused(f"{name} ({width}×{height} {opened.format}) is damaged; re-encode it") from None


def _draw(opened: PIL.ImageFile.ImageFile, data: bytes) -> PIL.Image.Image:
    colours, alpha = _split_alpha(opened, data)
    rgb = _to_srgb(colours, opened.info.get("icc_profile"))
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    turn = _UPRIGHT.get(_read_orientation(opened.info.get("exif")))
    upright = rgb if turn is None else rgb.transpose(turn)
    upright.info.clear()  # a file made of it would be turned, and its colours changed, once more
    return upright


def _split_alpha(opened: PIL.ImageFile.ImageFile, data: bytes) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    """Returns the colours (mode L, RGB or CMYK) and the alpha channel, None where all is opaque."""
    samples = opened.tile[0][3] if opened.format == "PNG" and opened.tile else None
    opened.load()
    key = opened.info.get("transparency")
    if opened.mode.startswith("I"):  # 16-bit grey, which Pillow's `convert` clips to its lowest 256 levels
        grey = np.asarray(opened)
        transparent = None if key is None else grey == key
        return PIL.Image.fromarray((grey >> 8).astype(np.uint8)), _make_alpha(transparent)
    if samples == "RGB;16B" and key is not None:  # the key has 16 bits, of which `load` dropped eight
        low = PIL.Image.open(io.BytesIO(data), formats=("PNG",))
        low.tile = [low.tile[0]._replace(args="RGB;16L")]
        exact = np.asarray(opened).astype(np.uint16) << 8 | np.asarray(low)
        del opened.info["transparency"]
        return opened, _make_alpha((exact == key).all(axis=-1))
    if samples in ("L;2", "L;4") and key is not None:  # `load` spreads the samples over 0..255, and not the key
        opened.info["transparency"] = key * (85 if samples == "L;2" else 17)
    alpha = opened.convert("RGBA").getchannel("A") if opened.has_transparency_data else None
    opened.info.pop("transparency", None)
    plain = "L" if opened.mode in ("1", "L", "LA") else opened.mode if opened.mode == "CMYK" else "RGB"
    return opened.convert(plain), alpha


def _make_alpha(transparent: np.ndarray | None) -> PIL.Image.Image | None:
    return None if transparent is None else PIL.Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8))


def _to_srgb(colours: PIL.Image.Image, profile: bytes | None) -> PIL.Image.Image:
    """Applies an ICC profile that changes colours visibly; one that is damaged or of other channels counts as none."""
    if profile and len(profile) <= _MAX_PROFILE_BYTES:
        try:
            transform = PIL.ImageCms.buildTransform(
                PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile)), _SRGB, colours.mode, "RGB"
            )
            if colours.mode == "CMYK" or _changes_colours(transform, colours.mode):
                return PIL.ImageCms.applyTransform(colours, transform) or colours.convert("RGB")
        except (PIL.ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return colours.convert("RGB")


def _changes_colours(transform: PIL.ImageCms.ImageCmsTransform, mode: str) -> bool:
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    grid = levels[:, None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 16, 3)
    sample = PIL.Image.fromarray(grid)
    shown = np.asarray(PIL.ImageCms.applyTransform(sample, transform)).astype(int)
    return bool(np.abs(shown - np.asarray(sample.convert("RGB"))).max() > _SAME_COLOUR)


def _read_orientation(data: bytes | None) -> int:
    """Reads the tag by which cameras say how they were held; 1, upright, where it can't be read."""
    exif = PIL.Image.Exif()
    try:
        exif.load(data or b"")
        return int(exif.get(_EXIF_ORIENTATION, 1))
    except Exception:  # Pillow raises many kinds for damaged metadata; the pixels may be sound
        return 1


def scale_to_bounds(image: PIL.Image.Image, *, min_pixels: int, max_pixels: int) -> PIL.Image.Image:
    """Scales a picture to pixel bounds, each side floored, as the paper's code does.

    A picture within the bounds is returned as it is. The floor may leave it a little below `min_pixels`. It may also
    leave 4×904 of 1×200: the longer side is then shortened to MAX_ASPECT_RATIO, beyond which processors refuse it.

    >>> scale_to_bounds(PIL.Image.new("RGB", (200, 150)), min_pixels=262_144, max_pixels=4_194_304).size
    (591, 443)
    """
    pixels = image.width * image.height
    wanted = min(max(pixels, min_pixels), max_pixels)
    if wanted == pixels:
        return image
    factor = math.sqrt(wanted / pixels)
    width, height = (max(1, int(side * factor)) for side in image.size)
    longest = MAX_ASPECT_RATIO * min(width, height)
    return image.resize((min(width, longest), min(height, longest)))


class _Structure(NamedTuple):
    """How a file is made up. parts: chunks or segments. ends: whether its end is there, and the checksums hold."""

    parts: int = 0
    scans: int = 0
    ends: bool = True


def _walk(data: bytes, kind: str | None) -> _Structure:
    return _walk_png(data) if kind == "PNG" else _walk_jpeg(data) if kind == "JPEG" else _Structure()


def _walk_png(data: bytes) -> _Structure:
    """Follows the chunks to IEND and checks their CRCs; Pillow reads no further than the last row of pixels."""
    view, position = memoryview(data), 8
    for number in range(_MAX_PARTS + 1):
        end = position + 12 + int.from_bytes(data[position : position + 4])
        if end > len(data) or zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            return _Structure(number, ends=False)
        if data[position + 4 : position + 8] == b"IEND":
            break
        position = end
    return _Structure(number)


def _walk_jpeg(data: bytes) -> _Structure:
    """Follows the segments to EOI and counts a decoder's passes over the image, the SOS markers."""
    scans, position = 0, 2
    for number in range(_MAX_PARTS + 1):
        found = _JPEG_MARKER.search(data, position)
        if found is None or scans > MAX_JPEG_SCANS:
            return _Structure(number, scans, ends=False)
        if (marker := data[found.end() - 1]) == _EOI:
            break
        scans += marker == _SOS
        length = 0 if marker == _TEM else int.from_bytes(data[found.end() : found.end() + 2])
        position = found.end() + length
    return _Structure(number, scans)
