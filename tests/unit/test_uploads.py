"""Base64 in the forms that encoders write it."""

from __future__ import annotations

import base64
import io

import numpy as np
import PIL.Image
import pytest

from vaopd_api.problems import ApiError
from vaopd_api.uploads import image_from_text


def a_png() -> bytes:
    """Noise: its base64 holds every letter of the alphabet, and is not a multiple of 3 bytes long."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    data = buffer.getvalue()
    return data + b"\0" * (1 - len(data) % 3)  # decoders ignore what follows a picture


PNG = a_png()
PLAIN = base64.b64encode(PNG).decode()
URL_SAFE = base64.urlsafe_b64encode(PNG).decode()
LINES = base64.encodebytes(PNG).decode()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(PLAIN, id="one line"),
        pytest.param(LINES, id="76 columns"),
        pytest.param(LINES.replace("\n", "\r\n"), id="CRLF"),
        pytest.param(f"  {PLAIN}\n", id="white space around"),
        pytest.param(URL_SAFE, id="URL-safe"),
        pytest.param(URL_SAFE.rstrip("="), id="without padding"),
        pytest.param(f"data:image/png;base64,{LINES}", id="data URL in lines"),
        pytest.param(f"data:image/png;base64,{URL_SAFE}", id="URL-safe data URL"),
    ],
)
def test_base64_is_taken_as_encoders_write_it(text: str) -> None:
    assert "-" in URL_SAFE
    assert "_" in URL_SAFE
    assert image_from_text(text, field="image").data == PNG


@pytest.mark.parametrize("text", ["not base64!", PLAIN[:40] + "é" + PLAIN[40:], PLAIN[:41], "=" * 8 + PLAIN])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ApiError):
        image_from_text(text, field="image")
