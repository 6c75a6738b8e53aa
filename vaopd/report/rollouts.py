"""Selects the rollouts that a report shows: tokens with their VA, the high group, the image in both views.

Reads samples.jsonl as the trainer writes it: a line for each rollout of the first step, the last one, and every step
that was evaluated.
"""

from __future__ import annotations

import base64
import io
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vaopd.files.plain import MIB
from vaopd.run.json_lines import read_json_lines
from vaopd.run.records import Run
from vaopd.scoring.views import Views, make_views
from vaopd.scoring.weights import HIGH_FRACTION, high_group
from vaopd.types import Degradation, EncodedImage

GROUPS_SHOWN = 3  # of each step
FULL_COLOUR_NATS = 1.0  # the VA from which a token has the full colour
SHOWN_PX = 512  # the longer side of an image in the page
SAMPLES_BYTES = 512 * MIB  # of samples.jsonl, in seconds; what is shown of it is a few lines
Rollout = Mapping[str, Any]


class Picture(NamedTuple):
    """One view of a group's image, as a data URL."""

    name: str
    url: str


class Token(NamedTuple):
    """One token of a rollout: `colour` from 0 to 1 by its VA, and all its numbers as text."""

    text: str
    colour: float
    high: bool
    numbers: str


class ShownRollout(NamedTuple):
    """One rollout; `verdict` is "right", "wrong", "not judged", or empty where the run didn't record it."""

    tokens: list[Token]
    weight: float
    verdict: str


class ShownGroup(NamedTuple):
    """One prompt group; without an image there are no pictures."""

    question: str
    answer: str
    pictures: list[Picture]
    rollouts: list[ShownRollout]


def select_groups(run: Run) -> list[tuple[int, list[ShownGroup]]]:
    """Returns the first and last step with samples, with up to GROUPS_SHOWN groups each, images first."""
    path = run.folder / "samples.jsonl"
    steps: dict[int, dict[str, list[Rollout]]] = defaultdict(lambda: defaultdict(list))
    for _, line in read_json_lines(path, limit_bytes=SAMPLES_BYTES) if os.path.lexists(path) else ():
        steps[line["step"]][line["group_id"]].append(line)
        if len(steps) > 2:  # neither the first nor the last is kept
            del steps[sorted(steps)[1]]
    shown = []
    for step in dict.fromkeys((min(steps), max(steps))) if steps else ():
        groups = sorted(steps[step].values(), key=lambda group: _find_image(group) is None)
        shown.append((step, [_show_group(group, run) for group in groups[:GROUPS_SHOWN]]))
    return shown


def _show_group(rollouts: Sequence[Rollout], run: Run) -> ShownGroup:
    data = _find_image(rollouts)
    settings = run.config.get("objective", {})
    fraction, score = float(settings.get("high_fraction", HIGH_FRACTION)), str(settings.get("token_score", "va"))
    return ShownGroup(
        question=rollouts[0]["question"],
        answer=str(rollouts[0]["answer"]),
        pictures=list(_draw_views(data, run)) if data is not None else [],
        rollouts=[
            ShownRollout(_show_tokens(rollout, fraction, score), rollout["rollout_weight"], _read_verdict(rollout))
            for rollout in rollouts
        ],
    )


def _read_verdict(rollout: Rollout) -> str:
    correct = {True: "right", False: "wrong"}.get(rollout.get("correct", ""), "")  # an earlier vaopd wrote only this
    return str(rollout.get("verdict", correct))


def _show_tokens(rollout: Rollout, high_fraction: float, token_score: str) -> list[Token]:
    advantages = rollout["visual_advantage"]
    high = high_group(_rank_by(rollout, token_score), high_fraction=high_fraction)
    others = {
        "view divergence": rollout.get("view_divergence_nats"),
        "teacher": rollout["teacher_logprobs"],
        "degraded": rollout.get("degraded_logprobs"),
        "student": rollout.get("rollout_logprobs"),
        "KL": rollout.get("kl"),
    }
    tokens = []
    for index, (text, va) in enumerate(zip(rollout["tokens"], advantages, strict=True)):
        numbers = [f"VA {va:.3f}", *(f"{name} {v[index]:.3f}" for name, v in others.items() if v is not None)]
        tokens.append(Token(text, min(va / FULL_COLOUR_NATS, 1.0), bool(high[index]), ", ".join(numbers)))
    return tokens


def _rank_by(rollout: Rollout, token_score: str) -> np.ndarray:
    """Returns the numbers that the run's high group is chosen by, (T,): see `objective.token_score`."""
    if token_score == "view_divergence":
        return np.array(rollout["view_divergence_nats"])
    if token_score == "absolute":
        return np.abs(np.subtract(rollout["teacher_logprobs"], rollout["degraded_logprobs"]))
    return np.array(rollout["visual_advantage"])


def _find_image(rollouts: Sequence[Rollout]) -> str | None:
    # Only one rollout of a group carries the image.
    return next((rollout["image_base64"] for rollout in rollouts if rollout.get("image_base64")), None)


def _draw_views(data: str, run: Run) -> Iterator[Picture]:
    """Yields the image and the degraded view that the teacher sees; large ones are scaled down for the page."""
    views = make_run_views(data, run)
    yield _draw(views.original, "the image")
    yield _draw(views.degraded, f"degraded: {_read_degradation(run).kind.replace('_', ' ')}")


def make_run_views(data: str, run: Run) -> Views:
    """Makes both views of a recorded image (base64) by the run's own degradation and pixel bounds."""
    bounds = {key: run.config.get("data", {}).get(key) for key in ("min_pixels", "max_pixels")}
    return make_views(EncodedImage(data=base64.b64decode(data)), _read_degradation(run), **bounds)


def _read_degradation(run: Run) -> Degradation:
    settings = run.config.get("degradation", {})
    return Degradation(kind=settings.get("kind", "pixelate"), strength=settings.get("strength", 0.1))


def _draw(image: Image.Image, name: str) -> Picture:
    shown = image.convert("RGB")
    if max(shown.size) > SHOWN_PX:
        shown.thumbnail((SHOWN_PX, SHOWN_PX))
    file = io.BytesIO()
    shown.save(file, "PNG")
    return Picture(name, f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
