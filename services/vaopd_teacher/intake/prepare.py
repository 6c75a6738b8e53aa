"""Turns a request into groups that are ready for the device; refuses everything that can be refused without it.

`read_call_settings` checks what concerns the whole call. `Preparer.admit_image` decodes an uploaded image and makes
both of its views; `Preparer.prepare` checks one group and renders its prompt. Both run on a small thread pool.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import PIL.Image

from vaopd import images as image_files
from vaopd.degradation import check_strength, degrade, view_name, view_seed
from vaopd.errors import InvalidInput, LimitExceeded, Mismatch
from vaopd.pb import teacher_pb2
from vaopd.types import Degradation, EncodedImage, ImagePart, PayloadKind, TeacherDescription, TeacherLimits, TextPart
from vaopd.vlm.families import PreparedImage
from vaopd.vlm.prompts import PreparedPrompt, PromptReader, check_same_tokenizer
from vaopd.wire.common import messages_from_pb
from vaopd.wire.teacher import (
    DEGRADATION_KINDS,
    PAYLOAD_KINDS,
    TOKEN_LETTERS,
    count_tokens,
    degradation_from_pb,
    payload_kind_from_pb,
    prompt_tokens_of,
)
from vaopd_teacher.engines.engine import PreparedGroup
from vaopd_teacher.intake.image_stores import ImageStore, PreparedImages

_SHA256 = re.compile("[0-9a-f]{64}")
MAX_ID_CHARACTERS = 256
MAX_PARTS = 2**16
"""Rollouts, images and parts of messages in a call, images in an upload or a question after them."""
MAX_LETTERS_PER_TOKEN = 16
"""No text of any language has so many on average; a longer text is refused before a tokenizer sees it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallSettings:
    """The settings of a call, which hold for each of its groups."""

    payload: PayloadKind
    top_k: int
    degradation: Degradation
    columns: tuple[str, ...] = ()


def read_call_settings(request: teacher_pb2.ScoreGroupsRequest, teacher: TeacherDescription) -> CallSettings:
    """Checks a call and returns its settings. Raises InvalidInput, LimitExceeded or Mismatch."""
    if request.tokenizer_fingerprint:
        check_same_tokenizer(student=request.tokenizer_fingerprint, teacher=teacher.tokenizer_fingerprint)
    check_revision(request.revision, teacher)
    groups, limit = len(request.groups), teacher.limits.max_groups_per_request
    if groups == 0:
        raise InvalidInput("the request holds no groups; it needs at least one", field="groups")
    if groups > limit:
        raise LimitExceeded(f"the request holds {groups} groups, the limit is {limit}; split it")
    _check_parts(request.groups)
    tokens, limit = sum(map(count_tokens, request.groups)), teacher.limits.max_tokens_per_request
    if tokens > limit:
        raise LimitExceeded(f"the request holds {tokens} tokens, the limit is {limit}; split it")
    ids = [group.group_id for group in request.groups]
    for index, name in enumerate(ids):
        check_id("group_id", name, field=f"groups[{index}].group_id")
    if "" in ids:
        unnamed = ids.index("")
        raise InvalidInput(
            f"group {unnamed} of the request has an empty group_id; name it", field=f"groups[{unnamed}].group_id"
        )
    _refuse_duplicates("group_id", ids, "the request", path="groups")
    return CallSettings(
        payload=_read_payload(request, teacher),
        top_k=request.top_k,
        degradation=_read_degradation(request.degradation),
        columns=_read_columns(request.columns, teacher),
    )


def check_count(kind: str, count: int) -> None:
    """Raises LimitExceeded for more items than a call needs: empty ones take two bytes, and time on the event loop."""
    if count > MAX_PARTS:
        raise LimitExceeded(f"the call holds {count} {kind} or more, the limit is {MAX_PARTS}; split it")


def _check_parts(groups: Sequence[teacher_pb2.PromptGroup]) -> None:
    """Counts before anything looks at each part."""
    parts = 0
    for group in groups:
        messages = group.messages.messages
        parts += len(group.rollouts) + len(group.tokens.image_sha256) + len(messages)
        check_count("rollouts, images and messages", parts)
        parts += sum(len(message.content) for message in messages)
        check_count("rollouts, images and parts of messages", parts)


def check_id(kind: str, name: str, *, field: str) -> None:
    """Raises InvalidInput for a name that is too long to be quoted in messages and logs."""
    if len(name) > MAX_ID_CHARACTERS:
        raise InvalidInput(
            f"a {kind} has {len(name)} characters, the limit is {MAX_ID_CHARACTERS}; shorten it", field=field
        )


def list_images(group: teacher_pb2.PromptGroup) -> list[str]:
    """Returns the SHA-256 of the images that a group's prompt refers to, unchecked."""
    if group.WhichOneof("prompt") == "tokens":
        return list(group.tokens.image_sha256)
    return [part.image_sha256 for m in group.messages.messages for part in m.content if part.image_sha256]


def check_revision(revision: str, teacher: TeacherDescription) -> None:
    """Raises Mismatch for a revision other than the teacher's, unless it is empty."""
    if revision and revision != teacher.revision:
        raise Mismatch(
            f"the client expects teacher revision {revision[:12]!r}…, this teacher has {teacher.revision[:12]}…; "
            "describe the teacher again and fetch its head again"
        )


def cut(
    groups: Sequence[teacher_pb2.PromptGroup], batch_tokens: int
) -> Iterator[tuple[list[teacher_pb2.PromptGroup], int]]:
    """Yields consecutive groups that fill a forward, and the tokens that they take; a larger group goes alone."""
    unit: list[teacher_pb2.PromptGroup] = []
    room = 0
    for group in groups:
        tokens = _count_tokens(group)
        if unit and room + tokens > batch_tokens:
            yield unit, room
            unit, room = [], 0
        unit.append(group)
        room += tokens
    if unit:
        yield unit, room


def _count_tokens(group: teacher_pb2.PromptGroup) -> int:
    """Counts the tokens of a forward for both views of a group: exact for token ids, a guess for texts."""
    prompt = prompt_tokens_of(group)
    texts = sum(len(rollout.response_text) // TOKEN_LETTERS for rollout in group.rollouts)
    return 2 * (prompt + texts + sum(max(0, len(rollout.response_ids) - 1) for rollout in group.rollouts))


def _read_payload(request: teacher_pb2.ScoreGroupsRequest, teacher: TeacherDescription) -> PayloadKind:
    try:
        payload = payload_kind_from_pb(request.payload)
    except KeyError:
        known = ", ".join(f"{name} ({PAYLOAD_KINDS[name]})" for name in teacher.payloads)
        raise Mismatch(f"payload {request.payload} is unknown to this teacher; it has {known}") from None
    if payload not in teacher.payloads:
        raise Mismatch(
            f"this teacher can't send payload {payload}; it has {', '.join(teacher.payloads)}: choose one of them in "
            "teacher.payload, or ask a teacher with another backend"
        )
    if payload == "top_k" and not 1 <= request.top_k <= teacher.vocab_size:
        raise InvalidInput(
            f"top_k = {request.top_k} is outside [1, {teacher.vocab_size}], the vocabulary", field="top_k"
        )
    return payload


def _read_columns(names: Sequence[str], teacher: TeacherDescription) -> tuple[str, ...]:
    for name in names:
        if name not in teacher.columns:
            raise Mismatch(
                f"this teacher can't compute column {name[:80]!r}; on request it computes "
                f"{', '.join(teacher.columns) or 'none'}: leave it out, or ask a teacher with another backend"
            )
    return tuple(dict.fromkeys(names))


def _read_degradation(message: teacher_pb2.Degradation) -> Degradation:
    try:
        degradation = degradation_from_pb(message)
    except KeyError:
        known = ", ".join(f"{name} ({number})" for name, number in DEGRADATION_KINDS.items())
        raise InvalidInput(
            f"degradation {message.kind} is unknown to this teacher; it has {known}", field="degradation.kind"
        ) from None
    check_strength(degradation)
    return degradation


def _refuse_duplicates(field: str, ids: Sequence[str], place: str, *, path: str) -> None:
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    for index, name in enumerate(ids):
        if name in seen:
            raise InvalidInput(
                f"{field} {name[:80]!r} stands twice in {place}; ids must be unique there",
                field=f"{path}[{index}].{field}",
            )
        seen.add(name)


class Preparer:
    """Reads groups with one model's tokenizer and image processor."""

    def __init__(
        self, reader: PromptReader, *, store: ImageStore, views: PreparedImages, limits: TeacherLimits
    ) -> None:
        self._reader = reader
        self._store = store
        self._prepared = views
        self._limits = limits
        # An upload doesn't say which degraded view will be needed; the last one that was used is the likeliest.
        self._usual = Degradation()
        self._max_tokens = min(reader.max_tokens, limits.max_tokens_per_rollout)

    def admit_image(self, image: EncodedImage, *, job: str = "") -> None:
        """Decodes and stores an image that `job` uploaded and makes its views.

        Raises ImageRefused or LimitExceeded, so that a bad image is refused at its upload, and Busy.
        """
        decoded = self._decode(image)
        self._store.put(image, job=job)
        self._make_both_views(image.sha256, self._usual, lambda: decoded)

    def prepare(self, group: teacher_pb2.PromptGroup, settings: CallSettings) -> PreparedGroup:
        """Checks and renders one group. Raises InvalidInput, LimitExceeded, Mismatch or NotFound."""
        self._check_rollouts(group)
        self._usual = settings.degradation
        original, degraded = self._render_prompts(group, settings.degradation)
        responses = []
        for rollout in group.rollouts:
            ids = self._read_response_ids(rollout)
            try:
                self._reader.check_response(ids, original, max_tokens=self._max_tokens)
            except InvalidInput as error:
                raise InvalidInput(f"rollout {rollout.rollout_id!r} of group {group.group_id!r}: {error}") from None
            responses.append(ids)
        return PreparedGroup(
            group_id=group.group_id,
            original=original,
            degraded=degraded,
            responses=tuple(responses),
            payload=settings.payload,
            top_k=settings.top_k,
            columns=settings.columns,
        )

    def decode_tokens(self, token_ids: np.ndarray) -> list[str]:
        """Decodes each token by itself; a part of a character shows as U+FFFD."""
        return [self._reader.tokenizer.decode([int(token_id)]) for token_id in token_ids]

    def _check_rollouts(self, group: teacher_pb2.PromptGroup) -> None:
        rollouts, limit = len(group.rollouts), self._limits.max_rollouts_per_group
        if rollouts == 0:
            raise InvalidInput(f"group {group.group_id!r} holds no rollouts; it needs at least one")
        if rollouts > limit:
            raise LimitExceeded(f"group {group.group_id!r} holds {rollouts} rollouts, the limit is {limit}; split it")
        ids = [rollout.rollout_id for rollout in group.rollouts]
        for index, name in enumerate(ids):
            check_id("rollout_id", name, field=f"rollouts[{index}].rollout_id")
        _refuse_duplicates("rollout_id", ids, f"group {group.group_id!r}", path="rollouts")

    def _render_prompts(
        self, group: teacher_pb2.PromptGroup, degradation: Degradation
    ) -> tuple[PreparedPrompt, PreparedPrompt]:
        """Renders the prompt in the original and in the degraded view."""
        kind = group.WhichOneof("prompt")
        if kind == "tokens":
            token_ids = np.fromiter(group.tokens.token_ids, dtype=np.int64, count=len(group.tokens.token_ids))
            if token_ids.size > self._max_tokens:  # before any image is decoded
                raise InvalidInput(
                    f"the prompt has {token_ids.size} tokens, the limit is {self._max_tokens}; shorten it or scale the "
                    "images down"
                )
            names = list(group.tokens.image_sha256)
            views = self._collect_views(names, degradation)
            return tuple(  # type: ignore[return-value]
                self._reader.read_token_ids(token_ids, [view[sha] for sha in names]) for view in views
            )
        if kind == "messages":
            messages = messages_from_pb(group.messages.messages)
            if not messages:
                raise InvalidInput(f"group {group.group_id!r} has an empty prompt; it needs at least one message")
            self._check_letters(
                sum(len(p.text) for m in messages for p in m.content if isinstance(p, TextPart)), "prompt"
            )
            names = [part.sha256 for m in messages for part in m.content if isinstance(part, ImagePart)]
            views = self._collect_views(names, degradation)
            return tuple(self._reader.render(messages, view) for view in views)  # type: ignore[return-value]
        raise InvalidInput(f"group {group.group_id!r} has no prompt; give tokens or messages")

    def _collect_views(
        self, names: Sequence[str], degradation: Degradation
    ) -> tuple[dict[str, PreparedImage], dict[str, PreparedImage]]:
        """Returns each image in both views, by SHA-256."""
        original, degraded = {}, {}
        for sha256 in dict.fromkeys(names):
            if not _SHA256.fullmatch(sha256):
                raise InvalidInput(
                    f"image {sha256[:80]!r} is no SHA-256 in hex digits; upload the image with PutImages and name it so"
                )
            original[sha256], degraded[sha256] = self._make_both_views(
                sha256, degradation, partial(self._decode_stored, sha256)
            )
        return original, degraded

    def _make_both_views(
        self, sha256: str, degradation: Degradation, decode: Callable[[], PIL.Image.Image]
    ) -> tuple[PreparedImage, PreparedImage]:
        """Returns both views from the cache; missing ones are made of one picture, decoded and scaled once."""
        scaled = cache(lambda: self._reader.scale_image(decode()))
        seed = view_seed(sha256)
        original = self._view(f"{sha256}:original", scaled)
        degraded = self._view(f"{sha256}:{view_name(degradation)}", lambda: degrade(scaled(), degradation, seed=seed))
        if original.grid != degraded.grid:
            raise Mismatch(
                f"image {sha256[:12]}… has grid {original.grid} in the original and {degraded.grid} in the degraded "
                "view; the views must differ in pixels only"
            )
        return original, degraded

    def _view(self, key: str, pixels: Callable[[], PIL.Image.Image]) -> PreparedImage:
        return self._prepared.get(key, lambda: replace(self._reader.prepare_image(pixels()), key=key))

    def _decode_stored(self, sha256: str) -> PIL.Image.Image:
        return self._decode(self._store.get(sha256))

    def _decode(self, image: EncodedImage) -> PIL.Image.Image:
        limits = self._limits
        return image_files.decode(image, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels)

    def _read_response_ids(self, rollout: teacher_pb2.RolloutTokens) -> np.ndarray:
        if rollout.response_text and rollout.response_ids:
            raise InvalidInput(f"rollout {rollout.rollout_id!r} has ids and a text; give one of the two")
        if not rollout.response_text:
            return np.fromiter(rollout.response_ids, dtype=np.int64, count=len(rollout.response_ids))
        self._check_letters(len(rollout.response_text), f"rollout {rollout.rollout_id[:80]!r}")
        ids = self._reader.encode_text(rollout.response_text)
        return np.array([*ids, self._reader.tokenizer.eos_token_id], dtype=np.int64)

    def _check_letters(self, letters: int, name: str) -> None:
        if letters > (limit := MAX_LETTERS_PER_TOKEN * self._max_tokens):
            raise LimitExceeded(
                f"the text of {name} has {letters} characters, the limit is {limit} ({self._max_tokens} tokens); "
                "shorten it"
            )
