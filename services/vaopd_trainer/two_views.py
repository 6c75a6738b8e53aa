"""Reads prompts with the image and with the degraded image, and computes both views in forwards of the student's model.

In: prompts as token ids, their images, their responses. Out: hidden states and log-probs of the responses' tokens in
either view, without gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vaopd.degradation import degrade, view_seed
from vaopd.divergence import token_logprobs
from vaopd.images import decode
from vaopd.types import Degradation, EncodedImage
from vaopd.vlm.model import Segment, Vlm
from vaopd.vlm.transfer import upload

Views = tuple[Segment, Segment]
"""A prompt with its responses, with the image and with the degraded image."""


class ComputedView(NamedTuple):
    """One view of one prompt: hidden states (M, D) and log-probs (M,) float32 of its responses' M tokens."""

    hidden: Tensor
    logprobs: np.ndarray


def read_views(
    student: Vlm,
    prompt_token_ids: np.ndarray,
    images: Iterable[EncodedImage],
    responses: Sequence[np.ndarray],
    degradation: Degradation,
) -> Views:
    """Returns a rendered prompt in both views; `images` are in the order of the prompt."""
    original, degraded = [], []
    for image in images:
        scaled = student.scale_image(decode(image))
        original.append(student.prepare_image(scaled))
        worse = degrade(scaled, degradation, seed=view_seed(image.sha256))
        degraded.append(student.prepare_image(worse))
    with_image, without = (
        Segment(prompt=student.read_token_ids(prompt_token_ids, view), responses=tuple(responses))
        for view in (original, degraded)
    )
    return with_image, without


def pack_views(every: Iterable[Views], *, most_tokens: int) -> Iterator[list[Views]]:
    """Yields as many prompts as fit in a forward, at least one; `every` is read on the way."""
    batch: list[Views] = []
    tokens = 0
    for views in every:
        cost = sum(view.tokens for view in views)
        if batch and tokens + cost > most_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(views)
        tokens += cost
    if batch:
        yield batch


@torch.no_grad()
def compute_views(
    student: Vlm, batch: Sequence[Views], *, chunk_tokens: int, half: bool = False
) -> Iterator[tuple[ComputedView, ComputedView]]:
    """Yields both views of each prompt, of one forward. half: bfloat16 by autocast, for weights that are float32."""
    segments = [view for views in batch for view in views]
    device = student.device
    # Compiled layers would be compiled once more for a forward without gradients.
    with torch.compiler.set_stance("force_eager"), torch.autocast(device.type, torch.bfloat16, half):
        hidden = student.compute_response_hidden(segments)
        ids = np.concatenate([ids for segment in segments for ids in segment.responses])
        logprobs = token_logprobs(
            hidden,
            student.padded_head.detach(),
            upload(torch.from_numpy(ids), hidden.device),
            vocab_size=student.vocab_size,
            chunk_tokens=chunk_tokens,
        )
    lengths = [sum(map(len, segment.responses)) for segment in segments]
    rows = np.split(logprobs.cpu().numpy(), np.cumsum(lengths)[:-1])
    computed = map(ComputedView, hidden.split(lengths), rows)
    yield from zip(computed, computed, strict=True)
