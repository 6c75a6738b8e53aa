"""What the API and `vaopd score` share: an ad-hoc prompt, and a group's rollout weights in numpy. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vaopd.types import EncodedImage, ImagePart, Message, TextPart


def user_turn(question: str, images: Sequence[EncodedImage]) -> tuple[Message, ...]:
    """One user message: the images in order, then the question, as the data sets have it."""
    parts: tuple[ImagePart | TextPart, ...] = (
        *(ImagePart(sha256=image.sha256) for image in images),
        TextPart(text=question),
    )
    return (Message(role="user", content=parts),)


def unique_images(images: Sequence[EncodedImage]) -> tuple[EncodedImage, ...]:
    """Each image once, in order of first appearance."""
    return tuple({image.sha256: image for image in images}.values())


def rollout_weights(mean_va: np.ndarray, *, temperature: float = 1.0, eps: float = 1e-6) -> np.ndarray:
    """(K,) -> (K,), method.md "Rollout weights": softmax of the standardised means; they add up to 1.

    >>> rollout_weights(np.array([0.5, 0.5])).tolist()
    [0.5, 0.5]
    """
    z = (mean_va - mean_va.mean()) / (mean_va.std() + eps)
    exponentials = np.exp(z / temperature - (z / temperature).max())
    return exponentials / exponentials.sum()
