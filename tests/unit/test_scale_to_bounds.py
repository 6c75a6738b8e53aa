"""The picture that both views are made of: scaled to the pixel bounds, each side floored."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from vaopd.degradation import pixelate
from vaopd.images import scale_to_bounds

PAPER = {"min_pixels": 262_144, "max_pixels": 4_194_304}


@pytest.mark.parametrize(
    ("stored", "scaled", "cells"),
    [
        ((200, 150), (591, 443), (59, 44)),  # × √(262144 / 30000) = 2.95602: 591.2 × 443.4
        ((96, 96), (512, 512), (51, 51)),  # × 5.33333
        ((512, 512), (512, 512), (51, 51)),  # exactly the fewest
        ((1000, 700), (1000, 700), (100, 70)),  # within
        ((2048, 2048), (2048, 2048), (204, 204)),  # exactly the most
        ((4000, 3000), (2364, 1773), (236, 177)),  # × √(4194304 / 12000000) = 0.591207: 2364.8 × 1773.6
        ((3, 600), (36, 7200), (3, 720)),  # × √(262144 / 1800) = 12.0680: 36.2 × 7240.8, over 200 to 1
    ],
)
def test_sides_are_scaled_by_one_factor_and_floored(
    stored: tuple[int, int], scaled: tuple[int, int], cells: tuple[int, int]
) -> None:
    width, height = stored
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)  # no two columns or rows are alike
    picture = scale_to_bounds(PIL.Image.fromarray(noise), **PAPER)
    assert picture.size == scaled
    degraded = pixelate(picture, 0.1)
    columns = {degraded.crop((x, 0, x + 1, scaled[1])).tobytes() for x in range(scaled[0])}
    rows = {degraded.crop((0, y, scaled[0], y + 1)).tobytes() for y in range(scaled[1])}
    assert (len(columns), len(rows)) == cells


def test_a_picture_within_the_bounds_is_the_same_object() -> None:
    picture = PIL.Image.new("RGB", (600, 600))
    assert scale_to_bounds(picture, **PAPER) is picture
