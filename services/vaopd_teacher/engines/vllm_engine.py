"""vLLM as a teacher backend, for teachers that only vLLM can hold: both views of a group by `prompt_logprobs`.

In: prepared groups with pictures as images, since vLLM has its own processor. Out: log-probs of both views, and the
top k; no column on request, since vLLM returns single log-probs. Each rollout is a request of its own in each view:
vLLM never reads its prefix cache for a request for prompt log-probs. Images are named by content and view, so that none
of vLLM's caches can mistake one view for the other.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import PIL.Image
import torch

from vaopd.config import Config
from vaopd.errors import ConfigError, InvalidInput, LimitExceeded, Mismatch, VaopdError
from vaopd.files.hub import model_folder
from vaopd.types import Payload, PayloadKind, Tensor
from vaopd.vlm import vllm_start
from vaopd.vlm.families import PreparedImage
from vaopd.vlm.prompts import PreparedPrompt, PromptReader
from vaopd.vlm.revision import compute_folder_revision
from vaopd_teacher.engines.backend import Backend
from vaopd_teacher.engines.engine import VIEWS, EngineResult, PreparedGroup, View, finish

PAYLOADS: tuple[PayloadKind, ...] = ("none", "top_k", "sampled")
"""The payloads that vLLM's outputs allow: they hold log-probs, no hidden states."""
_OURS = (
    *("model", "dtype", "generation_config", "logprobs_mode", "max_logprobs"),
    *("worker_extension_cls", "mm_processor_kwargs"),
)


@dataclass(frozen=True, kw_only=True)
class PictureReader(PromptReader):
    """Reads prompts as every teacher does, but keeps the pictures: `pixel_values` (height, width, 3) uint8."""

    limit_tokens: int

    @cached_property
    def max_tokens(self) -> int:
        """The most tokens of prompt and response together."""
        return self.limit_tokens

    def prepare_image(self, image: PIL.Image.Image) -> PreparedImage:
        """Keeps the picture, with the grid that the checks of a prompt need."""
        prepared = super().prepare_image(image)
        return replace(prepared, pixel_values=torch.from_numpy(np.array(image, dtype=np.uint8)))


@dataclass(slots=True, eq=False)
class _Progress:
    """A group's numbers so far: for each view one array per rollout."""

    logprobs: dict[View, list[np.ndarray]] = field(default_factory=lambda: {view: [] for view in VIEWS})
    top: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    error: VaopdError | None = None


class VllmTeacherEngine:
    """The engine over a running `vllm.LLM`; the extension makes its logits log-probs over the logical vocabulary."""

    def __init__(self, llm: Any, reader: PictureReader, *, max_images: int) -> None:
        self._llm = llm
        self._reader = reader
        self._max_images = max_images

    def score(self, groups: Sequence[PreparedGroup]) -> Iterator[EngineResult | VaopdError]:
        """Sends all requests of all groups at once, which vLLM batches as its own settings allow."""
        progress = [_Progress() for _ in groups]
        accepted: list[tuple[int, View, int]] = []
        for index, group in enumerate(groups):
            try:
                for view in VIEWS:
                    for k in range(len(group.responses)):
                        self._enqueue(group, view, k)
                        accepted.append((index, view, k))
            except VaopdError as error:  # requests of the group that were accepted before are computed in vain
                progress[index].error = error
        finished = self._llm.wait_for_completion(use_tqdm=False)  # in the order in which they were accepted
        if len(finished) != len(accepted):
            raise VaopdError(f"vLLM answered {len(finished)} of {len(accepted)} requests; its log says why")
        for (index, view, k), output in zip(accepted, finished, strict=True):
            if progress[index].error is None:
                _read(groups[index], view, k, output, progress[index])
        for group, state in zip(groups, progress, strict=True):
            yield state.error or _make_result(group, state)

    def close(self) -> None:
        """Ends vLLM's processes."""
        vllm_start.stop(self._llm)

    def _enqueue(self, group: PreparedGroup, view: View, k: int) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        prompt = group.prompt(view)
        if len(prompt.images) > self._max_images:
            raise LimitExceeded(
                f"group {group.group_id!r} has {len(prompt.images)} images, the limit is {self._max_images}; raise "
                "limit_mm_per_prompt in the service's engine.options"
            )
        token_ids = [*collapse_images(self._reader, prompt), *group.responses[k].tolist()]
        request: dict[str, Any] = {"prompt_token_ids": token_ids}
        if prompt.images:
            request["multi_modal_data"] = {
                "image": [PIL.Image.fromarray(image.pixel_values.numpy()) for image in prompt.images]
            }
            request["multi_modal_uuids"] = {"image": [image.key for image in prompt.images]}
        sampling = SamplingParams(
            max_tokens=1,  # the least that vLLM accepts
            temperature=0.0,
            prompt_logprobs=_count_asked(group, view, self._reader.vocab_size),
            flat_logprobs=True,
            detokenize=False,
        )
        try:
            self._llm.enqueue(request, sampling, use_tqdm=False)
        except (VLLMClientError, ValueError) as error:
            raise InvalidInput(f"vLLM refuses group {group.group_id!r}: {error}") from None


def collapse_images(reader: PromptReader, prompt: PreparedPrompt) -> list[int]:
    """Returns the prompt with one placeholder per image, as vLLM reads it: the inverse of `reader.expand`.

    Raises InvalidInput when the marks around an image's placeholders are missing.
    """
    placeholder = reader.family.image_token_id(reader.config)
    given: list[int] = prompt.token_ids.tolist()
    written: list[int] = []
    at = 0
    for image in prompt.images:
        tokens = reader.family.make_image_tokens(reader.processor, reader.config, image)
        while at < len(given) and not (given[at] == tokens[0] and given[at : at + len(tokens)] == tokens):
            written.append(given[at])
            at += 1
        if at == len(given):
            raise InvalidInput("the prompt lacks the marks around an image's placeholders; render it by its template")
        written.append(placeholder)
        at += len(tokens)
    return written + given[at:]


def _count_asked(group: PreparedGroup, view: View, vocab_size: int) -> int:
    """Returns the number of likeliest tokens to ask for: twice as many as are sent, see `split_top_k`."""
    return min(2 * group.top_k, vocab_size) if group.payload == "top_k" and view == "original" else 0


def _read(group: PreparedGroup, view: View, k: int, output: Any, state: _Progress) -> None:
    """Reads the response's rows of a request's prompt log-probs: each (token itself, likeliest, second, …)."""
    prompt = group.prompt(view)
    response = group.responses[k]
    if output.prompt_token_ids != [*prompt.token_ids.tolist(), *response.tolist()]:
        state.error = Mismatch(
            f"group {group.group_id!r}: vLLM reads {len(output.prompt_token_ids)} tokens where the teacher's processor "
            f"has {len(prompt.token_ids) + len(response)}; vLLM's version and transformers' don't go together"
        )
        return
    flat = output.prompt_logprobs
    first = flat.start_indices[-len(response)]
    ids = np.array(flat.token_ids[first:], dtype=np.int64).reshape(len(response), -1)
    logprobs = np.array(flat.logprobs[first:], dtype=np.float64).reshape(len(response), -1)
    if not np.array_equal(ids[:, 0], response):
        raise VaopdError("vLLM's prompt log-probs are of other tokens than the prompt's; this version isn't supported")
    state.logprobs[view].append(logprobs[:, 0].astype(np.float32))
    if ids.shape[1] > 1:
        state.top.append(split_top_k(ids[:, 1:], logprobs[:, 1:], group.top_k))


def split_top_k(ids: np.ndarray, logprobs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits the n ≥ k likeliest tokens (T, n): ids (T, k) int32, log-probs (T, k), the tail's log-mass (T,) float32.

    The tail is the mass of the tokens after the k, by their own log-probs, plus 1 minus the mass of all n if that is
    more than rounding: float32 is off by 2^-24 of a log-prob, hence the mass by at most 2^-22 of the entropy.
    """
    n = logprobs.shape[1]
    mass = np.exp(logprobs)
    rest = 1.0 - mass.sum(-1)
    rounding = 2**-22 * -(mass * logprobs).sum(-1) + 2**-48  # the latter for the sum in float64
    tail = mass[:, k:].sum(-1) + np.where(rest > rounding, rest, 0.0)
    with np.errstate(divide="ignore"):  # k = V: nothing is left
        tail_logprobs = np.log(tail if n > k else np.zeros_like(tail))
    return ids[:, :k].astype(np.int32), logprobs[:, :k].astype(np.float32), tail_logprobs.astype(np.float32)


def _make_result(group: PreparedGroup, state: _Progress) -> EngineResult | VaopdError:
    original, degraded = (np.concatenate(state.logprobs[view]) for view in VIEWS)
    tensors = {}
    if group.payload == "top_k":
        names = ("token_ids", "logprobs", "tail_logprobs")
        parts = map(np.concatenate, zip(*state.top, strict=True))
        tensors = {name: Tensor.from_numpy(part) for name, part in zip(names, parts, strict=True)}
    payload = Payload(kind=group.payload, tensors=tensors)
    return finish(group, {"teacher_logprobs": original, "degraded_logprobs": degraded}, payload)


def load(config: Config, options: Mapping[str, Any]) -> Backend:
    """Starts vLLM over the teacher of a configuration; `options`: the service's engine.options.

    Raises ConfigError when vLLM is missing, can't start, or an option is one that the teacher sets itself.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engine.backend = \"vllm\": vLLM is not installed; pip install '.[gpu]' (without a GPU: '.[cpu]')"
        )
    if taken := sorted(set(options) & set(_OURS)):
        raise ConfigError(f"engine.options.{taken[0]} is set by the teacher itself; leave it out")
    bounds = {"min_pixels": config.data.min_pixels, "max_pixels": config.data.max_pixels}
    reader = PromptReader.open(config.teacher.model, **bounds)
    # Left to itself, vLLM binds the process to one core, on which the server's other threads would run too.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    llm = vllm_start.start(
        config.teacher.model,
        dtype=config.teacher.dtype,
        options=options,
        **bounds,
        extension="vaopd_teacher.engines.vllm_extension.TeacherExtension",
        logprobs_mode="raw_logits",  # the extension has made log-probs of them
        max_logprobs=-1,
    )
    llm.collective_rpc("normalise_logits", args=(reader.vocab_size,))
    pictures = PictureReader(
        processor=reader.processor,
        config=reader.config,
        family=reader.family,
        eos_ids=reader.eos_ids,
        # vLLM generates a token after all that it scores.
        limit_tokens=min(reader.max_tokens, llm.llm_engine.model_config.max_model_len - 1),
    )
    engine = VllmTeacherEngine(llm, pictures, max_images=vllm_start.read_max_images(llm))
    folder = model_folder(config.teacher.model, role="teacher")
    return Backend(
        reader=pictures,
        engine=engine,
        revision=compute_folder_revision(folder, dtype=config.teacher.dtype),
        dtype=config.teacher.dtype,
        payloads=PAYLOADS,
        close=engine.close,
    )
