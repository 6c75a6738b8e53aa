"""Reads the images of requests: base64, data URL or bytes. Nothing is fetched or decoded here."""

from __future__ import annotations

import base64
import binascii
import re

from vaopd.types import EncodedImage
from vaopd_api.problems import ApiError

# Common formats other than ours, answered 415; all else is no image, answered 422.
OTHER_FORMATS = re.compile(
    rb"GIF8|BM....\x00\x00|II\*\x00|MM\x00\*|%!PS|\xc5\xd0\xd3\xc6|%PDF|\x00\x00\x01\x00|\x00\x00\x00.(ftyp|jP  )|8BPS"
    rb"|\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg",
    re.DOTALL,
)
BEGINNING_BYTES = 2048  # enough to recognise a format
URL_SAFE = str.maketrans("-_", "+/")
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def image_from_text(text: str, *, field: str) -> EncodedImage:
    """Returns an image from base64 or a data URL. Raises ApiError: 415 for another format, 422 for no image."""
    if ADDRESS.match(text):
        raise ApiError(422, f"{field} is an address; nothing is fetched: send the file's bytes as base64", field=field)
    if text.startswith("data:"):
        header, separator, text = text.partition(",")
        if not separator or not header.endswith(";base64"):
            raise ApiError(422, f"{field} is a data URL without base64; use data:image/png;base64,…", field=field)
    # As encoders write it: lines of 76 characters, the URL-safe alphabet, no padding.
    text = "".join(text.split()).translate(URL_SAFE).rstrip("=")
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(
            422, f"{field} is not base64 ({len(text)} characters); send a file's bytes", field=field
        ) from None
    return image_from_bytes(data, field=field)


def image_from_bytes(data: bytes, *, field: str) -> EncodedImage:
    """Returns an image from its file's bytes. Raises ApiError as `image_from_text` does."""
    if OTHER_FORMATS.match(data[:BEGINNING_BYTES]):
        raise ApiError(415, f"{field} is in another format than PNG, JPEG and WEBP; re-encode it", field=field)
    if not (data.startswith((b"\x89PNG", b"\xff\xd8\xff")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")):
        raise ApiError(422, f"{field} ({len(data)} bytes) is not a PNG, JPEG or WEBP image; re-encode it", field=field)
    return EncodedImage(data=data)
