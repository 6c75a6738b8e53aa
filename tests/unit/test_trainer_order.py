"""The order of the prompts: every epoch a permutation, known from seed and position alone."""

from __future__ import annotations

from vaopd_trainer.prompt_order import PromptOrder


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


def test_another_seed_is_another_order() -> None:
    assert epoch(PromptOrder(prompts=50, seed=3), 0) != epoch(PromptOrder(prompts=50, seed=4), 0)
