"""What the engine and its scheduler do when something runs out, breaks, or is no longer wanted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

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
from vaopd_teacher.engines.engine import EngineResult, PreparedGroup, finish


class SmallDevice(Vlm):
    """The tiny teacher on a device with room for so many responses, both views counted."""

    room = 4

    def compute_response_hidden(self, segments: Sequence[Segment], *, encode: Encode | None = None) -> torch.Tensor:
        if (wanted := sum(len(segment.responses) for segment in segments)) > self.room:
            raise torch.OutOfMemoryError(f"no room for {wanted} responses")
        return super().compute_response_hidden(segments, encode=encode)


def on_small_device() -> SmallDevice:
    vlm = tiny_vlm()
    return SmallDevice(path=vlm.path, model=vlm.model, processor=vlm.processor, config=vlm.config, family=vlm.family)


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


def test_out_of_memory_halves_the_batch_once() -> None:
    with teacher_in_process(tiny_vlm()) as roomy, teacher_in_process(on_small_device()) as tight:
        expected, halved = (results(t.target, group("g", rollouts=4))["g"] for t in (roomy, tight))
    assert isinstance(expected, GroupScore)
    assert isinstance(halved, GroupScore)
    error = tolerance.logprobs(tiny_vlm().config, decode(expected.payload)["hidden"], tiny_vlm().head)
    assert_within(np.concatenate(halved.teacher_logprobs), np.concatenate(expected.teacher_logprobs), error)


def test_out_of_memory_is_never_the_fault_of_the_groups_beside() -> None:
    with teacher_in_process(on_small_device()) as tight:
        # One forward of 2 views × (6 + 2 + 1) rollouts. Its halves don't fit, nor does the large group by itself.
        answers = results(tight.target, group("large", rollouts=6), group("small"), group("smaller", rollouts=1))
    assert isinstance(answers["large"], GroupFailure)
    assert isinstance(answers["small"], GroupScore)
    assert isinstance(answers["smaller"], GroupScore)


def test_out_of_memory_after_halving_is_that_groups_limit() -> None:
    with teacher_in_process(on_small_device()) as tight:
        # 2 views of 6 rollouts; a half, one view, doesn't fit into 4 either.
        too_large = results(tight.target, group("large", rollouts=6))["large"]
        fits = results(tight.target, group("small"))["small"]
    assert isinstance(too_large, GroupFailure)
    assert isinstance(too_large.error, LimitExceeded)
    assert "6 rollouts" in str(too_large.error)
    assert isinstance(fits, GroupScore)


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
