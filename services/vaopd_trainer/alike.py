"""Ranks on several hosts read configuration, student and data from their own files, which have to be the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from vaopd.config import Config
from vaopd.errors import Mismatch
from vaopd.run.settings import find_changes, is_among
from vaopd.types import Prompt
from vaopd.vlm.revision import compute_folder_revision
from vaopd_trainer.rank_messages import COORDINATOR, Ranks

MAY_DIFFER = ("weights", "student.model", "teacher.model", "data.source", "data.validation_source")
"""Places of one host, beside addresses and folders; what lies there is compared by its content."""
SAMPLED_PROMPTS = 64


def check_alike(ranks: Ranks, config: Config, *, student: Path, prompts: Sequence[Prompt]) -> None:
    """Raises Mismatch, on every rank, that names what a rank has otherwise than rank 0. A collective.

    student: the folder of its weights, of which samples are compared, as of the prompts.
    """
    if ranks.world == 1:
        return
    own = {
        "settings": config.model_dump(mode="json"),
        "student": compute_folder_revision(student, dtype=config.student.dtype),
        "set of prompts": _digest(prompts),
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
        differing += [f"another {what}" for what in ("student", "set of prompts") if found[what] != first[what]]
        if differing:
            raise Mismatch(
                f"rank {rank} has {', '.join(differing)}: give every host the configuration, student and data of rank 0"
            )


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256(str(len(prompts)).encode())
    for index in range(0, len(prompts), max(1, len(prompts) // SAMPLED_PROMPTS)):
        digest.update(repr(prompts[index].messages).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
