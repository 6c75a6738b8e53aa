"""One training example of a tiny model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    """A question about an image, and its answer."""

    prompt: str
    response: str
    image: np.ndarray
    """(96, 96, 3) uint8"""
    expected: np.ndarray | None = None
    """Probability of each token of the response and its end, (T, V), where it is known; a row that adds up to more than
    1 counts for so much more. None: the response's own tokens."""
