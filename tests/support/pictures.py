"""Image files that no camera makes."""

from __future__ import annotations

import io
import struct
import zlib

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


def with_changed_byte(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


def jpeg_of_many_scans() -> bytes:
    """A progressive JPEG whose last scan stands there a hundred times; each costs a decoder the whole image."""
    buffer = io.BytesIO()
    PIL.Image.new("L", (64, 64)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 100 + data[-2:]
