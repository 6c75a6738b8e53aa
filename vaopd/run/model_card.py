"""Writes the model card, README.md, of a model that a run leaves: what was trained how, and what it reached.

Reads RUN/config.toml and RUN/metrics.jsonl, so it shows what ran; it is published, so it has no path of this machine.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vaopd
from vaopd.files.durable import write_atomic
from vaopd.files.hub import is_hub_id
from vaopd.run.records import Evaluation, Run, read_run

CARD = "README.md"
_LICENSE = re.compile(r"^license:\s*[\"']?([\w.-]+)", re.MULTILINE)
_SHOWN = ("student", "teacher", "degradation", "objective", "rollout", "trainer", "evaluation")
_OF_THIS_MACHINE = ("address", "engine_options", "processes", "workers", "device_map", "trackers", "keep_checkpoints")
_OBJECTIVES = {
    "va_opd": "Visual-Advantage On-Policy Distillation (VA-OPD)",
    "standard": "Standard On-Policy Distillation",
    "rollout_weights": "VA-OPD's rollout weights alone",
    "token_groups": "VA-OPD's token groups alone",
    "masked": "Standard On-Policy Distillation with tokens masked out",
}


def write_model_card(run_folder: Path, model: Path, *, step: int, base: Path) -> None:
    """Writes `model`/README.md for the policy after `step` optimizer steps.

    base: the student's own folder, whose card may name its licence.
    """
    run = read_run(run_folder)
    text = "\n".join([*_front_matter(run, _read_license(base)), *_body(run, step=step)]) + "\n"
    write_atomic(model / CARD, text)


def upload_hint(model: Path) -> str:
    """Returns the line that says how to publish a model folder."""
    run, name = shlex.quote(str(model.parent)), model.resolve().parent.name
    return f"to publish it: vaopd push {run} YOUR_NAME/{name} --which {model.name}"


def _front_matter(run: Run, licence: str | None) -> Iterator[str]:
    student, data = run.config["student"]["model"], run.config["data"]["source"]
    yield "---"
    yield "library_name: transformers"
    yield "pipeline_tag: image-text-to-text"
    if is_hub_id(student):
        yield f"base_model: {student}"
    if is_hub_id(data):
        yield f"datasets:\n- {data}"
    if licence:
        yield f"license: {licence}"
    yield "tags:\n- on-policy-distillation\n- vaopd\n---"


def _body(run: Run, *, step: int) -> Iterator[str]:
    config = run.config
    variant = _OBJECTIVES.get(run.variant, run.variant)
    data = config["data"]
    yield f"\n# {run.name}\n"
    yield f"A vision-language model, trained by {variant} (arXiv 2605.21924) with vaopd {vaopd.__version__}.\n"
    yield "| | |\n| --- | --- |"
    yield f"| base model | {_shorten(config['student']['model'])} |"
    if lora := config["student"].get("lora"):
        yield f"| trained | LoRA, rank {lora['rank']}, alpha {lora['alpha']}, merged into the base model's weights |"
    yield f"| teacher | {_shorten(config['teacher']['model'])} |"
    yield f"| training data | {_shorten(data['source'])}, split {data.get('train_split', 'train')} |"
    yield f"| objective | `{run.variant}` |"
    yield f"| optimizer steps | {step} of {run.steps_planned} |"
    yield f"| seed | {run.seed} |"
    yield from (f"| {name} | {value} |" for name, value in _list_accuracies(run, step))
    yield "\n## Accuracy\n"
    held_out = _shorten(data.get("validation_source") or data["source"])
    yield (
        f"Measured on held-out problems of {held_out}, split {data.get('validation_split', 'validation')}; the same "
        "problems choose the best checkpoint, so it is no test result. Accuracies of different versions of the judge "
        "are not comparable."
    )
    yield "\n## Recipe\n\n```toml"
    yield from _list_settings(config)
    yield "```\n\nTrained by `vaopd up` with this configuration.\n"
    yield "## Licence\n"
    yield (
        "The terms of the base model hold for this one, those of the teacher and of the training data may: check them, "
        "and complete `license` at the top, before you publish it."
    )


def _list_accuracies(run: Run, step: int) -> Iterator[tuple[str, str]]:
    found = {evaluation.step: evaluation for evaluation in run.evaluations}
    if 0 in found and step != 0:
        yield "held-out accuracy of the base model", _describe(found[0])
    yield "held-out accuracy", _describe(found[step]) if step in found else "not measured at this step"


def _describe(evaluation: Evaluation) -> str:
    judge = f"judge {evaluation.judge}" if evaluation.judge else "judge not recorded"
    return f"{evaluation.label} (avg@{evaluation.samples}, {evaluation.prompts} problems; {judge})"


def _list_settings(config: dict[str, Any]) -> Iterator[str]:
    """Yields the sections that say how it was trained, as TOML; nothing about this machine."""
    for name in _SHOWN:
        yield from _list_section(name, config.get(name, {}))


def _list_section(name: str, values: dict[str, Any]) -> Iterator[str]:
    yield f"[{name}]"
    for key, value in values.items():
        if key not in _OF_THIS_MACHINE and not isinstance(value, dict):
            yield f"{key} = {json.dumps(_shorten(value) if key == 'model' else value)}"
    for key, value in values.items():
        if key not in _OF_THIS_MACHINE and isinstance(value, dict):
            yield from _list_section(f"{name}.{key}", value)


def _shorten(name: str) -> str:
    """Returns a hub id as it is, and only the last part of a path."""
    return name if is_hub_id(name) else Path(name).name


def _read_license(base: Path) -> str | None:
    """Returns the licence that the base model's card names at its top, if it has one."""
    try:
        text = (base / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    parts = text.split("---", 2)
    found = _LICENSE.search(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    return found[1] if found else None
