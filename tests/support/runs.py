"""Runs' folders, as the trainer leaves them."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

MINIMAL = """
[run]
name = "test"
[data]
source = "unused"
[student]
model = "unused"
[teacher]
model = "unused"
[trainer]
steps = 1
"""
"""The keys that a configuration must have; nothing that they name is there."""


def jpeg() -> str:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "white").save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def make_run(
    folder: Path,
    *,
    variant: str = "va_opd",
    seed: int = 0,
    accuracies: tuple[float, ...] = (0.3, 0.5, 0.6),
    steps: int = 20,
    judged: bool = False,
) -> Path:
    """A folder as the trainer leaves it: 20 steps planned, `steps` of them done, an evaluation every 10.

    judged: each evaluation names a version of the judge, as it does since there are versions.
    """
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(
        f'[run]\nname = "x"\nseed = {seed}\n[objective]\nvariant = "{variant}"\n'
        "[trainer]\nsteps = 20\n[evaluation]\nevery = 10\n"
    )
    lines: list[dict[str, Any]] = []
    for index, accuracy in enumerate(accuracies):
        evaluation: dict[str, Any] = {"accuracy": accuracy, "standard_error": 0.03, "prompts": 300, "samples": 1}
        if judged:
            evaluation["judge"] = f"{index + 1}, by hand"
        lines.append({"kind": "eval", "step": 10 * index, **evaluation})
    for step in range(steps):
        numbers = {"loss": 0.5, "kl_mean": 0.4, "kl_high": 0.6, "kl_low": 0.3, "mean_va": 0.2, "va_top10_share": 0.95}
        numbers |= {"weights_entropy": 1.0, "grad_norm": 2.0, "rollouts_per_s": 30.0, "time_s": 1000.0 + 2 * step}
        times = {"wait_s": 1.0, "score_s": 0.3, "forward_backward_s": 0.4, "publish_s": 0.1}
        lines.append({"kind": "train", "step": step, **numbers, **times})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [
        {
            "step": step,
            "group_id": f"g{step}",
            "question": "Is 3 < 4?",
            "answer": "yes",
            "tokens": ["3", " <", "\n"],
            "visual_advantage": [0.5, 0.0, 9.0],
            "teacher_logprobs": [-0.1, -0.2, -0.3],
            "rollout_weight": weight,
        }
        for step in (0, 5, 10)
        for weight in (0.75, 0.25)
    ]
    samples[0]["image_base64"] = jpeg()
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return folder


def read_charts(page: str) -> list[dict[str, Any]]:
    return [json.loads(html.unescape(data)) for data in re.findall(r"data-chart='([^']*)'", page)]


def change_settings(run: Path, old: str, new: str) -> Path:
    config = (run / "config.toml").read_text()
    assert old in config
    (run / "config.toml").write_text(config.replace(old, new))
    return run
