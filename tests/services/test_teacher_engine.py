"""What the engine and its scheduler do when something runs out, breaks, or is no longer wanted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import tolerance
from tests.support.models import save_untrained, tiny_vlm
from tests.support.teacher import drawing, teacher_in_process, token_request
from tests.support.tolerance import assert_within
from tests.support.waiting import wait_until
from vaopd.client import GroupFailure, SyncTeacherClient, TeacherClient
from vaopd.config import SharingConfig, TeacherServiceConfig
from vaopd.errors import LimitExceeded, NumericalError, Unavailable, VaopdError
from vaopd.payloads import decode
from vaopd.types import GroupScore, Payload, ScoreRequest
from vaopd.vlm.model import Encode, Segment, Vlm
from vaopd_teacher.engines.download import Download
from vaopd_teacher.engines.engine import EngineResult, PreparedGroup, finish


@dataclass(frozen=True, kw_only=True)
class SmallDevice(Vlm):
    """The tiny teacher on a device with room for so many responses, both views counted, and tokens of one segment."""

    room: int = 4
    most_tokens: int = 10_000

    def compute_response_hidden(self, segments: Sequence[Segment], *, encode: Encode | None = None) -> torch.Tensor:
        wanted = sum(len(segment.responses) for segment in segments)
        if wanted > self.room or max(segment.tokens for segment in segments) > self.most_tokens:
            raise torch.OutOfMemoryError(f"no room for {wanted} responses")
        return super().compute_response_hidden(segments, encode=encode)


def on_small_device(**limits: int) -> SmallDevice:
    vlm = tiny_vlm()
    of_vlm = {name: getattr(vlm, name) for name in ("path", "model", "processor", "config", "family", "eos_ids")}
    return SmallDevice(**of_vlm, **limits)


class HeldEngine:
    """Notes the groups that reach it, and holds each until it is let go."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.go = threading.Event()

    def score(self, groups: Sequence[PreparedGroup]) -> Iterator[EngineResult | VaopdError]:
        for group in groups:
            self.reached.append(group.group_id)
            assert self.go.wait(60)
            nothing = np.zeros(sum(len(ids) for ids in group.responses), np.float32)
            columns = dict.fromkeys(("teacher_logprobs", "degraded_logprobs"), nothing)
            yield finish(group, columns, Payload(kind="none"))


class BrokenEngine:
    def score(self, groups: Sequence[PreparedGroup]) -> Iterator[EngineResult | VaopdError]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered at 0x7f00")
        yield


def results(target: str, *groups: ScoreRequest, **options: object) -> dict[str, GroupScore | GroupFailure]:
    with SyncTeacherClient(target, **options) as client:  # type: ignore[arg-type]
        return {result.group_id: result for result in client.score(groups)}


def group(name: str, rollouts: int = 2, text: str = "How long?") -> ScoreRequest:
    return token_request(tiny_vlm(), name, pictures=[drawing(1)], text=text, responses=["It is 12."] * rollouts)


def at_most(groups: int) -> TeacherServiceConfig:
    return TeacherServiceConfig(sharing=SharingConfig(max_waiting_groups=groups))


@pytest.mark.parametrize(("rollouts", "beside"), [(4, 0), (6, 0), (4, 2)], ids=["views", "siblings", "beside"])
def test_out_of_memory_halves_the_forward_until_it_fits(rollouts: int, beside: int) -> None:
    """Whether a group fits depends on it alone: what shares its forward is split off first."""
    asked = [group("g", rollouts=rollouts), *([group("beside", rollouts=beside)] if beside else [])]
    with teacher_in_process(tiny_vlm()) as roomy, teacher_in_process(on_small_device()) as tight:
        expected, halved = (results(t.target, *asked)["g"] for t in (roomy, tight))
    assert isinstance(expected, GroupScore)
    assert isinstance(halved, GroupScore)
    error = tolerance.logprobs(tiny_vlm().config, decode(expected.payload)["hidden"], tiny_vlm().head)
    assert_within(np.concatenate(halved.teacher_logprobs), np.concatenate(expected.teacher_logprobs), error)


def test_out_of_memory_with_a_single_rollout_is_its_groups_limit() -> None:
    """In one forward with groups that fit."""
    with teacher_in_process(on_small_device(most_tokens=60)) as tight:
        answers = results(tight.target, group("large", text="How long? " * 40), group("small"), group("alone", 1))
    assert isinstance(too_large := answers["large"], GroupFailure)
    assert isinstance(too_large.error, LimitExceeded)
    assert "2 rollouts" in str(too_large.error)
    assert isinstance(answers["small"], GroupScore)
    assert isinstance(answers["alone"], GroupScore)


def test_out_of_memory_while_results_leave_is_that_groups_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    own, left = Download.__init__, []

    def leave(download: Download, *sets: Any) -> None:
        left.append(sets)
        if len(left) == 1:
            raise torch.OutOfMemoryError("no room for the hidden states of a group")
        own(download, *sets)

    monkeypatch.setattr(Download, "__init__", leave)
    with teacher_in_process(tiny_vlm()) as teacher:
        first, second = (results(teacher.target, group(name))[name] for name in ("first", "second"))
    assert isinstance(first, GroupFailure)
    assert isinstance(first.error, LimitExceeded)
    assert isinstance(second, GroupScore)


def test_a_result_that_is_not_finite_is_an_error_of_its_group(tmp_path: Path) -> None:
    vlm = Vlm.load(save_untrained(tmp_path / "broken"), device_map="cpu")
    (poisoned, *_) = vlm.tokenizer("@", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        vlm.model.get_input_embeddings().weight[poisoned] = float("nan")
    with teacher_in_process(vlm) as teacher:
        answers = results(teacher.target, group("bad", text="@"), group("good"))
    assert isinstance(answers["good"], GroupScore)
    bad = answers["bad"]
    assert isinstance(bad, GroupFailure)
    assert isinstance(bad.error, NumericalError)
    assert "not finite" in str(bad.error)


def test_an_engine_that_breaks_ends_the_service_and_says_nothing_of_its_insides() -> None:
    with teacher_in_process(tiny_vlm(), engine=BrokenEngine()) as teacher:
        with pytest.raises(Unavailable) as caught:
            results(teacher.target, group("g"), patience_s=0.0)
        assert "CUDA" not in str(caught.value)
        wait_until("the server knows that its engine failed", teacher.failed)


async def test_the_work_of_a_call_that_was_cancelled_never_reaches_the_device() -> None:
    engine, room = HeldEngine(), 8
    with teacher_in_process(tiny_vlm(), batch_tokens=50, engine=engine, service=at_most(room)) as teacher:

        def waiting() -> int:
            # A request for all of the room is always refused while anything waits, and told how much does.
            with pytest.raises(LimitExceeded, match=r"\d+ groups wait already") as refused:
                results(teacher.target, *(group(f"probe{n}") for n in range(room)), patience_s=0.0)
            return int(str(refused.value).split()[0])

        async def score(name: str) -> list[GroupScore | GroupFailure]:
            async with TeacherClient(teacher.target) as client:
                return [result async for result in client.score([group(name)])]

        first = asyncio.create_task(score("first"))
        await asyncio.to_thread(wait_until, "the first is on the device", lambda: engine.reached == ["first"])
        second = asyncio.create_task(score("second"))
        await asyncio.to_thread(wait_until, "the second waits behind it", lambda: waiting() == 2)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        await asyncio.to_thread(wait_until, "the second is gone", lambda: waiting() == 1)
        third = asyncio.create_task(score("third"))
        await asyncio.to_thread(wait_until, "the third waits behind the first", lambda: waiting() == 2)
        engine.go.set()
        await asyncio.gather(first, third)
    assert engine.reached == ["first", "third"]


def test_a_full_queue_refuses_and_the_client_comes_back() -> None:
    engine = HeldEngine()
    with teacher_in_process(tiny_vlm(), engine=engine, service=at_most(1)) as teacher:
        answers: list[object] = []
        thread = threading.Thread(target=lambda: answers.append(results(teacher.target, group("first"))))
        thread.start()
        wait_until("the first group is on the device", lambda: engine.reached == ["first"])
        with pytest.raises(LimitExceeded, match="1 groups wait already"):
            results(teacher.target, group("second"), patience_s=0.0)
        engine.go.set()
        assert "second" in results(teacher.target, group("second"))
        thread.join()
    assert len(answers) == 1
