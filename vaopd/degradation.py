"""Makes the degraded view: the same picture with its detail taken away.

Size and mode stay those of the input, so the image grid, the number of image tokens and every position id stay too, and
only pixels differ. The paper's degradation is pixelation to 10 %; the others are options for comparison.

A new kind takes three edits: its name and the meaning of its strength in `vaopd.types.DEGRADATIONS`, its function in
`_DEGRADE` below, and its number in `proto/vaopd/pb/teacher.proto` (then `make proto`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageFilter

from vaopd.errors import InvalidInput
from vaopd.types import DEGRADATIONS, Degradation, DegradationKind

_OPAQUE = 255
# Pillow resamples these directly; colours of other modes pass through one of them and back.
_PLAIN_MODES = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")


def degrade(image: Image.Image, degradation: Degradation, *, seed: int) -> Image.Image:
    """Returns the degraded view of `image`, with its size and mode. Only "noise" uses `seed`: see `view_seed`.

    pixelate: `pixelate(image, strength)`. blur: Gaussian, its radius `strength` times the shorter side. mean_colour:
    every pixel is the mean pixel. black, noise (uniform in every band): opaque where the mode has an alpha band, so
    that no shape is left in it. Raises InvalidInput for an unknown kind, a strength out of range, or an unusual mode.
    """
    if degradation.kind not in _DEGRADE:
        raise InvalidInput(f"degradation {degradation.kind!r} is unknown; use one of {', '.join(_DEGRADE)}")
    check_strength(degradation)
    return _DEGRADE[degradation.kind](image, degradation.strength, seed)


def has_strength(degradation: Degradation) -> bool:
    """Whether the degraded view depends on `strength`."""
    return DEGRADATIONS[degradation.kind] is not None


def check_strength(degradation: Degradation) -> None:
    """Raises InvalidInput for a strength outside (0, 1], where the kind has one."""
    if has_strength(degradation) and not 0.0 < degradation.strength <= 1.0:  # refuses NaN too
        raise InvalidInput(
            f"{degradation.kind} strength ({DEGRADATIONS[degradation.kind]}) must be in (0, 1], "
            f"got {degradation.strength}",
            field="degradation.strength",
        )


def view_name(degradation: Degradation) -> str:
    """Names a degraded view; equal names mean equal pixels of the same image.

    >>> view_name(Degradation()), view_name(Degradation(kind="black"))
    ('pixelate:0.1', 'black')
    """
    return f"{degradation.kind}:{degradation.strength!r}" if has_strength(degradation) else degradation.kind


def view_seed(sha256: str) -> int:
    """Returns the seed of an image's "noise" view, from its content: scoring a group again gives the same answer.

    >>> view_seed("00000000000000ff" + "0" * 48)
    255
    """
    return int(sha256[:16], 16)


def pixelate(image: Image.Image, ratio: float = 0.1) -> Image.Image:
    """Shrinks each side to `ratio` (bilinear; floor, at least 1 px), then enlarges back with nearest neighbour.

    Ratio 1 is the identity, exactly. The result has the input's size and mode. Raises InvalidInput outside (0, 1].
    """
    if not 0.0 < ratio <= 1.0:  # refuses NaN too
        raise InvalidInput(f"pixelation ratio must be above 0 and at most 1 (the paper: 0.1), got {ratio}")
    if ratio == 1.0:
        return image.copy()
    small = (_shrink_side(image.width, ratio), _shrink_side(image.height, ratio))
    return _apply_in_plain_mode(
        image, lambda plain: plain.resize(small, Image.Resampling.BILINEAR).resize(plain.size, Image.Resampling.NEAREST)
    )


def _shrink_side(side_px: int, ratio: float) -> int:
    # The small term keeps a whole number whole: 100 * 0.29 is 28.999… in binary.
    return max(1, math.floor(side_px * ratio + 1e-9))


def _apply_in_plain_mode(image: Image.Image, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Applies `change` in a mode that can be resampled (palette indices can't), then returns to the own mode."""
    if image.mode in _PLAIN_MODES:
        return change(image)
    if image.mode == "1":
        return change(image.convert("L")).convert("1", dither=Image.Dither.NONE)
    if image.mode == "P":
        plain = change(image.convert("RGBA" if "transparency" in image.info else "RGB"))
        return plain.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    raise InvalidInput(f"an image of mode {image.mode!r} can't be degraded; convert it first, e.g. with convert('RGB')")


def _blur(plain: Image.Image, strength: float) -> Image.Image:
    return plain.filter(ImageFilter.GaussianBlur(strength * min(plain.size)))


def _fill_with_mean(plain: Image.Image) -> Image.Image:
    pixels = np.asarray(plain, dtype=np.float64)
    mean = np.atleast_1d(pixels.mean(axis=(0, 1))).round().astype(int).tolist()
    return Image.new(plain.mode, plain.size, tuple(mean) if len(mean) > 1 else mean[0])


def _fill_with_black(plain: Image.Image) -> Image.Image:
    return _make_opaque(Image.new("RGB", plain.size).convert(plain.mode))


def _draw_noise(plain: Image.Image, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    bands = [
        Image.fromarray(rng.integers(0, 256, size=(plain.height, plain.width), dtype=np.uint8))
        for _ in plain.getbands()
    ]
    return _make_opaque(Image.merge(plain.mode, bands) if len(bands) > 1 else bands[0])


def _make_opaque(plain: Image.Image) -> Image.Image:
    if "A" in plain.getbands():
        plain.putalpha(_OPAQUE)
    return plain


# Image, strength, seed -> degraded view.
_DEGRADE: Mapping[DegradationKind, Callable[[Image.Image, float, int], Image.Image]] = {
    "pixelate": lambda image, strength, _: pixelate(image, strength),
    "blur": lambda image, strength, _: _apply_in_plain_mode(image, lambda plain: _blur(plain, strength)),
    "mean_colour": lambda image, *_: _apply_in_plain_mode(image, _fill_with_mean),
    "black": lambda image, *_: _apply_in_plain_mode(image, _fill_with_black),
    "noise": lambda image, _, seed: _apply_in_plain_mode(image, lambda plain: _draw_noise(plain, seed)),
}
