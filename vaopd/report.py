"""A run's folder in, one self-contained HTML file out: curves, configuration, and rollouts coloured by VA.

Reads RUN/metrics.jsonl, RUN/config.toml and RUN/samples.jsonl as the trainer writes them. The curves are drawn by
`vaopd.report_plots`.
"""

from __future__ import annotations

import html
import json
import math
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaopd.errors import InvalidInput, NotFound

GROUPS_SHOWN = 6
MAX_IMAGE_CHARACTERS = 400_000  # base64; larger ones would make the page heavy
IMAGE_KINDS = {"iVBOR": "png", "/9j/": "jpeg", "UklGR": "webp"}  # how the base64 of each begins
FULL_COLOUR_NATS = 1.0  # the VA from which a token has the full colour


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out accuracy of one policy version; accuracy and standard_error in [0, 1]."""

    step: int
    accuracy: float
    standard_error: float
    prompts: int
    samples: int

    @property
    def label(self) -> str:
        return f"{100 * self.accuracy:.1f} % ± {100 * self.standard_error:.1f}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run's folder says. `train` holds the metric lines as they are, in order."""

    folder: Path
    config_text: str
    variant: str
    seed: int
    train: tuple[dict[str, Any], ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def name(self) -> str:
        return self.folder.name


def read_run(folder: Path) -> Run:
    """Raises NotFound or InvalidInput that names the file and line."""
    config_text = _read(folder / "config.toml")
    try:
        config = tomllib.loads(config_text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{folder / 'config.toml'} is not valid TOML: {error}") from None
    train, evaluations = [], []
    for where, line in _json_lines(folder / "metrics.jsonl"):
        if line.get("kind") == "eval":
            evaluations.append(_evaluation(line, where))
        elif line.get("kind") == "train":
            _number(line, "step", where)
            train.append(line)
    return Run(
        folder=folder,
        config_text=config_text,
        variant=config.get("objective", {}).get("variant", "va_opd"),
        seed=config.get("run", {}).get("seed", 0),
        train=tuple(train),
        evaluations=tuple(evaluations),
    )


def write_report(folders: Sequence[Path], *, output: Path | None = None, band: str = "range") -> Path:
    """One run: all its curves, its configuration and some rollouts. Several: their accuracy compared, then each one."""
    from vaopd import report_plots

    runs = [read_run(folder) for folder in folders]
    output = output or folders[0] / "report.html"
    body = []
    if len(runs) > 1:
        body.append(f"<h2>Held-out accuracy, {len(runs)} runs</h2>")
        body.append(_figure(report_plots.comparison_svg(runs, band=band)))
        body.append(_comparison_table(runs))
    for run in runs:
        body += _run_section(run, with_samples=len(runs) == 1)
    title = f"vaopd: {', '.join(run.name for run in runs)}"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(PAGE.format(title=html.escape(title), style=STYLE, body="\n".join(body)))
    return output


def plot_accuracy(folders: Sequence[Path], output: Path, *, band: str = "range") -> Path:
    """Only the accuracy curves, grouped by objective, as an image."""
    from vaopd import report_plots

    report_plots.save_comparison([read_run(folder) for folder in folders], output, band=band)
    return output


def _run_section(run: Run, *, with_samples: bool) -> Iterator[str]:
    from vaopd import report_plots

    yield f"<h2>{html.escape(run.name)}</h2>"
    if run.evaluations:
        first, last = run.evaluations[0], run.evaluations[-1]
        yield (
            f"<p>Held-out accuracy <b>{first.label}</b> at step {first.step}, <b>{last.label}</b> at step {last.step} "
            f"({last.prompts} problems, {last.samples} each; ± one standard error).</p>"
        )
    for svg in report_plots.run_svgs(run):
        yield _figure(svg)
    if with_samples:
        yield from _samples_section(run.folder / "samples.jsonl")
    yield f"<details><summary>Configuration</summary><pre>{html.escape(run.config_text)}</pre></details>"


def _comparison_table(runs: Sequence[Run]) -> str:
    def row(run: Run) -> str:
        first, last = (run.evaluations[0].label, run.evaluations[-1].label) if run.evaluations else ("–", "–")
        cells = (run.name, run.variant, str(run.seed), str(len(run.train)), first, last)
        return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"

    head = "".join(f"<th>{name}</th>" for name in ("run", "objective", "seed", "steps", "before", "after"))
    return f"<table><tr>{head}</tr>{''.join(row(run) for run in runs)}</table>"


def _samples_section(path: Path) -> Iterator[str]:
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    if path.exists():
        for _, line in _json_lines(path):
            groups.setdefault((line["step"], line["group_id"]), []).append(line)
    if not groups:
        return
    yield "<h2>Rollouts</h2>"
    yield (
        f"<p>The stronger a token's colour, the higher its visual advantage (full at {FULL_COLOUR_NATS:g} nats and "
        "more). Hover over a token for its numbers.</p>"
    )
    # Some from the beginning and some from the end show what the training changed.
    keys = sorted(groups)
    shown = keys if len(keys) <= GROUPS_SHOWN else [*keys[: GROUPS_SHOWN // 2], *keys[-GROUPS_SHOWN // 2 :]]
    for key in shown:
        yield _group_html(key[0], groups[key])


def _group_html(step: int, rollouts: Sequence[dict[str, Any]]) -> str:
    first = rollouts[0]
    # Only one rollout of a group carries the image.
    image = next((rollout["image_base64"] for rollout in rollouts if rollout.get("image_base64")), "")
    picture = ""
    if image and len(image) <= MAX_IMAGE_CHARACTERS:
        kind = next((kind for start, kind in IMAGE_KINDS.items() if image.startswith(start)), "png")
        picture = f'<img alt="the prompt\'s image" src="data:image/{kind};base64,{html.escape(image)}">'
    rows = "".join(_rollout_html(rollout) for rollout in rollouts)
    question = f"<b>{html.escape(first['question'])}</b> answer {html.escape(str(first['answer']))}"
    return f'<section class="group">{picture}<div><p>step {step}: {question}</p>{rows}</div></section>'


def _rollout_html(rollout: dict[str, Any]) -> str:
    tokens = []
    for text, va, logprob in zip(
        rollout["tokens"], rollout["visual_advantage"], rollout["teacher_logprobs"], strict=True
    ):
        share = min(va / FULL_COLOUR_NATS, 1.0)
        tokens.append(
            f'<span style="background:rgb(255 140 0/{share:.2f})" title="VA {va:.3f}, teacher {logprob:.3f} nats">'
            f"{html.escape(text)}</span>"
        )
    mark = ""
    if "correct" in rollout:
        mark = '<span class="right">✓</span>' if rollout["correct"] else '<span class="wrong">✗</span>'
    weight = f'<span class="weight" title="rollout weight">w {rollout["rollout_weight"]:.2f}</span>'
    text = "".join(tokens)
    return f'<p class="rollout">{mark} {weight} <code>{text}</code></p>'


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise NotFound(f"{path} can't be read ({error.strerror}); RUN is a run's folder, e.g. runs/demo-…") from None


def _json_lines(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    lines = _read(path).split("\n")
    # What stands behind the last newline is empty, or a line that is just being written.
    for number, line in enumerate(lines[:-1], 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            raise InvalidInput(f"{path}:{number} is not a JSON object") from None
        yield f"{path}:{number}", value


def _evaluation(line: dict[str, Any], where: str) -> Evaluation:
    return Evaluation(
        step=int(_number(line, "step", where)),
        accuracy=_number(line, "accuracy", where),
        standard_error=_number(line, "standard_error", where),
        prompts=int(_number(line, "prompts", where)),
        samples=int(_number(line, "samples", where)),
    )


def _number(line: dict[str, Any], key: str, where: str) -> float:
    value = line.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidInput(f"{where}: {key} is {value!r}; it must be a finite number")
    return value


STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; } figure svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; }
td, th { border-bottom: 1px solid var(--line); } pre { overflow: auto; }
.group { display: flex; gap: 1rem; border-top: 1px solid var(--line); padding: .6rem 0; align-items: flex-start; }
.group img { width: 9rem; image-rendering: pixelated; border: 1px solid var(--line); background: white; }
.rollout { margin: .2rem 0; } .rollout code { white-space: pre-wrap; }
.right { color: #2a9d4a; } .wrong { color: #d0453e; } .weight { opacity: .7; font-size: .85em; }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""
