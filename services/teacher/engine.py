"""Scores prepared prompt groups on the device: log-probs of both views and the payload. Synchronous, one thread.

What arrives: groups whose prompts and images are ready. What leaves: one result per group, as soon as its last row is
done. Rows (one view of one rollout) are packed into forwards of at most `batch_tokens`, padding included, in the order
of the groups; siblings share a PreparedPrompt, so the vision tower runs once per image and view in a forward. The LM
head is applied to response rows only, in chunks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch

from vaopd import payloads
from vaopd.divergence import token_logprobs
from vaopd.errors import LimitExceeded, NumericalError, VaopdError
from vaopd.types import Payload, PayloadKind
from vaopd.vlm import PreparedPrompt, Vlm

log = logging.getLogger(__name__)

View = Literal["original", "degraded"]
HEAD_CHUNK_TOKENS = 1024


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedGroup:
    """A prompt group that only the device is missing for; responses: K arrays (T_k,) int64."""

    group_id: str
    original: PreparedPrompt
    degraded: PreparedPrompt
    responses: tuple[np.ndarray, ...]
    payload: PayloadKind
    top_k: int

    @property
    def num_rows(self) -> int:
        return 2 * len(self.responses)

    @property
    def longest_row(self) -> int:
        """Tokens, prompt included."""
        return len(self.original.token_ids) + max(len(ids) for ids in self.responses)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredGroup:
    """teacher_logprobs and degraded_logprobs (M,) float32: the K rollouts one after the other."""

    teacher_logprobs: np.ndarray
    degraded_logprobs: np.ndarray
    payload: Payload


class Engine(Protocol):
    """What the scheduler needs of an engine; the thread that calls it is always the same."""

    def score(self, groups: Sequence[PreparedGroup]) -> Iterator[ScoredGroup | VaopdError]:
        """One result per group, in the order of the groups; an error is that group's alone.

        Raises only when the engine can't go on at all.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    group: int
    view: View
    prompt: PreparedPrompt
    response: np.ndarray

    @property
    def tokens(self) -> int:
        return len(self.prompt.token_ids) + len(self.response)


@dataclass(slots=True, eq=False)
class _Progress:
    """What is known of a group so far; rows arrive in order, original view first."""

    rows_left: int
    logprobs: dict[View, list[torch.Tensor]] = field(default_factory=lambda: {"original": [], "degraded": []})
    hidden: list[torch.Tensor] = field(default_factory=list)
    error: VaopdError | None = None


class GroupEngine:
    """The engine over one loaded model."""

    def __init__(self, vlm: Vlm, *, batch_tokens: int) -> None:
        self._vlm = vlm
        self._batch_tokens = batch_tokens

    def score(self, groups: Sequence[PreparedGroup]) -> Iterator[ScoredGroup | VaopdError]:
        progress = [_Progress(rows_left=group.num_rows) for group in groups]
        done = 0
        for batch in pack(_rows(groups), self._batch_tokens):
            self._run(batch, groups, progress)
            while done < len(groups) and progress[done].rows_left == 0:
                yield self._finish(groups[done], progress[done])
                progress[done] = _Progress(rows_left=0)  # lets the hidden states go
                done += 1

    @torch.inference_mode()
    def _run(
        self, batch: Sequence[_Row], groups: Sequence[PreparedGroup], progress: Sequence[_Progress], halve: bool = True
    ) -> None:
        """One forward; out of memory, two forwards of half the rows; still so, an error for the groups concerned."""
        try:
            hidden, logprobs = self._forward(batch)
        except torch.OutOfMemoryError:
            log.warning("out of memory with %d rows of at most %d tokens", len(batch), max(r.tokens for r in batch))
            hidden = None
        if hidden is None:  # outside the handler, whose traceback would keep the tensors of the failed forward alive
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if halve and len(batch) > 1:
                middle = len(batch) // 2
                self._run(batch[:middle], groups, progress, halve=False)
                self._run(batch[middle:], groups, progress, halve=False)
                return
            for row in batch:
                group = groups[row.group]
                progress[row.group].rows_left -= 1
                progress[row.group].error = LimitExceeded(
                    f"group {group.group_id!r} ({group.num_rows} rows of up to {group.longest_row} tokens) does not "
                    "fit into the teacher's memory; send less, or lower teacher.batch_tokens"
                )
            return
        start = 0
        for row in batch:
            state, end = progress[row.group], start + len(row.response)
            state.rows_left -= 1
            state.logprobs[row.view].append(logprobs[start:end])
            if row.view == "original" and groups[row.group].payload in ("hidden", "top_k"):
                state.hidden.append(hidden[start:end])
            start = end

    def _forward(self, batch: Sequence[_Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (M', D) and log-probs (M',) of the batch's response tokens, row after row."""
        hidden = self._vlm.response_hidden([row.prompt for row in batch], [row.response for row in batch])
        head = self._vlm.head
        hidden = hidden.to(head.device)
        ids = torch.from_numpy(np.concatenate([row.response for row in batch])).to(head.device)
        return hidden, token_logprobs(hidden, head, ids, chunk_tokens=HEAD_CHUNK_TOKENS)

    @torch.inference_mode()
    def _finish(self, group: PreparedGroup, state: _Progress) -> ScoredGroup | VaopdError:
        if state.error is not None:
            return state.error
        original = torch.cat(state.logprobs["original"]).cpu().numpy()
        degraded = torch.cat(state.logprobs["degraded"]).cpu().numpy()
        for view, logprobs in (("original", original), ("degraded", degraded)):
            if bad := int((~np.isfinite(logprobs)).sum()):
                return NumericalError(
                    f"group {group.group_id!r}: {bad} of {logprobs.size} log-probs of the {view} view are not finite; "
                    "check the teacher's weights and dtype"
                )
        hidden = torch.cat(state.hidden) if state.hidden else torch.empty(0)
        if not torch.isfinite(hidden).all():
            return NumericalError(f"group {group.group_id!r}: the teacher's hidden states are not finite")
        payload = payloads.encode(
            group.payload, hidden, self._vlm.head, top_k=group.top_k, chunk_tokens=HEAD_CHUNK_TOKENS
        )
        return ScoredGroup(teacher_logprobs=original, degraded_logprobs=degraded, payload=payload)


def _rows(groups: Sequence[PreparedGroup]) -> Iterator[_Row]:
    for index, group in enumerate(groups):
        for response in group.responses:
            yield _Row(index, "original", group.original, response)
        for response in group.responses:
            yield _Row(index, "degraded", group.degraded, response)


def pack(rows: Iterator[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    """Consecutive rows whose number times their longest is at most `batch_tokens`; a longer row goes alone."""
    batch: list[_Row] = []
    longest = 0
    for row in rows:
        if batch and (len(batch) + 1) * max(longest, row.tokens) > batch_tokens:
            yield batch
            batch, longest = [], 0
        batch.append(row)
        longest = max(longest, row.tokens)
    if batch:
        yield batch


def padded_tokens(groups: Sequence[PreparedGroup]) -> int:
    """Tokens of the groups' rows in one forward, padding included."""
    return sum(group.num_rows for group in groups) * max(group.longest_row for group in groups)
