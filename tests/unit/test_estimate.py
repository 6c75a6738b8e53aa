"""What `--dry-run` says a step takes: the operations against the measured times that its rates come from."""

from __future__ import annotations

import pytest

from benchmarks.recipe_timeline import BEGIN, END, RESULTS, make_table, sample
from vaopd.config import load_config
from vaopd.launch.estimate import (
    MEMORY_BYTES_PER_S,
    PEAK_FLOPS,
    SCORING_SHARE,
    TRAINING_SHARE,
    count_cards,
    count_forward,
    describe_cost,
    estimate_step,
)
from vaopd.vlm.memory import MODELS

MEASURED = {
    "prompt": 650,
    "response": 1000,
    "siblings": 4,
    "pixels": 600 * 32 * 32,
}  # 600 of 650 tokens are the image's


def test_measured_times_come_out_again() -> None:
    """benchmarks/RESULTS.md: 283 ms for a group in both views, 349 ms for its forward and backward."""
    scoring_s = 2 * count_forward(MODELS["8B"], **MEASURED) / (SCORING_SHARE * PEAK_FLOPS)
    training_s = 3 * count_forward(MODELS["2B"], **MEASURED) / (TRAINING_SHARE * PEAK_FLOPS)
    assert scoring_s == pytest.approx(0.283, rel=0.05)
    assert training_s == pytest.approx(0.349, rel=0.1)


def test_a_step_by_part_by_hand() -> None:
    """Half as many views and twice as many ranks halve their parts; with lag, the longer side is the step."""
    config = load_config("configs/geometry3k-8b.toml")
    one = estimate_step(config, response=1000, workers=1, ranks=1)
    assert one.total_s == pytest.approx(one.sampling_s + one.scoring_s + one.training_s + one.publishing_s)
    two = estimate_step(config, response=1000, workers=1, ranks=2)
    assert two.training_s == pytest.approx(one.training_s / 2)
    baseline = load_config("configs/geometry3k-8b.toml", ["objective.variant=standard", "trainer.max_policy_lag=1"])
    standard = estimate_step(baseline, response=1000, workers=1, ranks=1)
    assert standard.scoring_s == pytest.approx(one.scoring_s / 2)
    assert standard.total_s == pytest.approx(
        max(standard.sampling_s + standard.scoring_s, standard.training_s + standard.publishing_s)
    )


def test_adapters_and_what_the_trainer_scores_by_hand() -> None:
    """No gradients of the base, 2 of 3 parts; 4 bytes a weight of the adapters travel; each rank scores its groups."""
    whole = estimate_step(load_config("configs/geometry3k-8b.toml"), response=1000, workers=1, ranks=1)
    lora = load_config("configs/geometry3k-8b-lora.toml", ["rollout.engine_options.tensor_parallel_size=2"])
    adapters = estimate_step(lora, response=1000, workers=1, ranks=1)
    assert adapters.training_s == pytest.approx(whole.training_s * 2 / 3)
    assert adapters.sampling_s == pytest.approx(whole.sampling_s / 2)
    weights = MODELS["2B"].count_adapter_parameters(32, vision_tower=True)
    assert adapters.publishing_s == pytest.approx(whole.publishing_s * 2 * weights / MODELS["2B"].parameters)


def test_card_hours_are_hours_times_cards() -> None:
    config = load_config("configs/geometry3k-8b.toml")
    gpus = {"teacher": ("0,1",), "rollout": ("2", "3"), "trainer": ("2",)}
    assert count_cards(config, gpus, with_teacher=True) == 4
    assert count_cards(config, {}, with_teacher=True) == 3
    assert count_cards(config, {}, with_teacher=False) == 2
    hours = 655 * estimate_step(config, response=4096, workers=1, ranks=1).total_s / 3600
    lines = list(describe_cost(config))
    assert f"{hours * 3:.0f} card-hours" in lines[2]
    assert "measured on one H100" in lines[-1]


def test_sampling_by_hand() -> None:
    """Two responses of 2 and 1 tokens: the keys of 10 + 1 and 10 + 1 tokens, then of the first one's 12."""
    model, rate = MODELS["2B"], MEMORY_BYTES_PER_S
    weights, key = 2 * model.parameters, model.kv_bytes_per_token
    both, alone = (weights + 22 * key) / rate, (weights + 12 * key) / rate
    assert list(sample([2, 1], model, prompt=10, at_once=2)) == pytest.approx([both + alone, both])
    # One after the other: the second one's only token has the keys of 11.
    first = (2 * weights + 23 * key) / rate
    assert list(sample([2, 1], model, prompt=10, at_once=1)) == pytest.approx(
        [first, first + (weights + 11 * key) / rate]
    )


def test_the_table_of_the_recipe_s_step_is_the_script_s() -> None:
    assert f"{BEGIN}\n\n{make_table()}\n\n{END}" in RESULTS.read_text()


def test_what_can_not_be_estimated_says_why() -> None:
    assert list(describe_cost(load_config("configs/tiny.toml"))) == [
        "no estimate: the figures are for GPUs, and teacher.device_map is cpu"
    ]
    unknown = load_config("configs/geometry3k-8b.toml", ["teacher.model=nobody/nothing"])
    assert "its memory can't be counted" in "".join(describe_cost(unknown))
