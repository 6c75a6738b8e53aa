"""A picture reaches the models as a viewer shows it; the expected pixels follow from the specifications, by hand."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest

from tests.support.pictures import hand_made_png
from vaopd.errors import ImageRefused
from vaopd.images import decode
from vaopd.types import EncodedImage

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
WHITE = 255


def pixels(data: bytes) -> list[Any]:
    """The pixels of a row-major picture as tuples; greys as single numbers."""
    image = decode(EncodedImage(data=data))
    assert image.mode == "RGB"
    flat = np.asarray(image).reshape(-1, 3).tolist()
    return [rgb[0] if len(set(rgb)) == 1 else tuple(rgb) for rgb in flat]


def shorts(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_metadata_of_thousands_of_wrong_entries_are_not_a_word_in_the_log(format: str) -> None:
    """Pillow warns of each entry that names more data than there are: 5000 of 1 GB each, in 60 KB."""
    entries = b"".join(struct.pack(">HHII", tag, 1, 2**30, 8) for tag in range(5000))
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 5000) + entries
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(file, format, exif=exif)
    assert pixels(file.getvalue()) == [0] * 64


GREYS = [0x0000, 0x00FF, 0x1234, 0x7FFF, 0x8000, 0xFFFF]
PLTE = bytes([10, 20, 30, 200, 100, 0, 0, 0, 0, 1, 2, 3])


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        pytest.param(((6, 1), GREYS, 16, GREY, {}), [0, 0, 0x12, 127, 128, 255], id="grey 16"),
        pytest.param(((3, 2), GREYS, 16, GREY, {}), [0, 0, 0x12, 127, 128, 255], id="grey 16, two rows"),
        pytest.param(
            ((6, 1), GREYS, 16, GREY, {"tRNS": shorts(0x1234)}), [0, 0, WHITE, 127, 128, 255], id="grey 16, a key"
        ),
        pytest.param(
            ((2, 1), [0x1200, 0x1234], 16, GREY, {"tRNS": shorts(0x1234)}), [0x12, WHITE], id="grey 16, a near key"
        ),
        pytest.param(((2, 1), [0x4000, 0xFFFF, 0x4000, 0], 16, GREY_ALPHA, {}), [0x40, WHITE], id="grey 16 and alpha"),
        pytest.param(
            ((2, 1), [0x10AA, 0x20BB, 0x30CC, 0xFFFF, 0, 0], 16, RGB, {}), [(16, 32, 48), (255, 0, 0)], id="RGB 16"
        ),
        pytest.param(
            ((2, 1), [0x10AA, 0x20BB, 3, 0x10AA, 0x20BB, 4], 16, RGB, {"tRNS": shorts(0x10AA, 0x20BB, 3)}),
            [WHITE, (16, 32, 0)],
            id="RGB 16, a key that differs from a neighbour in its low byte",
        ),
        pytest.param(
            ((2, 1), [0x10AA, 0x20BB, 0x30CC, 0xFFFF, 1, 2, 3, 0], 16, RGBA, {}), [(16, 32, 48), WHITE], id="RGBA 16"
        ),
        pytest.param(((8, 1), [0, 1, 0, 1, 1, 0, 1, 0], 1, GREY, {}), [0, 255, 0, 255, 255, 0, 255, 0], id="1 bit"),
        pytest.param(((2, 1), [0, 1], 1, GREY, {"tRNS": shorts(0)}), [WHITE, 255], id="1 bit, a key"),
        pytest.param(((4, 1), [0, 1, 2, 3], 2, GREY, {}), [0, 85, 170, 255], id="2 bits"),
        pytest.param(((4, 1), [0, 1, 2, 3], 2, GREY, {"tRNS": shorts(1)}), [0, WHITE, 170, 255], id="2 bits, a key"),
        pytest.param(((3, 1), [0, 1, 7], 4, GREY, {"tRNS": shorts(7)}), [0, 17, WHITE], id="4 bits, a key"),
        pytest.param(((2, 1), [9, 7], 8, GREY, {"tRNS": shorts(7)}), [9, WHITE], id="grey 8, a key"),
        pytest.param(((3, 1), [40, 255, 40, 0, 0, 128], 8, GREY_ALPHA, {}), [40, WHITE, 127], id="grey 8 and alpha"),
        pytest.param(
            ((2, 1), [1, 2, 3, 1, 2, 4], 8, RGB, {"tRNS": shorts(1, 2, 3)}), [WHITE, (1, 2, 4)], id="RGB 8, a key"
        ),
        pytest.param(
            ((2, 1), [0, 0, 255, 51, 9, 9, 9, 0], 8, RGBA, {}), [(204, 204, 255), WHITE], id="RGBA 8, a fifth of blue"
        ),
        pytest.param(
            ((4, 1), [0, 1, 2, 3], 2, PALETTE, {"PLTE": PLTE}),
            [(10, 20, 30), (200, 100, 0), 0, (1, 2, 3)],
            id="a palette of 2 bits",
        ),
        pytest.param(
            ((4, 1), [0, 1, 2, 3], 8, PALETTE, {"PLTE": PLTE, "tRNS": bytes([255, 0, 51])}),
            [(10, 20, 30), WHITE, 204, (1, 2, 3)],
            id="a palette with alpha",
        ),
    ],
)  # fmt: skip
def test_every_kind_of_png(picture: Any, expected: list[Any]) -> None:
    size, samples, depth, colour, chunks = picture
    assert pixels(hand_made_png(size, samples, depth=depth, colour=colour, **chunks)) == expected


def test_a_16_bit_picture_is_its_8_bit_twin() -> None:
    ramp = list(range(256))
    twin = hand_made_png((16, 16), ramp, depth=8, colour=GREY)
    assert pixels(hand_made_png((16, 16), [257 * grey for grey in ramp], depth=16, colour=GREY)) == pixels(twin) == ramp


# Each number is a colour of its own; EXIF 2.3, 4.6.4 A: where the stored first row and first column are seen.
ORIENTATIONS = {
    1: [[0, 1, 2], [3, 4, 5]],
    2: [[2, 1, 0], [5, 4, 3]],
    3: [[5, 4, 3], [2, 1, 0]],
    4: [[3, 4, 5], [0, 1, 2]],
    5: [[0, 3], [1, 4], [2, 5]],
    6: [[3, 0], [4, 1], [5, 2]],
    7: [[5, 2], [4, 1], [3, 0]],
    8: [[2, 5], [1, 4], [0, 3]],
}


def with_exif(format: str, exif: bytes) -> bytes:
    """Six blocks, since a JPEG mixes the colours of neighbours."""
    stored = np.kron(np.array(ORIENTATIONS[1], dtype=np.uint8) * 40, np.ones((16, 16), dtype=np.uint8))
    file = io.BytesIO()
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(format, {})
    PIL.Image.fromarray(stored).convert("RGB").save(file, format, exif=exif, **options)
    return file.getvalue()


def tiff(orientation: int) -> bytes:
    """Little-endian TIFF: one directory with one entry, tag 0x0112, of one SHORT."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_picture_stands_as_its_orientation_says(format: str, orientation: int) -> None:
    shown = decode(EncodedImage(data=with_exif(format, tiff(orientation))))

    blocks = np.asarray(shown)[8::16, 8::16, 0].astype(int)
    assert np.round(blocks / 40).tolist() == ORIENTATIONS[orientation]


@pytest.mark.parametrize("exif", [tiff(0), tiff(9), tiff(6)[:20], b"Exif\0\0no TIFF", b"Exif\0\0"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_metadata_that_makes_no_sense_turns_nothing(format: str, exif: bytes) -> None:
    assert decode(EncodedImage(data=with_exif(format, exif))).size == (48, 32)


def test_a_file_made_of_a_decoded_picture_is_not_turned_again() -> None:
    file = io.BytesIO()
    decode(EncodedImage(data=with_exif("JPEG", tiff(6)))).save(file, "PNG")
    assert decode(EncodedImage(data=file.getvalue())).size == (32, 48)


@pytest.mark.parametrize(
    ("ink", "shown"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 0, 0), (255, 0, 255)),
        ((0, 0, 255, 0), (255, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 51), (204, 204, 204)),
    ],
)
def test_the_inks_of_a_cmyk_jpeg(ink: tuple[int, ...], shown: tuple[int, ...]) -> None:
    file = io.BytesIO()
    PIL.Image.new("CMYK", (16, 16), ink).save(file, "JPEG", quality=100)
    found = np.asarray(decode(EncodedImage(data=file.getvalue()))).reshape(-1, 3)
    assert np.abs(found.astype(int) - shown).max() <= 2


def profile_with_red_and_blue_swapped() -> bytes:
    """sRGB, whose file names the light that its first channel makes blue."""
    srgb = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    return srgb.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")


def with_profile(picture: PIL.Image.Image, profile: bytes) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", icc_profile=profile)
    return file.getvalue()


COLOURS = np.array([[[250, 0, 0], [0, 250, 0], [10, 120, 240]]], dtype=np.uint8)


def test_a_colour_profile_is_applied() -> None:
    data = with_profile(PIL.Image.fromarray(COLOURS), profile_with_red_and_blue_swapped())
    found = np.asarray(decode(EncodedImage(data=data))).astype(int)
    assert np.abs(found - [[[0, 0, 250], [0, 250, 0], [240, 120, 10]]]).max() <= 2


def test_a_colour_profile_leaves_transparency_over_white() -> None:
    picture = PIL.Image.fromarray(np.array([[[255, 0, 0, 51], [255, 0, 0, 0]]], dtype=np.uint8))
    found = np.asarray(decode(EncodedImage(data=with_profile(picture, profile_with_red_and_blue_swapped()))))
    assert np.abs(found.astype(int) - [[[204, 204, 255], [255, 255, 255]]]).max() <= 2


def srgb() -> bytes:
    return PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("profile", [srgb(), srgb()[:200], b"no profile at all"], ids=["sRGB", "cut", "words"])
def test_a_profile_of_srgb_or_none_that_can_be_read_changes_no_level(profile: bytes) -> None:
    found = np.asarray(decode(EncodedImage(data=with_profile(PIL.Image.fromarray(COLOURS), profile))))
    assert found.tolist() == COLOURS.tolist()


def test_a_profile_of_other_channels_changes_nothing() -> None:
    grey = PIL.Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint8))
    assert pixels(with_profile(grey, profile_with_red_and_blue_swapped())) == [0, 100, 255]


FORMATS: dict[str, dict[str, Any]] = {"PNG": {}, "JPEG": {}, "JPEG progressive": {"progressive": True}, "WEBP": {}}


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_ends_early_is_refused_wherever_it_ends(format: str) -> None:
    buffer = io.BytesIO()
    PIL.Image.linear_gradient("L").resize((20, 16)).save(buffer, format.partition(" ")[0], **FORMATS[format])
    data = buffer.getvalue()
    assert decode(EncodedImage(data=data + b"bytes after the end are nobody's pixels")).size == (20, 16)
    for size in range(len(data)):
        with pytest.raises(ImageRefused, match=r"is damaged; re-encode it|not a PNG, JPEG or WEBP"):
            decode(EncodedImage(data=data[:size]))


@pytest.mark.parametrize(
    "data",
    [
        hand_made_png((1, 1), [0], depth=8, colour=GREY).replace(
            b"\0\0\0\0IEND", (struct.pack(">I", 0) + b"teSt" + struct.pack(">I", zlib.crc32(b"teSt"))) * 40_000, 1
        ),
        b"\xff\xd8" + b"\xff\xfe\0\2" * 40_000 + b"\xff\xd9",
    ],
    ids=["PNG", "JPEG"],
)
def test_a_file_of_countless_parts_is_refused(data: bytes) -> None:
    """Python code walks them, here and in Pillow: 32 MB would take it half a minute."""
    with pytest.raises(ImageRefused, match="of more than 32768 parts, the limit; re-encode it"):
        decode(EncodedImage(data=data))
