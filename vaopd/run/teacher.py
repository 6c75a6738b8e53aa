"""Which teacher a run learns from: recorded in every checkpoint, compared at every resume. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vaopd.errors import InvalidInput, Mismatch
from vaopd.types import TeacherDescription, Tensor

ANY = "any"
"""The value of `--accept-teacher` without a revision."""
SHORTEST_REVISION = 8
SHOWN = 16  # characters of a digest in messages


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherRecord:
    """A teacher. All but its model's name, which may be another path on another host, must stay the same in a run."""

    model: str
    revision: str
    """Digest of weights and configuration, as the teacher describes itself."""
    tokenizer_fingerprint: str
    dtype: str
    payload: str
    """How its distribution travels (`teacher.payload`)."""
    head_sha256: str = ""
    """Digest of its LM head as it was fetched; empty for payloads that need none, or before it is fetched."""

    @classmethod
    def of(cls, found: TeacherDescription, *, payload: str, head: Tensor | None = None) -> TeacherRecord:
        """Returns the record of a teacher that describes itself so; head: as it was fetched."""
        return cls(
            model=found.model,
            revision=found.revision,
            tokenizer_fingerprint=found.tokenizer_fingerprint,
            dtype=found.dtype,
            payload=payload,
            head_sha256="" if head is None else hashlib.sha256(head.data).hexdigest(),
        )

    def find_differences(self, other: TeacherRecord) -> dict[str, tuple[str, str]]:
        """Returns field -> (own, other) where they are not the same teacher; a head that one lacks doesn't count."""
        pairs = {
            item.name: (getattr(self, item.name), getattr(other, item.name))
            for item in fields(self)
            if item.name != "model"
        }
        if not all(pairs["head_sha256"]):
            del pairs["head_sha256"]
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def read_teacher(values: Any, *, origin: str) -> TeacherRecord:
    """Returns the record in a checkpoint's or a history's JSON; raises InvalidInput, naming `origin`."""
    try:
        return TeacherRecord(**{item.name: str(values[item.name]) for item in fields(TeacherRecord)})
    except (TypeError, KeyError) as error:
        raise InvalidInput(f"{origin}: its record of the teacher is damaged ({error!r})") from None


def describe_change(known: TeacherRecord, found: TeacherRecord) -> str:
    """Returns a line for each thing in which two teachers differ."""
    return "\n".join(
        f"  {name}: {before[:SHOWN]} → {after[:SHOWN]}"
        + (f"   ({known.model} → {found.model})" if name == "revision" else "")
        for name, (before, after) in known.find_differences(found).items()
    )


def check_teacher(
    known: TeacherRecord | None,
    found: TeacherRecord,
    *,
    run: str,
    address: str,
    accept: str | None = None,
    accepted_before: Sequence[str | None] = (),
) -> bool:
    """Returns whether another teacher than before was accepted; raises Mismatch for one that was not.

    known: None for a run that names none yet. accept: the value of `--accept-teacher`, the beginning of a revision or
    `ANY`. accepted_before: what earlier starts of the run were given there, oldest first. A supervisor repeats its
    command line at every restart, so `ANY` is only good for a start after one without it: it can't accept whatever
    teacher comes later.
    """
    if known is None or not known.find_differences(found):
        return False
    changed = (
        f"the teacher at {address} is not the one that run {run!r} learns from:\n{describe_change(known, found)}\n"
    )
    revision = found.revision[:SHOWN]
    if accept == ANY and accepted_before and accepted_before[-1] == ANY:
        raise Mismatch(
            f"{changed}  --accept-teacher without a revision holds for one start, and the start before had it, "
            f"too; name the revision: --accept-teacher {revision}"
        )
    if accept == ANY or (accept is not None and len(accept) >= SHORTEST_REVISION and found.revision.startswith(accept)):
        return True
    given = "" if accept is None else f"  --accept-teacher {accept} names another one (at least 8 characters).\n"
    raise Mismatch(
        f"{changed}{given}  Start the earlier teacher again and resume, or continue with this one: --resume "
        f"--accept-teacher {revision}"
    )
