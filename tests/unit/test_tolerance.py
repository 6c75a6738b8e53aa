"""The tolerances against real rounding, float32 against float64: they hold, and not by a factor that hides mistakes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from tests.support import tolerance
from tests.support.families import FAMILIES, ask, family_vlm
from tests.support.models import tiny_vlm
from tests.support.teacher import drawing
from vaopd.vlm.model import Segment, Vlm

pytestmark = pytest.mark.numeric

U = 2.0**-24


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(difference: Tensor, bound: Tensor, *, loose: float) -> None:
    """The bound holds everywhere, and the largest difference comes within a factor of it."""
    share = (difference.double().abs() / bound).max()
    assert 1 / loose <= share <= 1, f"the largest error is {share:.3g} of its bound"


def test_gamma_by_hand() -> None:
    assert tolerance.gamma(10) == pytest.approx(10 * U / (1 - 10 * U), rel=1e-12)
    assert tolerance.gamma(10, torch.bfloat16) == pytest.approx((10 / 256) / (1 - 10 / 256), rel=1e-12)
    assert tolerance.gamma(10, exps=1) == pytest.approx(50 * U / (1 - 50 * U), rel=1e-12)
    assert tolerance.gamma(10_000) == pytest.approx(600 * U / (1 - 600 * U), rel=1e-12)  # 6 · √n


def test_the_worst_sum_comes_near_its_bound() -> None:
    """1 + 35 times u, one after the other: each u is lost, half a unit of the last place of 1, which is even."""
    found = torch.tensor(1.0)
    for _ in range(35):
        found = found + torch.tensor(U)
    error = 35 * U
    assert found == 1.0
    assert 0.9 * tolerance.gamma(36) * (1 + error) < error < tolerance.gamma(36) * (1 + error)


@pytest.mark.parametrize("width", [1, 6, 36, 128, 256])
def test_products(width: int) -> None:
    left, right = draw(0, 100, width), draw(1, 300, width)
    check((left @ right.T).double() - left.double() @ right.double().T, tolerance.product(left, right), loose=100)


@pytest.mark.parametrize("scale", [1.0, 8.0, 100.0])
@pytest.mark.parametrize("vocabulary", [2, 40, 500])
def test_log_probs(vocabulary: int, scale: float) -> None:
    logits = scale * draw(2, 200, vocabulary)
    exact = logits.double().log_softmax(-1)
    bound = tolerance.log_softmax(logits)
    check(logits.log_softmax(-1).double() - exact, bound, loose=100)
    check(logits - logits.logsumexp(-1, keepdim=True) - exact, bound, loose=100)
    moved = 1e-3 * draw(3, 200, vocabulary).double()
    check((logits.double() + moved).log_softmax(-1) - exact, tolerance.log_softmax(logits, moved.abs()), loose=10)


@pytest.mark.parametrize("siblings", [3, 8])  # of two, z is ±1, whatever they are
def test_rollout_weights(siblings: int) -> None:
    means = draw(4, 200, siblings).abs()
    expected = _weights(means.double())
    check(_weights(means) - expected, tolerance.rollout_weights(means), loose=100)
    moved = 1e-4 * draw(5, 200, siblings).double()
    check(_weights(means.double() + moved) - expected, tolerance.rollout_weights(means, moved.abs()), loose=30)


def _weights(means: Tensor) -> Tensor:
    centred = means - means.mean(-1, keepdim=True)
    return (centred / centred.square().mean(-1, keepdim=True).sqrt()).softmax(-1)


def test_propagation_by_hand() -> None:
    """x·y + x at (2, 3), off by 0.1 and 0.2: 4 · 0.1 + 2 · 0.2, and the rounding of |6| + |2|."""
    x, y = (torch.tensor([[value]]) for value in (2.0, 3.0))
    found = tolerance.propagated(lambda x, y: torch.cat((x * y, x), -1), (x, y), (0.1, 0.2))
    own = tolerance.gamma(4, exps=1)
    assert found.tolist() == pytest.approx([0.8 + 8 * own], rel=1e-12)


def test_a_divergence() -> None:
    logits = 4 * draw(6, 2, 200, 100)

    def terms(p: Tensor, q: Tensor) -> Tensor:
        return p.exp() * (p - q)

    found, exact = (terms(*z.log_softmax(-1)).sum(-1) for z in (logits, logits.double()))
    errors = [tolerance.log_softmax(z) for z in logits]
    bound = tolerance.propagated(terms, list(logits.double().log_softmax(-1)), errors)
    check(found - exact, bound, loose=100)


@pytest.mark.parametrize("name", ["teacher", "student", *FAMILIES])
def test_a_whole_forward(name: str) -> None:
    """The tiny models that tests run, in float32 against the same weights in float64: hidden states and logits."""
    vlm = family_vlm(name) if name in FAMILIES else tiny_vlm(name)
    bound = tolerance.forward(vlm.config, sides=1)
    (found, logits), (exact, expected) = _forward(vlm, torch.float32), _forward(vlm, torch.float64)
    check((found - exact).norm(dim=-1), bound * exact.norm(dim=-1), loose=60)
    check((logits - expected).abs().amax(-1), bound * expected.abs().amax(-1), loose=60)
    log_probs = expected.log_softmax(-1)
    check(logits.log_softmax(-1) - log_probs, bound * log_probs.abs().amax(-1, keepdim=True), loose=60)


@torch.no_grad()
def _forward(vlm: Vlm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states (M, D) and logits (M, V), as float64, of a forward in `dtype` over three groups."""
    model = copy.deepcopy(vlm.model).to(dtype)
    other = Vlm(path=vlm.path, model=model, processor=vlm.processor, config=vlm.config, family=vlm.family)
    ids = torch.randint(200, (3, 40), generator=torch.Generator().manual_seed(7)).numpy()
    shown = ([], [drawing(0)], [drawing(1, (128, 64)), drawing(2)])
    segments = [Segment(prompt=ask(other, pictures), responses=tuple(ids)) for pictures in shown]
    hidden = other.compute_response_hidden(segments)
    return hidden.double(), (hidden @ other.head.T).double()


def test_the_comparison_takes_what_is_within_and_nothing_else() -> None:
    expected, bound = torch.tensor([1.0, -math.inf]), torch.tensor([0.25, 0.0])
    tolerance.assert_within([1.25, -math.inf], expected, bound)
    for bad in (1.26, 0.74, math.nan, math.inf):
        with pytest.raises(AssertionError, match="weight: 1 of 2 outside their tolerance; the worst, number 0"):
            tolerance.assert_within([bad, -math.inf], expected, bound, "weight")


def test_a_mistake_counts_as_noticed_only_when_rounding_can_not_hide_it() -> None:
    tolerance.assert_noticed([1.0, 1.51], [1.0, 1.0], 0.25)
    with pytest.raises(AssertionError, match="so a test could miss it"):
        tolerance.assert_noticed([1.0, 1.49], [1.0, 1.0], 0.25)
