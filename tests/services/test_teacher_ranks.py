"""A teacher that several processes share by tensor parallelism: it scores, drains and dies like one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import tolerance
from tests.support.families import FAMILIES, ask, family_vlm
from tests.support.models import model_folder, tiny_vlm
from tests.support.teacher import (
    TeacherProcess,
    drawing,
    teacher_in_process,
    teacher_process,
    token_request,
    write_config,
)
from tests.support.tolerance import assert_within
from tests.support.waiting import wait_until
from vaopd.client import SyncTeacherClient
from vaopd.config import load_config
from vaopd.errors import ConfigError
from vaopd.launch.supervisor import Supervisor
from vaopd.launch.up import UpOptions, _Launch
from vaopd.payloads import decode
from vaopd.types import GroupScore, ScoreRequest
from vaopd.vlm.model import Segment, Vlm
from vaopd_teacher.engines.tensor_parallel import LeadingVlm, Link, check_heads, compute, lead, pack_forward


@pytest.mark.parametrize("family", FAMILIES)
def test_a_message_holds_all_that_a_forward_needs(family: str) -> None:
    vlm, rng = family_vlm(family), np.random.default_rng(0)
    shown = [[drawing(0)], [drawing(1, (128, 64)), drawing(0)], []]
    segments = [
        Segment(prompt=ask(vlm, pictures), responses=tuple(rng.integers(0, 200, n) for n in (5, 1, 9)))
        for pictures in shown
    ]
    images = [image for segment in segments for image in segment.prompt.images]
    with torch.inference_mode():
        features = vlm.encode_images(images)
        expected = vlm.compute_response_hidden(segments)
        assert torch.equal(compute(vlm, pack_forward(segments, images, features)), expected)


class NoLink(Link):
    """Nobody is at the other end."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, data: bytes) -> None:
        self.sent.append(data)


def test_out_of_memory_in_a_forward_that_others_compute_too_is_no_groups_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine halves a batch at torch's error and goes on, while the others would wait in their forward for ever."""
    vlm, link = tiny_vlm(), NoLink()
    leading = LeadingVlm(
        path=vlm.path, model=vlm.model, processor=vlm.processor, config=vlm.config, family=vlm.family, link=link
    )
    segments = [Segment(prompt=ask(vlm, [drawing(0)]), responses=(np.array([5, 6]),))]
    assert torch.equal(leading.compute_response_hidden(segments), vlm.compute_response_hidden(segments))

    def no_room(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Vlm, "compute_response_hidden", no_room)
    with pytest.raises(RuntimeError, match=r"lower teacher.batch_tokens") as caught:
        leading.compute_response_hidden(segments)
    assert not isinstance(caught.value, torch.OutOfMemoryError)
    assert len(link.sent) == 2


def test_another_number_of_ranks_or_gpus_than_configured_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"teacher.processes = 2, but 3 ranks were started"):
        lead(load_config(write_config(tmp_path)), processes=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)  # accelerate sets it in the process that has used it
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"2 needs a GPU for each rank, and this process sees 1; give it .*=1$"):
        lead(load_config(write_config(tmp_path)), processes=2)


def test_ranks_that_do_not_divide_the_heads_are_refused_before_anything_is_loaded() -> None:
    check_heads(str(model_folder("teacher")), 2)
    with pytest.raises(ConfigError, match=r"3 doesn't divide the 2 key and value heads of .*; set one of 1, 2"):
        check_heads(str(model_folder("teacher")), 3)


def groups() -> list[ScoreRequest]:
    vlm = tiny_vlm()
    return [
        token_request(vlm, "one image", pictures=[drawing(1)]),
        token_request(vlm, "two", pictures=[drawing(2, (160, 128)), drawing(1)], responses=["It is 7."] * 3 + ["12"]),
        token_request(vlm, "none", text="Say it all again, please."),
    ]


def scores(target: str) -> dict[str, GroupScore]:
    with SyncTeacherClient(target) as client:
        found = {result.group_id: result for result in client.score(groups())}
    assert all(isinstance(score, GroupScore) for score in found.values()), found
    return found  # type: ignore[return-value]


@contextmanager
def shared_by_two(folder: Path) -> Iterator[tuple[TeacherProcess, list[int]]]:
    """The teacher, as `vaopd up CONFIG --gpus teacher=0,1` starts it, and its ranks' process ids, rank 0 first."""
    # Small forwards, so that there are several.
    settings: dict[str, Any] = {"batch_tokens": 200, "device_map": None}
    config = write_config(folder, address="127.0.0.1:0", **settings)
    supervisor = Supervisor(logs=folder, say=lambda line: None)  # starts nothing by itself
    options = UpOptions(config_path=config, gpus={"teacher": ("0,1",)})
    launch = _Launch(load_config(config), options, supervisor, lambda line: None)
    child = launch._make_service("teacher", "teacher", devices="0,1")
    assert child.argv[-2:] == ("--set", "teacher.processes=2")
    assert (child.environment["CUDA_VISIBLE_DEVICES"], child.environment["CUDA_DEVICE_ORDER"]) == ("0,1", "PCI_BUS_ID")
    with teacher_process(folder, launch=child.argv[1:], **settings) as teacher:
        pid = teacher.process.pid
        ranks = [int(rank) for rank in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        assert len(ranks) == 2
        try:
            yield teacher, ranks
        finally:
            for rank in filter(running, ranks):
                os.kill(rank, signal.SIGKILL)


def running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_two_ranks_score_as_one_process_does_and_drain_together(tmp_path: Path) -> None:
    with teacher_in_process(tiny_vlm()) as alone:
        expected, description = scores(alone.target), alone.description
    with shared_by_two(tmp_path) as (teacher, ranks):
        with SyncTeacherClient(teacher.target) as client:
            assert client.describe().revision == description.revision
        first, again = scores(teacher.target), scores(teacher.target)
        os.kill(teacher.process.pid, signal.SIGTERM)
        assert teacher.process.wait(30) == 0
        assert not any(map(running, ranks))
    config, head = tiny_vlm().config, tiny_vlm().head
    for name, score in expected.items():
        whole = decode(score.payload)["hidden"]
        for found in (first[name], again[name]):
            for view in ("teacher_logprobs", "degraded_logprobs"):
                mine, theirs = (np.concatenate(getattr(result, view)) for result in (found, score))
                assert_within(mine, theirs, tolerance.logprobs(config, whole, head))
            difference = decode(found.payload)["hidden"] - whole
            assert_within(difference.norm(dim=-1), 0.0, tolerance.forward(config) * whole.norm(dim=-1))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_rank_ends_all_of_them_with_a_status_that_gets_them_restarted(
    tmp_path: Path, victim: int
) -> None:
    with shared_by_two(tmp_path) as (teacher, ranks):
        os.kill(ranks[victim], signal.SIGKILL)
        assert teacher.process.wait(60) != 0
        wait_until("no rank is left", lambda: not any(map(running, ranks)))
