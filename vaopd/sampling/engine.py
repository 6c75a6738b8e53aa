"""The protocols of rollout engines, and the code that they share: prompts, seeds, banned tokens, checks.

In: requests of one policy version. Out: an outcome for each request, a finished group or the error of that request.

    RolloutEngine    load_policy, generate(requests) → outcomes        every engine
    RolloutStream    add(key, request) … step() → those that ended     what a worker drives; `open_stream` makes one

A stream hands a group out when its last sibling has ended, and takes further requests while others are sampled. Weights
change only while it is empty, so each group is sampled by one version. What else is sampled beside a request changes
neither its seeds nor, but for rounding, its tokens. There is no `abort`: a worker lets groups end, or ends itself.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import PIL.Image

from vaopd.errors import InvalidInput, LimitExceeded, Mismatch, NumericalError
from vaopd.images import decode
from vaopd.types import ImagePart, PolicyVersion, Rollout, RolloutGroup, RolloutRequest
from vaopd.vlm.prompts import PromptReader

# Errors of a single request, after which the engine can be used on.
RefusedRequest = (InvalidInput, LimitExceeded, Mismatch)
Outcome = RolloutGroup | InvalidInput | LimitExceeded | Mismatch
FinishReason = Literal["stop", "length"]


class RolloutEngine(Protocol):
    """Samples responses with one set of weights at a time. Use it from one thread."""

    @property
    def policy(self) -> PolicyVersion | None:
        """The loaded snapshot; None before the first one, and after one that failed half-way."""

    def load_policy(self, policy: PolicyVersion) -> None:
        """Loads a snapshot without a restart, and drops everything that the old weights computed.

        Raises Mismatch if the snapshot's digest is not the announced one; the old weights then stay. Not to be called
        while a stream holds requests.
        """

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Outcome]:
        """Samples all requests; outcome i answers request i.

        Raises when the engine fails as a whole; it must not be used any more then.
        """

    def close(self) -> None:
        """Frees the memory and ends child processes."""


class Ended(NamedTuple):
    """An outcome, under the key that its request was added with."""

    key: str
    outcome: Outcome


@runtime_checkable
class RolloutStream(Protocol):
    """Samples the requests that were added, a little further with each step. Use it from one thread."""

    capacity: int | None
    """How many requests are sampled at once; None where the engine bounds it by itself."""

    @property
    def tokens_held(self) -> int:
        """Response tokens that the rollouts that are held may take at most; those that have ended don't count."""

    def add(self, key: str, request: RolloutRequest) -> None:
        """Takes a request of the loaded policy; `key` is unique among those held. One that is refused ends as such.

        Raises Mismatch when no policy is loaded.
        """

    def step(self) -> list[Ended]:
        """Samples further, and returns the requests that ended; none held: returns at once.

        Raises when the engine fails as a whole; it must not be used any more then.
        """


class OneByOne:
    """A stream over an engine without one: each step answers the oldest request."""

    capacity: int | None = 1

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self._held: deque[tuple[str, RolloutRequest]] = deque()

    @property
    def tokens_held(self) -> int:
        """See `RolloutStream`."""
        return sum(count_tokens(request) for _, request in self._held)

    def add(self, key: str, request: RolloutRequest) -> None:
        """See `RolloutStream`."""
        self._held.append((key, request))

    def step(self) -> list[Ended]:
        """See `RolloutStream`."""
        if not self._held:
            return []
        key, request = self._held.popleft()
        return [Ended(key, outcome) for outcome in self._engine.generate([request])]


def open_stream(engine: RolloutEngine) -> RolloutStream:
    """Returns the engine's own stream where it has one."""
    return engine if isinstance(engine, RolloutStream) else OneByOne(engine)


def sample_all(
    stream: RolloutStream, requests: Sequence[RolloutRequest], *, at_once: int | None = None
) -> Iterator[tuple[int, Outcome]]:
    """Yields (index of the request, outcome) as the requests end; at most `at_once` are held at once."""
    capacity = stream.capacity or at_once or len(requests)
    added = ended = 0
    while ended < len(requests):
        while added < len(requests) and added - ended < capacity:
            stream.add(str(added), requests[added])
            added += 1
        for key, outcome in stream.step():
            ended += 1
            yield int(key), outcome


def count_tokens(request: RolloutRequest) -> int:
    """Returns how many response tokens a request may take at most. Greedy siblings are equal: one is sampled."""
    sampling = request.sampling
    return (1 if sampling.temperature == 0 else request.num_rollouts) * sampling.max_new_tokens


def open_reader(path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> PromptReader:
    """Opens a folder or hub id with the trainer's own reader. Raises ConfigError, and InvalidInput without an EOS."""
    reader = PromptReader.open(path, min_pixels=min_pixels, max_pixels=max_pixels)
    if not reader.eos_ids:
        raise InvalidInput(f"{path} names no EOS token in generation_config.json or its tokenizer; add eos_token_id")
    return reader


def read_request(reader: PromptReader, request: RolloutRequest) -> tuple[list[int], list[PIL.Image.Image]]:
    """Returns the prompt's token ids with one placeholder per image, and the RGB images in that order, scaled.

    Raises InvalidInput, ImageRefused or LimitExceeded for a request that no worker can answer.
    """
    check_settings(request)
    by_sha = {image.sha256: image for image in request.images}
    named = [part.sha256 for m in request.messages for part in m.content if isinstance(part, ImagePart)]
    if missing := [sha for sha in named if sha not in by_sha]:
        raise InvalidInput(f"the messages name image {missing[0][:12]}…, which is not in the request")
    scaled = {sha: reader.scale_image(decode(by_sha[sha])) for sha in set(named)}
    return reader.render_ids(request.messages), [scaled[sha] for sha in named]


def check_settings(request: RolloutRequest) -> None:
    """Raises InvalidInput for sampling settings out of range; NaN always is."""
    sampling = request.sampling
    if not request.messages:
        raise InvalidInput(f"group {request.group_id!r} has no messages; a prompt needs at least one")
    if not 0 <= sampling.temperature <= 100:
        raise InvalidInput(f"temperature is {sampling.temperature}; it must be 0 (greedy) or more, at most 100")
    if not 0 < sampling.top_p <= 1:
        raise InvalidInput(f"top_p is {sampling.top_p}; it must be above 0 and at most 1")
    if request.num_rollouts < 1 or sampling.max_new_tokens < 1:
        raise InvalidInput(
            f"num_rollouts is {request.num_rollouts} and max_new_tokens {sampling.max_new_tokens}; "
            "both must be at least 1"
        )


def check_length(request: RolloutRequest, *, prompt_tokens: int, limit: int, remedy: str) -> None:
    """Raises InvalidInput when prompt and longest response together exceed the engine's `limit` of tokens.

    A response that the engine cut earlier than asked would count as the student's own.
    """
    response = request.sampling.max_new_tokens
    if prompt_tokens + response > limit:
        raise InvalidInput(
            f"the prompt of group {request.group_id!r} has {prompt_tokens} tokens; with max_new_tokens = {response} "
            f"that is more than the engine's limit of {limit}; {remedy}"
        )


def check_version(request: RolloutRequest, policy: PolicyVersion) -> None:
    """Raises Mismatch for a request for another policy version than the loaded one."""
    if request.policy_version != policy.version:
        raise Mismatch(
            f"group {request.group_id!r} wants policy version {request.policy_version}, "
            f"version {policy.version} is loaded; load that one first"
        )


def derive_seed(request: RolloutRequest) -> int:
    """Returns the seed of sibling 0; sibling k's seed is k more, as in vLLM.

    Derived from the run's seed and the group's id, so that groups differ and a redelivered request draws the same
    numbers. It has 62 bits, so that the sum with k is a signed 64-bit integer.
    """
    digest = hashlib.sha256(f"{request.sampling.seed}:{request.group_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def make_rollout(
    request: RolloutRequest, index: int, *, response_ids: Sequence[int], logprobs: Sequence[float], finish: FinishReason
) -> Rollout:
    """Makes a rollout of sampled tokens.

    Raises NumericalError for a log-prob that isn't finite, since such weights must not be sampled from any more.
    """
    values = np.asarray(logprobs, dtype=np.float32)
    if not np.isfinite(values).all():
        raise NumericalError(
            f"group {request.group_id!r}, rollout {index}: the student's log-probs are not all finite; its weights of "
            f"policy version {request.policy_version} are damaged or have diverged"
        )
    return Rollout(
        rollout_id=f"{request.group_id}/{index}",
        response_ids=np.asarray(response_ids, dtype=np.int32),
        rollout_logprobs=np.minimum(values, 0.0),  # rounding may leave +1e-8 for a certain token
        finish_reason=finish,
    )


def make_group(
    request: RolloutRequest,
    policy: PolicyVersion,
    *,
    prompt_token_ids: Sequence[int],
    rollouts: Sequence[Rollout],
    worker: str,
    generation_s: float,
) -> RolloutGroup:
    """Puts a request's rollouts together; `generation_s`: from its start until the last one ended."""
    return RolloutGroup(
        group_id=request.group_id,
        policy_version=policy.version,
        policy_sha256=policy.sha256,
        prompt_token_ids=np.asarray(prompt_token_ids, dtype=np.int32),
        rollouts=tuple(rollouts),
        worker=worker,
        generation_s=generation_s,
    )
