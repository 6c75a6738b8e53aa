"""A run's ledger: the fate of every prompt group, and an audit that none was lost or trained twice.

The trainer appends to RUN/ledger.jsonl, one JSON object per event:

    published   group, step (null: evaluation), policy   a request was enqueued
    delivered   group, policy, worker, deliveries        its group arrived and is used
    dropped     group, policy, reason                    it arrived and is not used: stale, duplicate, other_weights
    dead        group, reason                            it was given up, unless it is delivered later
    checkpoint  step                                     a checkpoint is durable
    resumed     step                                     a trainer continued from that checkpoint

Which groups were trained stands in the checkpoints (RUN/checkpoints/step_*/ledger.jsonl), so that it is true exactly
when the weights beside it are. Events reach the disk before the checkpoint that they belong to; later ones may be lost
with the machine, together with the work that they record. RUN/ledger.owner names the trainer that writes the ledger: a
trainer that was taken for dead sees there that another has continued, even when Redis, which held its lease, came back
empty. Torch-free.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vaopd.errors import InvalidInput, LeaseLost, LimitExceeded, NotFound
from vaopd.files.durable import write_atomic
from vaopd.files.plain import open_plain
from vaopd.run.checkpoints import FILE, LedgerLine, find_latest_checkpoint, read_checkpoint
from vaopd.run.json_lines import read_json_lines

log = logging.getLogger(__name__)

_TYPES = {"step": int | None, "policy": int, "group": str, "worker": str, "reason": str}
"""Of an event's values, which are compared and sorted."""


class Ledger:
    """Appends events. On a full disk, they are buffered in memory and `sync` raises."""

    def __init__(self, path: Path, *, owner: str, fresh: bool) -> None:
        """owner: the trainer, which holds the job's lease. fresh: a new run, so an existing ledger is removed."""
        if fresh:
            path.unlink(missing_ok=True)
        self._path = path
        self._owner = owner
        self._owner_file = path.with_suffix(".owner")
        write_atomic(self._owner_file, owner)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._drop_torn_line()
        self._pending = b""
        self._warned = False

    def check_owner(self) -> None:
        """Raises LeaseLost when another trainer has opened the ledger since: only that one may continue the run.

        Raises NotFound when the run's folder was removed: events still go to the open file, and are lost with it.
        """
        try:
            owner = self._owner_file.read_text()
        except FileNotFoundError:
            raise NotFound(
                f"{self._owner_file} is gone: the run's folder was removed while the trainer used it; nothing was "
                "acknowledged. Begin the run again"
            ) from None
        if owner != self._owner:
            raise LeaseLost(
                f"trainer {self._owner!r} was taken for dead, and {owner!r} has continued {self._path.parent}; "
                "nothing was committed. Resume from the last checkpoint"
            )

    def write(self, event: str, **values: Any) -> None:
        """Appends an event; on a full disk it is kept in memory, with one warning for all."""
        self._pending += json.dumps({"event": event, **values}, separators=(",", ":")).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if not self._warned:
                log.warning(
                    "%s can't be written (%s); its events stay in memory until there is room", self._path, error
                )
            self._warned = True

    def sync(self) -> None:
        """Puts all events on the disk, to be called before a checkpoint. Raises LimitExceeded when the disk is full."""
        try:
            self._flush()
            os.fsync(self._handle)
        except OSError as error:
            raise LimitExceeded(
                f"{self._path} can't be written ({error}); nothing was acknowledged: make room, and resume"
            ) from None

    def close(self) -> None:
        """Closes the file; events that wait for room are lost, as those after the last checkpoint may be."""
        os.close(self._handle)

    def _flush(self) -> None:
        while self._pending:
            self._pending = self._pending[os.write(self._handle, self._pending) :]

    def _drop_torn_line(self) -> None:
        """Removes a last line that a crash cut short."""
        with open_plain(self._path, limit_bytes=None) as file:
            size = len(file.read().rpartition(b"\n")[0])
        os.ftruncate(self._handle, size + 1 if size else 0)


@dataclass(kw_only=True)
class Fate:
    """The fate of one prompt group, as its events have it. `step` is None for an evaluation's."""

    group_id: str
    step: int | None = None
    policy: int = 0
    published: bool = False
    deliveries: int = 0
    delivered_policy: int | None = None
    worker: str = ""
    dropped: Counter[str] = field(default_factory=Counter)
    dead: str | None = None
    """Why it was given up; None too when it was delivered after that."""
    trained: list[LedgerLine] = field(default_factory=list)
    checkpoint: int | None = None
    """The first checkpoint that holds it."""

    def name_outcome(
        self, done: int
    ) -> Literal["trained", "skipped", "evaluated", "dead-lettered", "in flight", "lost"]:
        """Returns the group's outcome, when the newest checkpoint holds `done` steps."""
        if self.trained:
            return "skipped" if self.trained[0].skipped else "trained"
        if self.dead is not None:
            return "dead-lettered"
        if self.step is None and self.deliveries:
            return "evaluated"
        due = self.policy if self.step is None else self.step
        return "lost" if due < done else "in flight"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """An audit of a run at its newest checkpoint. `problems` is empty when every group is accounted for."""

    run: Path
    step: int
    """Steps that the newest checkpoint holds; 0 without one."""
    fates: list[Fate]
    problems: list[str]

    def count_outcomes(self, *, training: bool) -> dict[str, int]:
        """Counts groups published, delivered and by outcome, of training or of evaluation; and dropped deliveries."""
        fates = [fate for fate in self.fates if (fate.step is not None) == training]
        counts = {
            "published": sum(fate.published for fate in fates),
            "delivered": sum(fate.deliveries > 0 for fate in fates),
        }
        outcomes = Counter(fate.name_outcome(self.step) for fate in fates)
        names = ("trained" if training else "evaluated", "dead-lettered", "in flight", "lost")
        counts |= {name: outcomes[name] for name in names}  # type: ignore[index]
        if outcomes["skipped"]:  # a step whose gradient was not finite, which is rare
            counts["skipped"] = outcomes["skipped"]
        dropped = sum((fate.dropped for fate in fates), Counter[str]())
        return counts | {f"dropped, {reason}": number for reason, number in sorted(dropped.items())}


def audit(run: Path) -> Audit:
    """Audits a run folder, also while the run continues. Raises NotFound when it has no ledger."""
    path = run / FILE
    if not os.path.lexists(path):
        raise NotFound(f"{run} has no {FILE}: it is not a run folder, or is of a version without ledgers")
    newest = find_latest_checkpoint(run / "checkpoints")
    step, lines = read_checkpoint(newest) if newest is not None else (0, [])
    fates, checkpoints = _read_events(path)
    problems = []
    for line in lines:
        if line.group_id not in fates:
            problems.append(f"{line.group_id} was trained in step {line.step} and never published")
        fate = fates.setdefault(line.group_id, Fate(group_id=line.group_id, step=line.step))
        fate.trained.append(line)
        fate.checkpoint = min((done for done in checkpoints if done > line.step), default=step)
    for fate in fates.values():
        problems += _find_problems(fate, step)
    return Audit(run=run, step=step, fates=sorted(fates.values(), key=lambda fate: fate.group_id), problems=problems)


def _find_problems(fate: Fate, done: int) -> Iterator[str]:
    name = fate.group_id
    if not fate.published and not fate.trained:
        yield f"{name} was delivered and never published"
    if len(fate.trained) > 1:
        yield f"{name} was trained {len(fate.trained)} times, in steps {[line.step for line in fate.trained]}"
    for line in fate.trained[:1]:
        if fate.published and line.step != fate.step:
            yield f"{name} was published for step {fate.step} and trained in step {line.step}"
        if fate.published and not fate.deliveries:
            yield f"{name} was trained in step {line.step} and never delivered"
        elif fate.published and line.policy_version != fate.delivered_policy:
            yield (
                f"{name} was delivered with policy version {fate.delivered_policy} and trained as {line.policy_version}"
            )
        if fate.dead is not None:
            yield f"{name} was trained in step {line.step}, though it was dead-lettered: {fate.dead}"
    if fate.name_outcome(done) == "lost":
        yield f"{name} was published for step {fate.step} and neither trained nor dead-lettered: it is lost"


def _read_events(path: Path) -> tuple[dict[str, Fate], list[int]]:
    """Returns fates by group, and the steps of those checkpoints that the newest one continues."""
    fates: dict[str, Fate] = {}
    checkpoints: list[int] = []
    for where, event in read_json_lines(path, limit_bytes=None):
        try:
            kind = event["event"]
            wrong = [key for key, value in event.items() if not isinstance(value, _TYPES.get(key, object))]
            if wrong:
                raise TypeError(f"{wrong[0]} is {event[wrong[0]]!r}"[:100])
            if kind == "checkpoint":
                checkpoints.append(event["step"])
            elif kind == "resumed":
                checkpoints = [step for step in checkpoints if step <= event["step"]]
            else:
                fate = fates.setdefault(event["group"], Fate(group_id=event["group"]))
                _apply(fate, kind, event)
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{where} is not a ledger event ({error!r}); the file is damaged") from None
    return fates, checkpoints


def _apply(fate: Fate, kind: str, event: dict[str, Any]) -> None:
    match kind:
        case "published":
            fate.published, fate.step, fate.policy = True, event["step"], event["policy"]
        case "delivered":
            fate.deliveries += 1
            fate.delivered_policy, fate.worker, fate.dead = event["policy"], event["worker"], None
        case "dropped":
            fate.dropped[event["reason"]] += 1
        case "dead":
            fate.dead = event["reason"]
        case _:
            raise ValueError(f"unknown event {kind!r}")
