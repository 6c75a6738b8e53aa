"""A teacher that several processes share by tensor parallelism: it scores, drains and dies like one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from services.teacher.ranks import compute, packed
from tests.support.families import FAMILIES, ask, family_vlm
from tests.support.models import tiny_vlm
from tests.support.teacher import TeacherProcess, drawing, teacher_in_process, teacher_process, token_request
from tests.support.waiting import wait_until
from vaopd.client import SyncTeacherClient
from vaopd.payloads import decode
from vaopd.types import GroupScore, ScoreRequest
from vaopd.vlm import Segment


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
        expected = vlm.response_hidden(segments)
        assert torch.equal(compute(vlm, packed(segments, images, features)), expected)


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
    """The teacher, as `vaopd teacher CONFIG --service FILE` starts it, and its ranks' process ids, rank 0 first."""
    service = folder / "service.toml"
    service.write_text("[engine]\nprocesses = 2\n")
    # Small forwards, so that there are several.
    launch = ("-m", "services.teacher", "--service", str(service))
    with teacher_process(folder, launch=launch, batch_tokens=200) as teacher:
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
    for name, score in expected.items():
        for found in (first[name], again[name]):
            for k in range(len(score.teacher_logprobs)):
                np.testing.assert_allclose(found.teacher_logprobs[k], score.teacher_logprobs[k], atol=1e-4)
                np.testing.assert_allclose(found.degraded_logprobs[k], score.degraded_logprobs[k], atol=1e-4)
            np.testing.assert_allclose(decode(found.payload)["hidden"], decode(score.payload)["hidden"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_rank_ends_all_of_them_with_a_status_that_gets_them_restarted(
    tmp_path: Path, victim: int
) -> None:
    with shared_by_two(tmp_path) as (teacher, ranks):
        os.kill(ranks[victim], signal.SIGKILL)
        assert teacher.process.wait(60) != 0
        wait_until("no rank is left", lambda: not any(map(running, ranks)))
