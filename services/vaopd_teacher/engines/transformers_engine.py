"""Scores prepared prompt groups on the device: log-probs of both views and the payload. Synchronous, one thread.

In: prepared groups. Out: one result per group, in order, as soon as its last part is done. A
view of a group is computed at once: its prompt, then its K responses against the prompt's keys and values. A forward
takes as many whole groups, both views each, as `batch_tokens` allows; a larger group is split into its views, and a
larger view into parts of its siblings, with the prompt repeated. The vision tower runs once per image and view, or not
at all when `vision_cache` has its output. The LM head is applied to response rows only, in chunks.

On a GPU nothing waits within a forward, and a group's results are copied to the host beside the next forward.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vaopd import payloads
from vaopd.divergence import token_logprobs
from vaopd.divergence.head import pad_head
from vaopd.errors import LimitExceeded, NumericalError, VaopdError
from vaopd.vlm.model import Segment, Vlm
from vaopd.vlm.transfer import upload
from vaopd_teacher.engines import columns
from vaopd_teacher.engines.download import Download
from vaopd_teacher.engines.engine import VIEWS, EngineResult, PreparedGroup, View, finish
from vaopd_teacher.engines.vision_cache import VisionCache

log = logging.getLogger(__name__)
HEAD_CHUNK_TOKENS = 1024
_LOGPROBS: dict[View, str] = {"original": "teacher_logprobs", "degraded": "degraded_logprobs"}


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One view of a group, or some siblings of it."""

    group: int
    view: View
    segment: Segment

    @property
    def tokens(self) -> int:
        return self.segment.tokens

    def split_in_half(self) -> list[_Part]:
        """Returns two parts with half of the siblings each; of a single rollout, itself."""
        responses = self.segment.responses
        middle = (len(responses) + 1) // 2
        return [self.take(half) for half in (responses[:middle], responses[middle:]) if half]

    def take(self, responses: Sequence[np.ndarray]) -> _Part:
        return _Part(self.group, self.view, Segment(prompt=self.segment.prompt, responses=tuple(responses)))


@dataclass(slots=True, eq=False)
class _Progress:
    """A group's rows so far; parts arrive in order, original view first."""

    logprobs: dict[View, list[torch.Tensor]] = field(default_factory=lambda: {view: [] for view in VIEWS})
    hidden: dict[View, list[torch.Tensor]] = field(default_factory=lambda: {view: [] for view in VIEWS})
    error: VaopdError | None = None


class GroupEngine:
    """The engine over one loaded model; `vision_cache` keeps the vision tower's output between forwards."""

    def __init__(self, vlm: Vlm, *, batch_tokens: int, vision_cache: VisionCache | None = None) -> None:
        self._vlm = vlm
        self._batch_tokens = batch_tokens
        self._vision_cache = vision_cache or VisionCache(vlm, capacity_bytes=0)
        head = vlm.padded_head.detach()
        # All published tables have padded rows. One that hasn't is copied once: a GPU's fast kernels need them.
        self._head = pad_head(head) if head.is_cuda else head
        self._overlaps = head.is_cuda  # a forward that was begun computes while the host continues

    def score(self, groups: Sequence[PreparedGroup]) -> Iterator[EngineResult | VaopdError]:
        """Yields one result per group, in their order; see `Engine.score`."""
        progress = [_Progress() for _ in groups]
        leaving: list[_Leaving] = []
        done = 0
        for batch, finished in _make_batches(groups, self._batch_tokens):
            self._run(batch, groups, progress)
            # A GPU computes this forward while the results of the one before it become answers.
            yield from map(_finish, leaving)
            leaving = []
            for index in range(done, finished):
                leaving.append(self._send_down(groups[index], progress[index]))
                progress[index] = _Progress()  # frees the hidden states
            done = finished
            if not self._overlaps:
                yield from map(_finish, leaving)
                leaving = []
        yield from map(_finish, leaving)

    @torch.inference_mode()
    def _run(self, batch: Sequence[_Part], groups: Sequence[PreparedGroup], progress: Sequence[_Progress]) -> None:
        """Runs one forward; out of memory, two of half the size, down to a single rollout, whose group then fails."""
        batch = [part for part in batch if progress[part.group].error is None]
        if not batch:
            return
        try:
            hidden, logprobs = self._forward(batch)
        except torch.OutOfMemoryError:
            log.warning("out of memory with %d tokens in a forward", sum(part.tokens for part in batch))
            hidden = None
        if hidden is None:  # outside the handler: its traceback would keep the failed forward's tensors alive
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(halves := _split_batch(batch)) == 1:
                progress[batch[0].group].error = _make_memory_error(groups[batch[0].group])
                return
            for half in halves:
                self._run(half, groups, progress)
            return
        start = 0
        for part in batch:
            state, end = progress[part.group], start + sum(len(ids) for ids in part.segment.responses)
            state.logprobs[part.view].append(logprobs[start:end])
            if part.view in _choose_views(groups[part.group]):
                state.hidden[part.view].append(hidden[start:end])
            start = end

    def _forward(self, batch: Sequence[_Part]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns hidden states (M', D) and log-probs (M',) of the batch's response tokens, part after part."""
        hidden = self._vlm.compute_response_hidden([part.segment for part in batch], encode=self._vision_cache.features)
        hidden = hidden.to(self._head.device)
        ids = torch.from_numpy(np.concatenate([ids for part in batch for ids in part.segment.responses]))
        return hidden, token_logprobs(
            hidden,
            self._head,
            upload(ids, hidden.device),
            vocab_size=self._vlm.vocab_size,
            chunk_tokens=HEAD_CHUNK_TOKENS,
        )

    @torch.inference_mode()
    def _send_down(self, group: PreparedGroup, state: _Progress) -> _Leaving:
        """Computes what a group's answer needs besides log-probs, and queues the copies of all of it to the host."""
        if state.error is not None:
            return _Leaving(group, state.error)
        try:
            return _Leaving(group, self._compute_answer(group, state))
        except torch.OutOfMemoryError:
            return _Leaving(group, _make_memory_error(group))

    def _compute_answer(self, group: PreparedGroup, state: _Progress) -> Download:
        hidden = {view: torch.cat(rows) for view, rows in state.hidden.items() if rows}
        computed = {name: torch.cat(state.logprobs[view]) for view, name in _LOGPROBS.items()}
        options: dict[str, int] = {"vocab_size": self._vlm.vocab_size, "chunk_tokens": HEAD_CHUNK_TOKENS}
        computed |= columns.compute(group.columns, hidden, self._head, **options)
        of_payload = payloads.compute(
            group.payload,
            hidden.get("original", torch.empty(0)),
            self._head,
            top_k=group.top_k,
            degraded_hidden=hidden.get("degraded"),
            **options,
        )
        # The extremes are NaN if any number is; on a CPU they take a tenth of the time of testing each number.
        extremes: dict[str, torch.Tensor] = {view: torch.stack(rows.aminmax()) for view, rows in hidden.items()}
        return Download(computed, of_payload, extremes)


@dataclass(frozen=True, slots=True, eq=False)
class _Leaving:
    """A group with its error, or its columns, payload and extremes on their way to the host."""

    group: PreparedGroup
    results: Download | VaopdError


def _finish(leaving: _Leaving) -> EngineResult | VaopdError:
    """Waits for a group's results and makes its answer."""
    group = leaving.group
    if not isinstance(leaving.results, Download):
        return leaving.results
    computed, of_payload, extremes = leaving.results.wait()
    if not all(pair.isfinite().all() for pair in extremes.values()):
        return NumericalError(f"group {group.group_id!r}: the teacher's hidden states are not finite")
    arrays = {name: column.numpy() for name, column in computed.items()}
    return finish(group, arrays, payloads.pack(group.payload, of_payload))


def _make_memory_error(group: PreparedGroup) -> LimitExceeded:
    longest = max(len(ids) for ids in group.responses)
    return LimitExceeded(
        f"group {group.group_id!r} ({len(group.responses)} rollouts of up to {longest} tokens after a prompt of "
        f"{len(group.original.token_ids)}) does not fit into the teacher's memory; send less, or lower "
        "teacher.batch_tokens"
    )


def _choose_views(group: PreparedGroup) -> set[View]:
    """Returns the views that need their hidden states kept after the log-probs."""
    kept = columns.list_views(group.columns)
    if group.payload == "hidden_pair":
        return kept | set(VIEWS)
    return kept | {"original"} if group.payload in ("hidden", "hidden_int8", "top_k") else kept


def _make_batches(groups: Sequence[PreparedGroup], batch_tokens: int) -> Iterator[tuple[list[_Part], int]]:
    """Yields the parts of each forward, and the number of groups that are complete after it."""
    batch: list[_Part] = []
    tokens = 0
    for index, group in enumerate(groups):
        parts = [_Part(index, view, group.segment(view)) for view in VIEWS]
        cost = group.tokens
        if batch and tokens + cost > batch_tokens:
            yield batch, index
            batch, tokens = [], 0
        if cost > batch_tokens:
            *first, last = [[piece] for part in parts for piece in _split(part, batch_tokens)]
            yield from ((piece, index) for piece in first)
            yield last, index + 1
        else:
            batch += parts
            tokens += cost
    if batch:
        yield batch, len(groups)


def _split(part: _Part, batch_tokens: int) -> Iterator[_Part]:
    """Yields a view's siblings in their order, as many at a time as fit behind their prompt; at least one."""
    siblings: list[np.ndarray] = []
    for response in part.segment.responses:
        if siblings and part.take([*siblings, response]).tokens > batch_tokens:
            yield part.take(siblings)
            siblings = []
        siblings.append(response)
    yield part.take(siblings)


def _split_batch(batch: Sequence[_Part]) -> list[Sequence[_Part]]:
    """Returns two batches with half of the parts each, of a single part with half of its siblings; one of a rollout."""
    if len(batch) == 1:
        return [[half] for half in batch[0].split_in_half()]
    middle = (len(batch) + 1) // 2
    return [batch[:middle], batch[middle:]]
