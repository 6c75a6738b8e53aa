"""Image files that no camera makes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import PIL.Image


def saved(format: str, *, size: tuple[int, int] = (32, 32), frames: int = 1) -> bytes:
    """A grey picture, or that many of them."""
    buffer = io.BytesIO()
    further = [PIL.Image.new("L", size, 10 * n) for n in range(1, frames)]
    PIL.Image.new("L", size).save(buffer, format, **({"save_all": True, "append_images": further} if further else {}))
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A header by itself: width and height stand at bytes 16 to 23, their checksum at 29."""
    data = bytearray(saved("PNG", size=(8, 8)))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def hand_made_png(size: tuple[int, int], samples: Sequence[int], *, depth: int, colour: int, **chunks: bytes) -> bytes:
    """A PNG by the specification: samples in reading order, `colour` as in IHDR, `chunks` such as tRNS before IDAT."""
    width, height = size
    per_row = len(samples) // height
    rows = []
    for start in range(0, len(samples), per_row):
        bits = "".join(f"{sample:0{depth}b}" for sample in samples[start : start + per_row])
        bits = bits.ljust(-(-len(bits) // 8) * 8, "0")
        rows.append(b"\0" + int(bits, 2).to_bytes(len(bits) // 8))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *((name.encode(), data) for name, data in chunks.items())]
    parts += [(b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def with_changed_byte(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


def jpeg_of_many_scans() -> bytes:
    """A progressive JPEG whose last scan stands there a hundred times; each costs a decoder the whole image."""
    buffer = io.BytesIO()
    PIL.Image.new("L", (64, 64)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 100 + data[-2:]
