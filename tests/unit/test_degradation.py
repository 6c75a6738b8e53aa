"""Degraded views: pixelation by hand-computed values, and that every kind keeps size and mode."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from PIL import Image

from vaopd.degradation import degrade, has_strength, pixelate, view_name
from vaopd.errors import InvalidInput
from vaopd.pb import teacher_pb2
from vaopd.types import DEGRADATIONS, Degradation, DegradationKind
from vaopd.wire.teacher import DEGRADATION_KINDS

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
KINDS = tuple(DEGRADATIONS)


def noisy(mode: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, size=(size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return image.convert("RGB").convert(mode) if mode in ("P", "1", "CMYK") else image.convert(mode)


def test_every_kind_has_a_type_a_number_on_the_wire_and_a_function() -> None:
    """The last one is shown by every test of all KINDS."""
    assert get_args(DegradationKind) == KINDS
    assert {0, *DEGRADATION_KINDS.values()} == set(teacher_pb2.DegradationKind.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_s_name_tells_strengths_apart_where_they_matter(kind: DegradationKind) -> None:
    weak, strong = Degradation(kind=kind, strength=0.9), Degradation(kind=kind, strength=0.1)
    image = noisy("RGB")
    same_pixels = degrade(image, weak, seed=0).tobytes() == degrade(image, strong, seed=0).tobytes()
    assert same_pixels == (view_name(weak) == view_name(strong)) == (not has_strength(weak))


def test_constant_halves_become_constant_blocks() -> None:
    """4×1 px, two dark and two light, ratio 0.5: pairs merge into 2 px, which are then doubled.

    Bilinear shrinking by 2 weighs the source pixels around an output pixel by a triangle. For the left output pixel,
    centred at 1.0 in the source, those at 0.5, 1.5 and 2.5 weigh 0.75, 0.75 and 0.25 (there is none at −0.5).
    """
    row = Image.fromarray(np.array([[0, 0, 140, 140]], dtype=np.uint8))

    blocks = np.asarray(pixelate(row, ratio=0.5)).tolist()

    # left: 140·0.25/1.75 = 20; right, by symmetry: 140 − 20 = 120
    assert blocks == [[20, 20, 120, 120]]


def test_the_papers_ratio_makes_blocks_of_ten_pixels() -> None:
    pixels = np.asarray(pixelate(noisy("L", (40, 20))))

    for top in range(0, 20, 10):
        for left in range(0, 40, 10):
            assert len(np.unique(pixels[top : top + 10, left : left + 10])) == 1
    assert len(np.unique(pixels)) > 1


@pytest.mark.parametrize(("side", "blocks"), [(96, 9), (99, 9), (100, 10), (19, 1), (5, 1)])
def test_the_small_side_is_rounded_down_and_at_least_one_pixel(side: int, blocks: int) -> None:
    ramp = Image.fromarray(np.linspace(0, 255, side, dtype=np.uint8)[None, :])

    assert len(np.unique(np.asarray(pixelate(ramp)))) == blocks


def test_a_whole_number_of_pixels_is_not_lost_to_binary_fractions() -> None:
    """100 · 0.29 is 28.999… in floating point; the side must be 29."""
    ramp = Image.fromarray(np.linspace(0, 255, 100, dtype=np.uint8)[None, :])

    assert len(np.unique(np.asarray(pixelate(ramp, ratio=0.29)))) == 29


@pytest.mark.parametrize("mode", MODES)
def test_ratio_one_is_the_identity(mode: str) -> None:
    image = noisy(mode)

    assert pixelate(image, ratio=1.0).tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_size_and_mode_are_kept_and_the_input_is_left_alone(kind: DegradationKind, mode: str) -> None:
    image = noisy(mode)
    before = image.tobytes()

    degraded = degrade(image, Degradation(kind=kind), seed=0)

    assert (degraded.size, degraded.mode) == (image.size, mode)
    assert image.tobytes() == before


def test_palette_images_are_averaged_by_colour_not_by_index() -> None:
    """Index 0 is black and 1 white: a fine chequerboard must become grey, whatever the indices are called."""
    chequer = Image.fromarray((np.indices((20, 20)).sum(axis=0) % 2).astype(np.uint8))
    chequer = chequer.convert("P")
    chequer.putpalette([0, 0, 0, 255, 255, 255])

    grey = np.asarray(pixelate(chequer).convert("L"))

    assert np.abs(grey.astype(int) - 128).max() <= 2


def test_transparency_of_a_palette_image_survives() -> None:
    """Left half index 0, transparent; right half index 1."""
    halves = Image.fromarray((np.indices((20, 40))[1] >= 20).astype(np.uint8)).convert("P")
    halves.info["transparency"] = 0

    alpha = np.asarray(pixelate(halves).convert("RGBA"))[:, :, 3]

    assert alpha[:, :10].max() == 0
    assert alpha[:, 30:].min() == 255


def test_mean_colour_is_the_mean_pixel() -> None:
    image = Image.fromarray(np.array([[[10, 0, 0], [30, 0, 100]]], dtype=np.uint8))

    assert np.asarray(degrade(image, Degradation(kind="mean_colour"), seed=0)).tolist() == [[[20, 0, 50], [20, 0, 50]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["black", "noise"])
def test_no_shape_is_left_in_the_alpha_band(mode: str, kind: str) -> None:
    degraded = degrade(noisy(mode), Degradation(kind=kind), seed=0)  # type: ignore[arg-type]

    assert degraded.getchannel("A").getextrema() == (255, 255)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_black_is_black(mode: str) -> None:
    black = degrade(noisy(mode), Degradation(kind="black"), seed=0)

    assert np.asarray(black.convert("RGB")).max() == 0


def test_noise_depends_on_the_seed_and_on_nothing_else() -> None:
    image = noisy("RGB")
    first, again, other = (degrade(image, Degradation(kind="noise"), seed=seed).tobytes() for seed in (1, 1, 2))

    assert first == again != other


def test_blur_spreads_a_dot_and_keeps_its_mass() -> None:
    dot = np.zeros((41, 41), dtype=np.uint8)
    dot[20, 20] = 255
    blurred = np.asarray(degrade(Image.fromarray(dot), Degradation(kind="blur", strength=0.05), seed=0)).astype(int)

    assert blurred[20, 20] < 60
    assert blurred[20, 21] > 0
    assert abs(blurred.sum() - 255) < 40  # whole grey levels: some rounding per pixel


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(InvalidInput, match=r"above 0 and at most 1.*got"):
        pixelate(noisy("RGB"), ratio=ratio)


@pytest.mark.parametrize(
    "degradation",
    [
        Degradation(kind="blur", strength=0.0),
        Degradation(kind="blur", strength=float("nan")),
        Degradation(kind="pixelate", strength=2.0),
    ],
)
def test_a_strength_outside_its_range_is_refused(degradation: Degradation) -> None:
    with pytest.raises(InvalidInput, match=r"strength \(.*\) must be in \(0, 1\], got"):
        degrade(noisy("RGB"), degradation, seed=0)


def test_an_unknown_kind_or_mode_is_refused_with_the_remedy() -> None:
    with pytest.raises(InvalidInput, match="use one of pixelate"):
        degrade(noisy("RGB"), Degradation(kind="sepia"), seed=0)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"convert\('RGB'\)"):
        pixelate(Image.new("I;16", (20, 20)))
