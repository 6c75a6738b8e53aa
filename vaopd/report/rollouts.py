"""The report's rollouts: tokens coloured by VA, the high group outlined, the image beside its degraded view.

Reads samples.jsonl as the trainer writes it: one line per rollout of the first step, the last one, and every step that
was evaluated.
"""

from __future__ import annotations

import base64
import io
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from vaopd.degradation import degrade, view_seed
from vaopd.images import decode
from vaopd.run.records import Run, json_lines
from vaopd.types import Degradation, EncodedImage

GROUPS_SHOWN = 3  # of the first step that has any, and of the last
FULL_COLOUR_NATS = 1.0  # the VA from which a token has the full colour
SHOWN_PX = 512  # the longer side of an image in the page
Rollout = Mapping[str, Any]


class Picture(NamedTuple):
    """One view of a group's image, as a data URL."""

    name: str
    url: str


class Token(NamedTuple):
    """One token of a rollout: `colour` from 0 to 1 by its VA, and its numbers in words."""

    text: str
    colour: float
    high: bool
    numbers: str


class ShownRollout(NamedTuple):
    """One rollout; `correct` is None where the run didn't record it."""

    tokens: list[Token]
    weight: float
    correct: bool | None


class ShownGroup(NamedTuple):
    """One prompt group with the pictures of its image, if it has one."""

    question: str
    answer: str
    pictures: list[Picture]
    rollouts: list[ShownRollout]


def sampled_groups(run: Run) -> list[tuple[int, list[ShownGroup]]]:
    """Groups of the first and of the last step with samples; those that have their image come first."""
    path = run.folder / "samples.jsonl"
    steps: dict[int, dict[str, list[Rollout]]] = defaultdict(lambda: defaultdict(list))
    if path.exists():
        for _, line in json_lines(path):
            steps[line["step"]][line["group_id"]].append(line)
    shown = []
    for step in dict.fromkeys((min(steps), max(steps))) if steps else ():
        groups = sorted(steps[step].values(), key=lambda group: _image_of(group) is None)
        shown.append((step, [_group(group, run) for group in groups[:GROUPS_SHOWN]]))
    return shown


def high_tokens(advantages: Sequence[float], fraction: float) -> set[int]:
    """The ⌈fraction · T⌉ tokens of largest VA, of equal ones the earlier (method.md, "Token groups").

    >>> sorted(high_tokens([0.0, 2.0, 0.5, 0.5], 0.5))
    [1, 2]
    """
    order = sorted(range(len(advantages)), key=lambda index: (-advantages[index], index))
    return set(order[: math.ceil(round(fraction * len(advantages), 9))])


def _group(rollouts: Sequence[Rollout], run: Run) -> ShownGroup:
    data = _image_of(rollouts)
    fraction = float(run.config.get("objective", {}).get("high_fraction", 0.2))
    return ShownGroup(
        question=rollouts[0]["question"],
        answer=str(rollouts[0]["answer"]),
        pictures=list(_pictures(data, run)) if data is not None else [],
        rollouts=[
            ShownRollout(_tokens(rollout, fraction), rollout["rollout_weight"], rollout.get("correct"))
            for rollout in rollouts
        ],
    )


def _tokens(rollout: Rollout, high_fraction: float) -> list[Token]:
    advantages = rollout["visual_advantage"]
    high = high_tokens(advantages, high_fraction)
    others = {
        "teacher": rollout["teacher_logprobs"],
        "degraded": rollout.get("degraded_logprobs"),
        "student": rollout.get("rollout_logprobs"),
        "KL": rollout.get("kl"),
    }
    tokens = []
    for index, (text, va) in enumerate(zip(rollout["tokens"], advantages, strict=True)):
        numbers = [f"VA {va:.3f}", *(f"{name} {v[index]:.3f}" for name, v in others.items() if v is not None)]
        tokens.append(Token(text, min(va / FULL_COLOUR_NATS, 1.0), index in high, ", ".join(numbers)))
    return tokens


def _image_of(rollouts: Sequence[Rollout]) -> str | None:
    # Only one rollout of a group carries the image.
    return next((rollout["image_base64"] for rollout in rollouts if rollout.get("image_base64")), None)


def _pictures(data: str, run: Run) -> Iterator[Picture]:
    """The image and what the teacher sees of it in the degraded view; large ones are scaled down for the page."""
    settings = run.config.get("degradation", {})
    degradation = Degradation(kind=settings.get("kind", "pixelate"), strength=settings.get("strength", 0.1))
    encoded = EncodedImage(data=base64.b64decode(data))
    image = decode(encoded)
    yield _picture(image, "the image")
    degraded = degrade(image, degradation, seed=view_seed(encoded.sha256))
    yield _picture(degraded, f"degraded: {degradation.kind.replace('_', ' ')}")


def _picture(image: Image.Image, name: str) -> Picture:
    shown = image.convert("RGB")
    if max(shown.size) > SHOWN_PX:
        shown.thumbnail((SHOWN_PX, SHOWN_PX))
    file = io.BytesIO()
    shown.save(file, "PNG")
    return Picture(name, f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
