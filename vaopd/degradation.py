"""The degraded view: the same picture with its detail taken away (method.md, "Visual advantage").

Size and mode stay those of the input, so the image grid, the number of image tokens and every position id stay too, and
only pixels differ. The paper's degradation is pixelation to 10 %; the others are options for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from vaopd.errors import InvalidInput
from vaopd.types import Degradation

_OPAQUE = 255
# Pillow resamples these as they are; colours by way of another mode, and back again.
_PLAIN_MODES = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")


def degrade(image: Image.Image, degradation: Degradation, *, seed: int) -> Image.Image:
    """The degraded view of `image`: same size, same mode. `seed` matters to "noise" only.

    pixelate: `pixelate(image, strength)`. blur: Gaussian, its radius `strength` times the shorter side. mean_colour:
    every pixel is the mean pixel. black, noise (uniform in every band): opaque where the mode has an alpha band, so
    that no shape is left in it.
    """
    if degradation.kind == "pixelate":
        return pixelate(image, degradation.strength)
    if degradation.kind == "blur":
        if not 0.0 < degradation.strength <= 1.0:
            raise InvalidInput(
                f"blur strength must be above 0 and at most 1 (radius / shorter side), got {degradation.strength}"
            )
        radius = degradation.strength * min(image.size)
        return _by_plain_mode(image, lambda plain: plain.filter(ImageFilter.GaussianBlur(radius)))
    if degradation.kind == "mean_colour":
        return _by_plain_mode(image, _mean_colour)
    if degradation.kind == "black":
        return _by_plain_mode(image, lambda plain: _opaque(Image.new("RGB", plain.size).convert(plain.mode)))
    if degradation.kind == "noise":
        return _by_plain_mode(image, lambda plain: _noise(plain, seed))
    raise InvalidInput(
        f"degradation {degradation.kind!r} is unknown; use one of pixelate, blur, mean_colour, black, noise"
    )


def pixelate(image: Image.Image, ratio: float = 0.1) -> Image.Image:
    """Shrink each side to `ratio` (bilinear; floor, at least 1 px), then enlarge back with nearest neighbour.

    Ratio 1 is the identity, exactly. The result has the input's size and mode.
    """
    if not 0.0 < ratio <= 1.0:  # refuses NaN too
        raise InvalidInput(f"pixelation ratio must be above 0 and at most 1 (the paper: 0.1), got {ratio}")
    if ratio == 1.0:
        return image.copy()
    small = (_shrunk(image.width, ratio), _shrunk(image.height, ratio))
    return _by_plain_mode(
        image,
        lambda plain: plain.resize(small, Image.Resampling.BILINEAR).resize(plain.size, Image.Resampling.NEAREST),
    )


def _shrunk(side_px: int, ratio: float) -> int:
    # The small term keeps a whole number whole: 100 * 0.29 is 28.999… in binary.
    return max(1, math.floor(side_px * ratio + 1e-9))


def _by_plain_mode(image: Image.Image, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Apply `change` in a mode that can be resampled (palette indices can't), then return to the image's own mode."""
    if image.mode in _PLAIN_MODES:
        return change(image)
    if image.mode == "1":
        return change(image.convert("L")).convert("1", dither=Image.Dither.NONE)
    if image.mode == "P":
        plain = change(image.convert("RGBA" if "transparency" in image.info else "RGB"))
        return plain.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    raise InvalidInput(f"an image of mode {image.mode!r} can't be degraded; convert it first, e.g. with convert('RGB')")


def _mean_colour(plain: Image.Image) -> Image.Image:
    pixels = np.asarray(plain, dtype=np.float64)
    mean = np.atleast_1d(pixels.mean(axis=(0, 1))).round().astype(int).tolist()
    return Image.new(plain.mode, plain.size, tuple(mean) if len(mean) > 1 else mean[0])


def _noise(plain: Image.Image, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    bands = [
        Image.fromarray(rng.integers(0, 256, size=(plain.height, plain.width), dtype=np.uint8))
        for _ in plain.getbands()
    ]
    return _opaque(Image.merge(plain.mode, bands) if len(bands) > 1 else bands[0])


def _opaque(plain: Image.Image) -> Image.Image:
    if "A" in plain.getbands():
        plain.putalpha(_OPAQUE)
    return plain
