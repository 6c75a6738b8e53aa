"""The whole recipe against an independent description of it (`recipe`): from the data set to the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.fundamentals import recipe
from tests.fundamentals.one_step import OneStep, Recorder, make_picture, read_prompts, small_config, train
from tests.support import divergences, tolerance
from tests.support.tolerance import assert_noticed, assert_within, gamma
from vaopd import objective
from vaopd.config import load_config
from vaopd.data.problems import pick_held_out
from vaopd.degradation import pixelate
from vaopd.evaluation import held_out_requests
from vaopd.grading import committed_answer
from vaopd.images import scale_to_bounds
from vaopd.types import GroupId, RolloutGroup, TextPart
from vaopd_trainer.prompt_order import PromptOrder, make_request
from vaopd_trainer.scorer import BusyTime
from vaopd_trainer.student_loss import ScoredGroup, TokenValues, WeightedGroup

pytestmark = pytest.mark.numeric

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*-*b.toml"))


@pytest.fixture(autouse=True)
def accelerate_begins_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# -- settings and order ------------------------------------------------------------------------------------------------


def test_there_are_six_configurations_of_the_paper() -> None:
    assert len(CONFIGS) == 6


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_setting_of_the_paper(path: Path) -> None:
    config = load_config(path)
    found = {key: reduce(getattr, key.split("."), config) for key in recipe.SETTINGS}
    assert found == recipe.SETTINGS
    steps = recipe.count_steps(recipe.PROBLEMS[path.stem.partition("-")[0]])
    assert (config.trainer.steps, config.trainer.warmup_steps) == (steps, steps * 5 // 100)
    assert (config.data.validation_source or config.data.source) == "hiyouga/geometry3k"


def test_geometry3k_by_hand() -> None:
    """⌊2101/16⌋ = 131 steps in each of 5 epochs; ⌊0.05·655⌋ = 32 of warm-up."""
    assert recipe.count_steps(2101) == 655
    config = load_config(CONFIGS[0])
    assert (config.trainer.steps, config.trainer.warmup_steps) == (655, 32)


@given(problems=st.integers(16, 400), per_step=st.sampled_from([1, 3, 16]), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_every_epoch_is_whole_batches_of_a_new_permutation(problems: int, per_step: int, seed: int) -> None:
    order = PromptOrder(prompts=problems, seed=seed, per_step=per_step)
    dealt = recipe.count_steps(problems, per_step=per_step, epochs=1) * per_step
    epochs = [[order.index(epoch * dealt + place) for place in range(dealt)] for epoch in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == dealt
        assert set(epoch) <= set(range(problems))
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_held_out_problems_are_the_papers_sample() -> None:
    assert pick_held_out(300, 200) == recipe.HELD_OUT


def test_sampling_of_rollouts_and_of_evaluations(tmp_path: Path) -> None:
    config = load_config(CONFIGS[0])
    prompts = read_prompts(small_config(tmp_path))
    group = GroupId(purpose="train", step=3, index=2)
    request = make_request(prompts[0], group=group, version=3, config=config)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.7, 0.95, 4096)
    assert (request.num_rollouts, sampling.seed) == (4, 42)
    (evaluated, *_) = held_out_requests(prompts, version=50, config=config)
    assert (evaluated.sampling.temperature, evaluated.sampling.top_p, evaluated.num_rollouts) == (1.0, 1.0, 8)


# -- pictures ----------------------------------------------------------------------------------------------------------

SIDES = st.tuples(st.integers(1, 3000), st.integers(1, 3000)).filter(lambda s: max(s) <= 200 * min(s))


@given(size=SIDES)
@settings(max_examples=300, deadline=None)
def test_sides_are_floored_after_one_factor(size: tuple[int, int]) -> None:
    bounds = {"least": 262_144, "most": 4_194_304}
    found = scale_to_bounds(PIL.Image.new("L", size), min_pixels=bounds["least"], max_pixels=bounds["most"]).size
    for one, exact, sides in zip(found, recipe.scaled_size(*size, **bounds), (size, size[::-1]), strict=True):
        assert exact - recipe.may_fall_short(*sides, **bounds) <= one <= exact


def test_a_whole_side_may_lose_a_pixel_as_in_the_papers_code() -> None:
    """243·√(262144 / 243²) is 512, and in binary 511.99…; patches of 32 px make 512 of either."""
    found = scale_to_bounds(PIL.Image.new("L", (243, 243)), min_pixels=262_144, max_pixels=4_194_304).size
    assert found == (511, 511)
    assert recipe.scaled_size(243, 243, least=262_144, most=4_194_304) == (512, 512)


@given(width=st.integers(3, 300), height=st.integers(3, 300), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_degraded_view_is_a_tenth_of_each_side(width: int, height: int, seed: int) -> None:
    """Within 1 of 255 levels of the formula: Pillow rounds to whole levels after each of two passes."""
    picture = make_picture(seed, (width, height))
    found = pixelate(picture, 0.1)
    inner = np.ix_(recipe.find_inner(height), recipe.find_inner(width))
    assert_within(np.array(found)[inner], recipe.pixelate_by_formula(picture)[inner], 1.0)
    assert found.tobytes() == recipe.pixelate(picture).tobytes()


# -- weights -----------------------------------------------------------------------------------------------------------

LOGPROBS = st.floats(-20, 0, width=32)
GROUPS = st.lists(st.lists(st.tuples(LOGPROBS, LOGPROBS), min_size=1, max_size=25), min_size=1, max_size=5)


@given(group=GROUPS)
@settings(max_examples=200, deadline=None)
def test_weights_of_any_group(group: list[list[tuple[float, float]]]) -> None:
    """Advantages are float32's differences, and exact in what follows."""
    original, mask = objective.pad_rows([np.array([a for a, _ in row], np.float32) for row in group])
    degraded, _ = objective.pad_rows([np.array([b for _, b in row], np.float32) for row in group])
    advantages = objective.visual_advantage(original, degraded, mask)
    by_hand = [recipe.visual_advantage(*zip(*row, strict=True)) for row in group]
    flat = torch.tensor([value for row in by_hand for value in row], dtype=torch.float64)
    assert_within(advantages[mask], flat, gamma(2) * 20)

    exact = [[float(value) for value in row[keep]] for row, keep in zip(advantages, mask, strict=True)]
    found = objective.group_weights(advantages, mask)
    weights = torch.tensor(recipe.rollout_weights(exact), dtype=torch.float64)
    # In float64 inside, where two sums of 25 terms move z by 1e-13 / 1e-6, and then rounded to float32.
    error = gamma(2) * weights + 1e-6
    assert_within(found.rollout_weights, weights, error)
    tokens = torch.tensor([value for row in recipe.token_weights(exact) for value in row], dtype=torch.float64)
    assert_within(found.token_weights[mask], tokens, gamma(4) * tokens + 1e-6)


# -- schedule and optimizer --------------------------------------------------------------------------------------------


class GivenGradients(nn.Module):
    """A "student" of five weights whose gradient at each step is given; one group makes up a step."""

    def __init__(self, gradients: torch.Tensor) -> None:
        super().__init__()
        self.model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
        nn.init.ones_(self.model.weight)
        self._gradients = iter(gradients)

    def forward(self, groups: Sequence[WeightedGroup], **parts: object) -> tuple[torch.Tensor, TokenValues]:
        tokens = sum(len(group.token_weights) for group in groups)
        return (self.model.weight[0] * next(self._gradients)).sum(), TokenValues(
            torch.ones(tokens), torch.zeros(tokens)
        )


class Prescored:
    """Stands for the scorer: one group with the same score at every step."""

    def __init__(self, scored: ScoredGroup) -> None:
        self.busy = BusyTime()
        self._scored = scored

    def submit(self, groups: Sequence[RolloutGroup]) -> None:
        pass

    def wait_for_results(self, *, check: Callable[[], None]) -> Iterator[ScoredGroup]:
        yield self._scored


def test_rates_and_steps_of_a_whole_run_of_655(scored: list[ScoredGroup]) -> None:
    """Gradients of norms on both sides of the clipping's 1. The rates are the paper's; weights move by up to 655e-6."""
    config = load_config(CONFIGS[0])
    gradients = torch.from_numpy(np.random.default_rng(3).normal(0, 0.5, (655, 5)))
    assert 100 < (gradients.norm(dim=-1) > 1).sum() < 555
    recorder = Recorder(lambda _: [])
    train(config, GivenGradients(gradients * 16), recorder, Prescored(scored[0]))
    rates = [recipe.learning_rate(step, steps=655) for step in range(655)]
    assert_within([step["learning_rate"] for step in recorder.steps], rates, gamma(8, torch.float64) * 1e-6)
    assert rates[:2] == [0.0, 1e-6 / 32]
    assert max(rates) == rates[32] == 1e-6

    by_hand = recipe.AdamW(np.ones(5))
    for rate, gradient, after in zip(rates, gradients.numpy(), recorder.weights[1:], strict=True):
        by_hand.step(gradient, rate)
        # Each of up to 655 steps adds a rounding of the weight, and a few of an update of at most 1e-6.
        assert_within(after, by_hand.weights, gamma(655, torch.float64))
    assert_noticed(recipe.AdamW(np.ones(5)).weights, by_hand.weights, gamma(655, torch.float64))


# -- one step, end to end ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> OneStep:
    return OneStep(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def scored(one_step: OneStep) -> list[ScoredGroup]:
    return one_step.scored


def cut(values: torch.Tensor, one_step: OneStep) -> list[list[list[float]]]:
    """(M,) as the groups' rollouts."""
    parts = iter(values.tolist())
    return [[[next(parts) for _ in response] for response in responses] for responses in one_step.responses]


def test_the_prompts_are_the_questions_as_released(one_step: OneStep) -> None:
    for prompt in read_prompts(one_step.config):
        (message,) = prompt.messages
        (text,) = [part.text for part in message.content if isinstance(part, TextPart)]
        assert text.startswith("Find the perimeter of figure ")
        assert text.endswith(".")
    assert [group.index for group in one_step.scored] == [0, 1, 2]  # refused unless its token ids were the recipe's


def test_the_students_pixels_are_those_of_the_scaled_picture(one_step: OneStep) -> None:
    for group, (original, _) in zip(one_step.scored, one_step.inputs, strict=True):
        (image,) = group.prompt.images
        assert image.grid == tuple(original["image_grid_thw"][0].tolist())
        assert torch.equal(image.pixel_values, original["pixel_values"])


def test_both_views_log_probs_the_advantage_and_the_weights(one_step: OneStep) -> None:
    ids = torch.from_numpy(np.concatenate([r for responses in one_step.responses for r in responses])).long()[:, None]
    views = []
    for view, name in enumerate(("teacher_logprobs", "degraded_logprobs")):
        with torch.no_grad():
            rows = one_step.rows(one_step.teacher, view)
        found = np.concatenate([lp for group in one_step.scored for lp in getattr(group.score, name)])
        of_logits = tolerance.forward(one_step.teacher.model.config) * rows.abs().amax(-1, keepdim=True)
        views.append((rows.gather(-1, ids)[:, 0], tolerance.log_softmax(rows, of_logits).gather(-1, ids)[:, 0]))
        assert_within(found, *views[-1], name)
    (original, of_original), (degraded, of_degraded) = views
    assert_noticed(original, degraded, of_degraded)  # the views differ, or this would say nothing
    expected = torch.tensor(recipe.visual_advantage(original.tolist(), degraded.tolist()))
    found = np.concatenate([va for group in one_step.scored for va in group.score.visual_advantage])
    assert_within(found, expected, of_original + of_degraded + gamma(2) * expected)

    for group, advantages in zip(one_step.step["weighted"], cut(torch.from_numpy(found), one_step), strict=True):
        tokens = [weight for rollout in recipe.token_weights(advantages) for weight in rollout]
        assert_within(group.token_weights, tokens, gamma(6) * torch.tensor(tokens) + 1e-9)


def test_the_divergence_the_loss_and_its_gradient(one_step: OneStep) -> None:
    """loss = (1/B) Σ_b Σ_k w_k ℓ_k, with the weights of the product's own advantages, which the test above compares."""
    model = one_step.student.model
    with torch.no_grad():
        q = one_step.rows(one_step.teacher, 0)
    p = one_step.rows(one_step.student, 0)
    kl = recipe.reverse_kl(p, q)
    found = np.concatenate(one_step.step["kl_of_tokens"])
    errors = [
        tolerance.forward(reference.model.config) * rows.detach().abs().amax(-1, keepdim=True)
        for reference, rows in ((one_step.student, p), (one_step.teacher, q))
    ]
    of_kl = divergences.error(divergences.full, p.detach(), q, *errors)
    assert_within(found, kl, of_kl, "kl")
    assert_noticed(recipe.reverse_kl(q, p.detach()), kl, of_kl)  # the forward KL

    advantages = torch.from_numpy(
        np.concatenate([va for group in one_step.scored for va in group.score.visual_advantage])
    )
    weights = torch.tensor(
        [w for group in cut(advantages, one_step) for row in recipe.token_weights(group) for w in row],
        dtype=torch.float64,
    )
    loss = (weights * kl).sum() / 3
    of_loss = (weights * of_kl).sum() / 3 + gamma(len(kl)) * float(loss.detach())
    assert_within(one_step.step["loss"], loss, of_loss, "loss")
    assert_noticed((weights * kl).sum(), loss, of_loss)  # not divided by B
    assert_noticed(kl.mean(), loss, of_loss)  # nothing weighted

    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    of_gradients = tolerance.backward(model.config, gradients)
    norm = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in gradients.values()))
    assert_within(one_step.step["grad_norm"], norm, math.sqrt(sum(error**2 for error in of_gradients.values())))
    assert set(gradients) == {name for name, _ in model.named_parameters()}  # the vision tower learns too


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{12}. The answer is 13.", "12"),
        (r"The answer is 13. Or \boxed{12}.", "13"),
        (r"Final answer: 7" "\n" r"Wait, \boxed{8}.", "7"),
        (r"The answer is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("Answer: 3 cm\nbecause it fits", "3 cm"),
        ("答案是12", "12"),
        ("答案为：12", "12"),
        ("答案：B", "B"),
        (r"\boxed{1} and \boxed{2}", "1"),
        (r"\boxed{3", None),
        ("It is 12.", None),
    ],
)
def test_the_first_committed_answer(text: str, answer: str | None) -> None:
    expected = recipe.committed_answer(text)
    assert (expected or "").lstrip("：") == (answer or "")
    assert committed_answer(text) == answer
