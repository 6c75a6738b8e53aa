"""The student's RMS norms in mixed precision, against the formula in float64 and against transformers' own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support.families import family_folder
from tests.support.tolerance import assert_noticed, assert_within, gamma
from tests.support.weighted import a_weighted_group, teacher_head
from vaopd.config import TrainerConfig
from vaopd.vlm.fused_norms import use_fused_norms
from vaopd.vlm.model import Vlm
from vaopd.vlm.torchvision_compat import ensure_torchvision
from vaopd_trainer.student_loss import StudentLoss

pytestmark = pytest.mark.numeric

ROWS, WIDTH, EPSILON = 7, 48, 1e-5
BF16 = torch.finfo(torch.bfloat16).eps / 2


def made(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


@pytest.fixture
def norm() -> nn.Module:
    ensure_torchvision()
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(WIDTH, eps=EPSILON)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * made(0, WIDTH))
    use_fused_norms(norm)
    use_fused_norms(norm)
    assert "forward" in vars(norm)
    return norm


def test_it_is_the_formula_rounded_once(norm: nn.Module) -> None:
    rows, by_output = made(1, ROWS, WIDTH), made(2, ROWS, WIDTH).bfloat16()
    rows.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(rows)
    assert found.dtype == torch.bfloat16
    found.backward(by_output)

    exact, weight = rows.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    scale = (exact.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    expected = exact * scale * weight
    expected.backward(by_output.double())
    assert None not in (rows.grad, norm.weight.grad, exact.grad, weight.grad)
    # Σ of squares, root, two products; then the one rounding.
    own = gamma(WIDTH + 5)
    bound = (own + BF16) * expected.detach().abs()
    assert_within(found, expected, bound, "output")
    # g·w·scale − x·scale³·Σ(g·w·x)/D, and the weight's sum over the rows.
    inner = (by_output.double() * weight).detach().abs()
    projected = (inner * exact.detach().abs()).mean(-1, keepdim=True) * exact.detach().abs() * scale.detach() ** 3
    of_rows = gamma(2 * WIDTH + 12) * (inner * scale.detach() + projected)
    assert_within(rows.grad, exact.grad, of_rows, "gradient")
    of_weight = gamma(ROWS + WIDTH + 6) * (by_output.double() * exact * scale).detach().abs().sum(0)
    assert_within(norm.weight.grad, weight.grad, of_weight, "gradient of the weight")
    # Without the weight, with the mean taken off as a layer norm does, or with twice the ε.
    assert_noticed(exact * scale, expected, bound)
    assert_noticed((exact - exact.mean(-1, keepdim=True)) * scale * weight, expected, bound)
    assert exact.grad is not None
    assert_noticed(exact.grad * 1.001, exact.grad, of_rows)


def test_without_autocast_it_is_the_modules_own_bit_for_bit(norm: nn.Module) -> None:
    rows = made(1, ROWS, WIDTH)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(norm(rows.to(dtype)), type(norm).forward(norm, rows.to(dtype)))


@pytest.fixture(scope="module")
def family() -> str:
    return str(family_folder("qwen3_vl"))


def losses(student: Vlm, *, autocast: bool, rounded: bool) -> tuple[float, Tensor]:
    """The loss of a group, and its gradients in one row."""
    student.model.zero_grad()
    loss = StudentLoss(student, teacher_head=teacher_head(student), trainer=TrainerConfig(steps=1))
    if not rounded:
        for module in student.model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                del module.forward
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value, _ = loss([a_weighted_group(student, 0, [9, 1, 17])])
    value.backward()
    gradients = [p.grad.flatten() for p in student.model.parameters() if p.grad is not None]
    return float(value.detach()), torch.cat(gradients)


def test_a_step_in_mixed_precision_stays_as_near_to_float32_as_with_transformers_norms(family: str) -> None:
    """Both round activations to bfloat16 once per layer's product; neither may be twice as far off as the other."""
    student = Vlm.load(family, dtype="float32")
    value, gradient = losses(student, autocast=False, rounded=True)
    off = []
    for rounded in (True, False):
        mixed, by_mixed = losses(student, autocast=True, rounded=rounded)
        off.append((abs(mixed - value), float((by_mixed - gradient).norm() / gradient.norm())))
    (mine, of_gradient), (theirs, of_their_gradient) = off
    layers = student.config.text_config.num_hidden_layers + student.config.vision_config.depth
    assert max(mine, theirs) < 2 * layers * BF16 * abs(value)
    assert 0 < of_gradient < 2 * of_their_gradient
