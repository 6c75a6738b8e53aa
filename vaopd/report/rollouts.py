"""The report's rollouts: tokens coloured by VA, the high group outlined, the image beside its degraded view.

Reads samples.jsonl as the trainer writes it: one line per rollout of the first step, the last one, and every step that
was evaluated.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from vaopd.degradation import degrade
from vaopd.images import decode
from vaopd.run.records import Run, json_lines
from vaopd.types import Degradation, EncodedImage

GROUPS_SHOWN = 3  # of the first step that has any, and of the last
FULL_COLOUR_NATS = 1.0  # the VA from which a token has the full colour
SHOWN_PX = 512  # the longer side of an image in the page
Rollout = Mapping[str, Any]


def rollouts_section(run: Run) -> Iterator[str]:
    """Groups of the first and of the last step with samples; those that have their image come first."""
    path = run.folder / "samples.jsonl"
    steps: dict[int, dict[str, list[Rollout]]] = defaultdict(lambda: defaultdict(list))
    if path.exists():
        for _, line in json_lines(path):
            steps[line["step"]][line["group_id"]].append(line)
    if not steps:
        return
    yield "<h3>Rollouts, before and after</h3>"
    yield (
        "<p>Every token is coloured by its visual advantage, how much it owes to the image "
        f'(<span class="scale">0 to {FULL_COLOUR_NATS:g} nat and more</span>); the high group is '
        "<u>underlined</u>. Point at a token, tap it, or walk with Tab and the arrow keys to read its numbers.</p>"
    )
    for step in dict.fromkeys((min(steps), max(steps))):
        count = f"{step} steps" if step else "the first step: the student as it came"
        name = f"After {count}" if step else f"Before {count}"
        yield f"<h4>{name}</h4>"
        groups = sorted(steps[step].values(), key=lambda group: _image_of(group) is None)
        for group in groups[:GROUPS_SHOWN]:
            yield _group_html(group, run)


def high_tokens(advantages: Sequence[float], fraction: float) -> set[int]:
    """The ⌈fraction · T⌉ tokens of largest VA, of equal ones the earlier (method.md, "Token groups").

    >>> sorted(high_tokens([0.0, 2.0, 0.5, 0.5], 0.5))
    [1, 2]
    """
    order = sorted(range(len(advantages)), key=lambda index: (-advantages[index], index))
    return set(order[: math.ceil(round(fraction * len(advantages), 9))])


def _group_html(rollouts: Sequence[Rollout], run: Run) -> str:
    first = rollouts[0]
    data = _image_of(rollouts)
    pictures = "".join(_pictures(data, run)) if data is not None else ""
    fraction = float(run.config.get("objective", {}).get("high_fraction", 0.2))
    rows = "".join(_rollout_html(rollout, fraction) for rollout in rollouts)
    question = f"<b>{html.escape(first['question'])}</b> Answer: {html.escape(str(first['answer']))}"
    return f'<section class="group"><div class="pictures">{pictures}</div><div><p>{question}</p>{rows}</div></section>'


def _rollout_html(rollout: Rollout, high_fraction: float) -> str:
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
        share = min(va / FULL_COLOUR_NATS, 1.0)
        numbers = [f"VA {va:.3f}", *(f"{name} {v[index]:.3f}" for name, v in others.items() if v is not None)]
        name = ' class="high"' if index in high else ""
        tokens.append(
            f'<span{name} style="background:rgb(255 140 0/{share:.2f})" title="{", ".join(numbers)}">'
            f"{html.escape(text)}</span>"
        )
    mark = ""
    if "correct" in rollout:
        right = rollout["correct"]
        mark = '<b class="right" title="right">✓</b>' if right else '<b class="wrong" title="wrong">✗</b>'
    weight = rollout["rollout_weight"]
    bar = f'<span class="weight" title="rollout weight {weight:.3f}"><i style="width:{100 * weight:.0f}%"></i></span>'
    return f'<p class="rollout">{mark} {bar} <code>{"".join(tokens)}</code></p>'


def _image_of(rollouts: Sequence[Rollout]) -> str | None:
    # Only one rollout of a group carries the image.
    return next((rollout["image_base64"] for rollout in rollouts if rollout.get("image_base64")), None)


def _pictures(data: str, run: Run) -> Iterator[str]:
    """The image and what the teacher sees of it in the degraded view; large ones are scaled down for the page."""
    settings = run.config.get("degradation", {})
    degradation = Degradation(kind=settings.get("kind", "pixelate"), strength=settings.get("strength", 0.1))
    image = decode(EncodedImage(data=base64.b64decode(data)))
    yield _picture(image, "the image")
    yield _picture(degrade(image, degradation, seed=0), f"degraded: {degradation.kind.replace('_', ' ')}")


def _picture(image: Image.Image, name: str) -> str:
    shown = image.convert("RGB")
    if max(shown.size) > SHOWN_PX:
        shown.thumbnail((SHOWN_PX, SHOWN_PX))
    file = io.BytesIO()
    shown.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'
