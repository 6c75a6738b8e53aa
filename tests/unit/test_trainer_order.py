"""The order of the prompts: every epoch a permutation, known from seed and position alone; and the groups' names."""

from __future__ import annotations

import pytest

from vaopd.errors import InvalidInput
from vaopd.types import GroupId, Prompt
from vaopd_trainer.prompt_order import PromptOrder, TrainingPrompts


def epoch(order: PromptOrder, number: int) -> list[int]:
    return [order.index(number * order.prompts + place) for place in range(order.prompts)]


def test_every_epoch_visits_every_prompt_once_in_an_order_of_its_own() -> None:
    order = PromptOrder(prompts=50, seed=3)
    epochs = [epoch(order, number) for number in range(4)]
    assert all(sorted(indices) == list(range(50)) for indices in epochs)
    assert len({tuple(indices) for indices in epochs}) == 4
    assert epochs[0] != list(range(50))


def test_a_position_says_everything_so_that_a_resumed_run_needs_no_cursor() -> None:
    straight_on = PromptOrder(prompts=50, seed=3)
    for position in range(120):
        straight_on.index(position)
    assert [straight_on.index(p) for p in range(120, 160)] == [
        PromptOrder(prompts=50, seed=3).index(p) for p in range(120, 160)
    ]


def test_an_epoch_ends_with_its_last_whole_step() -> None:
    """Of 50 prompts in steps of 16, 48 of each permutation; 2101 prompts make 131 steps, 655 in 5 epochs."""
    plain, dealt = PromptOrder(prompts=50, seed=3), PromptOrder(prompts=50, seed=3, per_step=16)
    assert [dealt.index(p) for p in range(96)] == [plain.index(p) for p in (*range(48), *range(50, 98))]
    paper = PromptOrder(prompts=2101, seed=42, per_step=16)
    first = [paper.index(131 * 16 * number) for number in range(6)]
    assert first == [PromptOrder(prompts=2101, seed=42).index(2101 * number) for number in range(6)]


def test_a_data_set_smaller_than_a_step_is_dealt_on() -> None:
    order = PromptOrder(prompts=6, seed=3, per_step=8)
    assert [order.index(p) for p in range(16)] == [PromptOrder(prompts=6, seed=3).index(p) for p in range(16)]


def test_another_seed_is_another_order() -> None:
    assert epoch(PromptOrder(prompts=50, seed=3), 0) != epoch(PromptOrder(prompts=50, seed=4), 0)


def test_a_group_s_name_is_the_text_that_redis_and_the_files_of_a_run_hold() -> None:
    assert str(GroupId(purpose="train", step=12, index=3)) == "train-000012-0003"
    assert str(GroupId(purpose="eval", step=50, index=7)) == "eval-000050-00007"
    assert str(GroupId(purpose="train", step=1234567, index=12345)) == "train-1234567-12345"  # wider, never cut


@pytest.mark.parametrize("text", ["train-000012-0003", "eval-000050-00007", "train-1234567-12345"])
def test_a_name_is_read_back(text: str) -> None:
    assert str(GroupId.parse(text)) == text
    assert GroupId.parse("train-000012-0003") == GroupId(purpose="train", step=12, index=3)


@pytest.mark.parametrize(
    "text", ["", "g1", "train-12-3", "train-000012", "train-0000012-0003", "eval-000050-0007", "train-000012-0003\n"]
)
def test_another_text_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidInput, match="is not the id of a run's prompt group") as caught:
        GroupId.parse(text)
    assert repr(text) in str(caught.value)


def test_the_list_groups_all_steps_take_the_prompts_in_their_order() -> None:
    prompts = [Prompt(prompt_id=str(index), messages=(), images=(), answer="") for index in range(6)]
    training = TrainingPrompts(prompts, per_step=4, seed=3)
    dealt = [int(training.find_prompt(group).prompt_id) for step in range(3) for group in training.list_groups(step)]
    assert dealt == [PromptOrder(prompts=6, seed=3, per_step=4).index(position) for position in range(12)]
    for step in range(3):  # a step is an epoch here, and two prompts of each permutation are left out
        assert len(set(dealt[4 * step : 4 * step + 4])) == 4
    assert [str(group) for group in training.list_groups(2)] == [f"train-000002-000{index}" for index in range(4)]
