"""Which parts of which groups go to the device together, and that it makes no difference to the scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support import tolerance
from tests.support.families import ask
from tests.support.models import tiny_vlm
from tests.support.teacher import drawing
from tests.support.tolerance import assert_noticed, assert_within
from vaopd.degradation import pixelate
from vaopd.payloads import to_torch
from vaopd.vlm.model import Encode, Segment, Vlm
from vaopd_teacher.engines.engine import EngineResult, PreparedGroup
from vaopd_teacher.engines.transformers_engine import GroupEngine

LENGTHS = [(20, 33, 7, 1), (12, 12), (5,), (40, 11, 12)]


class Recorded(Vlm):
    """The tiny teacher, noting the forwards: for each segment the prompt's tokens and the responses'."""

    def compute_response_hidden(self, segments: list[Segment], *, encode: Encode | None = None) -> torch.Tensor:  # type: ignore[override]
        FORWARDS.append([(len(s.prompt.token_ids), [len(ids) for ids in s.responses]) for s in segments])
        return super().compute_response_hidden(segments, encode=encode)


FORWARDS: list[list[tuple[int, list[int]]]] = []


def groups() -> list[PreparedGroup]:
    vlm, rng = tiny_vlm(), np.random.default_rng(0)
    made = []
    for index, lengths in enumerate(LENGTHS):
        prompt = ask(vlm, [drawing(index)], text="How long is it? " * (index + 1))
        other = replace(prompt, images=(vlm.prepare_image(pixelate(drawing(index), 0.1)),))
        responses = tuple(rng.integers(0, 200, length) for length in lengths)
        made.append(
            PreparedGroup(
                group_id=str(index), original=prompt, degraded=other, responses=responses, payload="hidden", top_k=0
            )
        )
    return made


def score(batch_tokens: int) -> list[EngineResult]:
    FORWARDS.clear()
    vlm = tiny_vlm()
    recorded = Recorded(path=vlm.path, model=vlm.model, processor=vlm.processor, config=vlm.config, family=vlm.family)
    results = list(GroupEngine(recorded, batch_tokens=batch_tokens).score(groups()))
    assert all(isinstance(result, EngineResult) for result in results)
    return results  # type: ignore[return-value]


def costs() -> list[int]:
    """Of each forward: prompts, and of each response all but its last token, which is predicted and never read."""
    return [sum(prompt + sum(n - 1 for n in lengths) for prompt, lengths in segments) for segments in FORWARDS]


def test_where_forwards_overlap_the_next_one_begins_before_a_result_is_made() -> None:
    """As on a GPU, which computes it while the host makes the answers of the one before; on a CPU a result is first."""
    expected = score(batch_tokens=300)
    forwards = len(FORWARDS)
    assert forwards > 1
    vlm = tiny_vlm()
    recorded = Recorded(path=vlm.path, model=vlm.model, processor=vlm.processor, config=vlm.config, family=vlm.family)
    for overlaps, begun in ((False, 1), (True, 2)):
        engine = GroupEngine(recorded, batch_tokens=300)
        engine._overlaps = overlaps
        FORWARDS.clear()
        results = engine.score(groups())
        first = next(results)
        assert len(FORWARDS) == begun
        found = [first, *results]
        assert len(FORWARDS) == forwards
        for mine, theirs in zip(found, expected, strict=True):
            assert isinstance(mine, EngineResult)
            assert mine.group_id == theirs.group_id
            assert np.array_equal(mine.columns["visual_advantage"], theirs.columns["visual_advantage"])


def test_the_head_is_used_as_it_is_stored() -> None:
    """Of its logical rows, a GPU would make a padded copy."""
    vlm = tiny_vlm()
    assert len(vlm.padded_head) > vlm.vocab_size
    assert GroupEngine(vlm, batch_tokens=1)._head.shape == vlm.padded_head.shape


def test_groups_that_fit_share_a_forward_with_both_views_each() -> None:
    score(batch_tokens=10_000)
    assert [[lengths for _, lengths in segments] for segments in FORWARDS] == [
        [list(lengths) for lengths in LENGTHS for _ in ("original", "degraded")]
    ]


def test_a_forward_takes_whole_groups_up_to_the_budget() -> None:
    prompt = len(groups()[0].original.token_ids)
    first = 2 * (prompt + 19 + 32 + 6)
    score(batch_tokens=first)
    assert costs()[0] == first
    assert all(cost <= first for cost in costs())


def test_a_group_above_the_budget_is_split_into_views_then_into_siblings_behind_their_prompt() -> None:
    prompt = len(groups()[0].original.token_ids)
    score(batch_tokens=prompt + 19 + 32)
    of_the_first = [lengths for ((_, lengths),) in FORWARDS[:4]]
    assert of_the_first == [[20, 33], [7, 1], [20, 33], [7, 1]]


def test_a_budget_of_one_token_makes_a_forward_of_each_rollout_and_view() -> None:
    score(batch_tokens=1)
    expected = [[n] for lengths in LENGTHS for _ in ("original", "degraded") for n in lengths]
    assert [lengths for ((_, lengths),) in FORWARDS] == expected


@pytest.mark.numeric
@pytest.mark.parametrize("batch_tokens", [1, 60, 150, 300])
def test_the_budget_makes_no_difference_to_the_scores(batch_tokens: int) -> None:
    """Beyond what two float32 forwards of other shapes differ by."""
    for mine, expected in zip(score(batch_tokens), score(10_000), strict=True):
        hidden, whole = (to_torch(result.payload.tensors["hidden"]) for result in (mine, expected))
        relative, error = (
            tolerance.forward(tiny_vlm().config),
            tolerance.logprobs(tiny_vlm().config, whole, tiny_vlm().head),
        )
        assert_within((hidden - whole).norm(dim=-1), 0.0, relative * whole.norm(dim=-1))
        for name in ("teacher_logprobs", "degraded_logprobs"):
            assert_within(mine.columns[name], expected.columns[name], error)
        assert_noticed(expected.columns["degraded_logprobs"], expected.columns["teacher_logprobs"], error)
