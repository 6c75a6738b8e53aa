"""Ranks on several hosts read configuration, student and data from their own files, which have to be the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vaopd.config import Config
from vaopd.errors import Mismatch
from vaopd.run.settings import find_changes, is_among
from vaopd.run.snapshots import ADAPTER_FILE, list_model_files
from vaopd.run.teacher import TeacherRecord
from vaopd.run.tensor_files import compute_digest
from vaopd.types import Prompt
from vaopd.vlm.revision import compute_folder_revision
from vaopd_trainer.rank_messages import COORDINATOR, Ranks

MAY_DIFFER = ("weights", "student.model", "teacher.model", "data.source", "data.validation_source")
"""Places of one host, beside addresses and folders; what lies there is compared by its content."""
SAMPLED_PROMPTS = 64


def check_alike(
    ranks: Ranks, config: Config, *, student: Path, teacher: TeacherRecord, prompts: Sequence[Prompt]
) -> None:
    """Raises Mismatch, on every rank, that names what a rank has otherwise than rank 0. A collective.

    student: the folder of its weights, of which samples are compared, as of the prompts.
    """
    if ranks.world == 1:
        return
    own = {
        "settings": config.model_dump(mode="json"),
        "contents": {
            "student": compute_folder_revision(student, dtype=config.student.dtype),
            "teacher": asdict(teacher) | {"model": ""},  # maybe a path
            "set of prompts": _digest(prompts),
            **_list_files(config, student),
        },
    }
    everyone = ranks.gather(own)
    first = everyone[COORDINATOR]
    for rank, found in enumerate(everyone):
        changes = find_changes(first["settings"], found["settings"])
        differing = [
            f"{key} = {value}, not {wanted}"
            for key, (wanted, value) in changes.items()
            if not is_among(key, MAY_DIFFER)
        ]
        theirs, wanted = found["contents"], first["contents"]
        differing += [f"another {what}" for what in wanted | theirs if theirs.get(what) != wanted.get(what)]
        if differing:
            raise Mismatch(
                f"rank {rank} has {', '.join(differing)}: give every host the configuration, student, teacher and data "
                "of rank 0"
            )


def _list_files(config: Config, student: Path) -> dict[str, Any]:
    """Returns the digests of tokenizer, chat template and processor, and of the adapters that the run begins with."""
    digests = {file.name: compute_digest(file) for file in list_model_files(student) if file.name != "config.json"}
    if config.student.lora is not None and config.student.lora.start is not None:
        digests[ADAPTER_FILE] = compute_digest(config.student.lora.start / ADAPTER_FILE)
    return digests


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256(str(len(prompts)).encode())
    for index in range(0, len(prompts), max(1, len(prompts) // SAMPLED_PROMPTS)):
        digest.update(repr(prompts[index].messages).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
