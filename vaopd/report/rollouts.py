"""Selects the rollouts that the page shows: each token's numbers, the high group, the image in both views.

Reads samples.jsonl as the trainer writes it: a line for each rollout of the first step, the last one, and every step
that was evaluated. `samples.js` draws them, and filters by step, verdict, VA and KL.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from vaopd.files.plain import MIB
from vaopd.run.json_lines import read_json_lines
from vaopd.run.records import Run
from vaopd.scoring.views import Views, make_views
from vaopd.scoring.weights import HIGH_FRACTION, high_group
from vaopd.types import Degradation, EncodedImage

GROUPS_SHOWN = 12
"""Of each step, at most."""
TOKENS_SHOWN = 60_000
"""Of the page, which has about 30 bytes for each: of long rollouts, fewer groups of each step are shown."""
FULL_COLOUR_NATS = 1.0
"""The VA from which a token has the full colour."""
SHOWN_PX = 320
"""The longer side of an image in the page."""
SAMPLES_BYTES = 512 * MIB  # of samples.jsonl, in seconds
NUMBERS = {
    "visual_advantage": "VA",
    "view_divergence_nats": "view divergence",
    "expected_va_nats": "expected VA",
    "teacher_logprobs": "teacher",
    "degraded_logprobs": "degraded",
    "rollout_logprobs": "student",
    "kl": "KL",
}
"""Key in samples.jsonl -> name in the page, of numbers that each token has, in nats."""
Rollout = Mapping[str, Any]


def select_samples(run: Run, *, tokens: int) -> dict[str, Any] | None:
    """Returns groups of every recorded step, as `samples.js` takes them; None for a run without samples.

    Of each step the first groups, those with an image first, as many as `tokens` allow in all. Numbers are in
    thousandths of a nat.
    """
    path = run.folder / "samples.jsonl"
    lines = read_json_lines(path, limit_bytes=SAMPLES_BYTES) if os.path.lexists(path) else iter(())
    totals: dict[int, int] = {}
    kept: dict[int, list[dict[str, Any]]] = {}
    for (step, _), found in groupby((line for _, line in lines), key=lambda line: (line["step"], line["group_id"])):
        totals[step] = totals.get(step, 0) + 1
        _keep(kept.setdefault(step, []), list(found), run)
    count = GROUPS_SHOWN
    while count > 1 and _count_tokens(kept, count) > tokens:
        count -= 1
    groups = [group for step in sorted(kept) for group in kept[step][:count]]
    for group in groups:
        group["pictures"] = list(_draw_views(data, run)) if (data := group.pop("image")) is not None else []
    return {"totals": totals, "groups": groups} if groups else None


def _keep(groups: list[dict[str, Any]], rollouts: Sequence[Rollout], run: Run) -> None:
    """Adds a group, before those without an image if it has one, unless there is no room."""
    image = _find_image(rollouts)
    place = len(groups)
    if image is not None:
        place = next((index for index, group in enumerate(groups) if group["image"] is None), place)
    if place < GROUPS_SHOWN:
        groups.insert(place, _read_group(rollouts, image, run))
        del groups[GROUPS_SHOWN:]


def _count_tokens(kept: Mapping[int, list[dict[str, Any]]], count: int) -> int:
    groups = (group for found in kept.values() for group in found[:count])
    return sum(len(rollout["tokens"]) for group in groups for rollout in group["rollouts"])


def _read_group(rollouts: Sequence[Rollout], image: str | None, run: Run) -> dict[str, Any]:
    settings = run.config.get("objective", {})
    fraction, score = float(settings.get("high_fraction", HIGH_FRACTION)), str(settings.get("token_score", "va"))
    return {
        "step": rollouts[0]["step"],
        "question": rollouts[0]["question"],
        "answer": str(rollouts[0]["answer"]),
        "image": image,
        "rollouts": [
            {
                "tokens": rollout["tokens"],
                "weight": round(rollout["rollout_weight"], 3),
                "verdict": _read_verdict(rollout),
                "high": _find_high_group(rollout, fraction, score),
                "numbers": {
                    name: [round(1000 * value) for value in rollout[key]]
                    for key, name in NUMBERS.items()
                    if rollout.get(key) is not None
                },
            }
            for rollout in rollouts
        ],
    }


def _read_verdict(rollout: Rollout) -> str:
    correct = {True: "right", False: "wrong"}.get(rollout.get("correct", ""), "")  # an earlier vaopd wrote only this
    return str(rollout.get("verdict", correct))


def _find_high_group(rollout: Rollout, fraction: float, token_score: str) -> list[int]:
    """Returns the places of the high group's tokens; none where no token has any score."""
    scores = _rank_by(rollout, token_score)
    return np.flatnonzero(high_group(scores, high_fraction=fraction)).tolist() if scores.any() else []


def _rank_by(rollout: Rollout, token_score: str) -> np.ndarray:
    """Returns the numbers that the run's high group is chosen by, (T,): see `objective.token_score`."""
    if key := {"view_divergence": "view_divergence_nats", "expected": "expected_va_nats"}.get(token_score):
        return np.array(rollout[key])
    if token_score == "absolute":
        return np.abs(np.subtract(rollout["teacher_logprobs"], rollout["degraded_logprobs"]))
    return np.array(rollout["visual_advantage"])


def _find_image(rollouts: Sequence[Rollout]) -> str | None:
    # Only one rollout of a group carries the image.
    return next((rollout["image_base64"] for rollout in rollouts if rollout.get("image_base64")), None)


def _draw_views(data: str, run: Run) -> Iterator[dict[str, str]]:
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


def _draw(image: Image.Image, name: str) -> dict[str, str]:
    """Returns a picture's name and data URL."""
    shown = image.convert("RGB")
    if max(shown.size) > SHOWN_PX:
        shown.thumbnail(
            (SHOWN_PX, SHOWN_PX), Image.Resampling.NEAREST if "degraded" in name else Image.Resampling.LANCZOS
        )
    file = io.BytesIO()
    shown.save(file, "WEBP", lossless=max(image.size) <= SHOWN_PX or "degraded" in name, quality=80)
    return {"name": name, "url": f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"}
