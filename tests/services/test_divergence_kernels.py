"""The Triton kernels of the reverse KL, in Triton's interpreter on a CPU, against float64 formulas."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support import divergences, tolerance
from tests.support.tolerance import assert_noticed, assert_within, gamma, product

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton isn't installed"),
]
ROOT = Path(__file__).parents[2]

ROWS = {"one_block": (5, 300, 320), "several_blocks": (3, 9001, 9024), "whole_blocks": (2, 8192, 8192)}
"""Name -> tokens, V and V_pad. A block has 4096 columns: V ends in the first, in the third, and with the second."""
M, V, V_HEAD, D_S, D_T = 17, 150, 160, 8, 12


def made(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def rows_of(name: str) -> tuple[Tensor, Tensor]:
    """Logits of some nats; one row of each side far from zero, and garbage beyond the vocabulary."""
    tokens, vocabulary, width = ROWS[name]
    student, teacher = 4 * made(1, tokens, width), 4 * made(2, tokens, width)
    student[0] += 80
    teacher[-1] -= 200
    student[1, 5] = 60  # almost certain
    student[:, vocabulary:], teacher[:, vocabulary:] = torch.nan, torch.inf
    return student, teacher


FUSED = {
    "hidden": made(3, M, D_S),
    "head": made(4, V_HEAD, D_S),
    "teacher_hidden": made(5, M, D_T),
    "teacher_head": made(6, V_HEAD, D_T),
    "weights": made(7, M).abs() * torch.tensor([0.0, *[1.0] * (M - 1)]),
    "ids": torch.arange(M) * 11 % V,
}


def compile_for_h100(function: Any, **types: str) -> str:
    """Compiles a kernel to sm_90 machine code, which takes no GPU, and returns its PTX.

    Pointers and numbers are taken as multiples of 16, as those of padded rows are, but for the vocabulary.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(function.arg_names)
        if name not in ("vocabulary", "BLOCK")
    }
    signature = {name: types.get(name, "i32") for name in function.arg_names} | {"BLOCK": "constexpr"}
    source = ASTSource(function, signature, {"BLOCK": 4096}, aligned)
    ptx: str = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
    return ptx


def test_the_kernels_compile_for_an_h100_and_load_four_numbers_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An odd vocabulary as the loads' bound would make them single."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from vaopd.divergence import kernels

    sides = dict.fromkeys(("student", "teacher", "values", "student_lse", "teacher_lse"), "*fp32")
    for function in (kernels._normalise, kernels._differentiate):
        ptx = compile_for_h100(function, **sides, slope="*bf16")
        assert ptx.count("ld.global.v4.b32") == 2 * 4096 // (8 * 32) // 4  # both sides, by 8 warps, by 4
    assert "st.global.v4.b32" in ptx


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("kernels")
    inputs = dict(FUSED)
    for name, (_, vocabulary, _) in ROWS.items():
        inputs[f"{name}.student"], inputs[f"{name}.teacher"] = rows_of(name)
        inputs[f"{name}.vocabulary"] = torch.tensor(vocabulary)
    save_file(inputs | {"vocabulary": torch.tensor(V)}, folder / "inputs.safetensors")
    command = [sys.executable, "-W", "error::DeprecationWarning:vaopd", "-m", "tests.support.kernel_runs", str(folder)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(folder)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    return load_file(folder / "outputs.safetensors")


def kl_and_slope(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    log_p, log_q = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl, log_p.exp() * (log_p - log_q - kl[:, None])


def error_of_kl(student: Tensor, teacher: Tensor, *of_logits: Tensor | float) -> Tensor:
    """Σ p·(s − t) rounds for itself, relative to the sum of the magnitudes, and both log-sums as a log-softmax does."""
    s, t = student.double(), teacher.double()
    gaps = (s.softmax(-1) * (s - t).abs()).sum(-1)
    magnitudes = s.abs().amax(-1) + t.abs().amax(-1)
    own = gamma(s.shape[-1] + 4, exps=1) * gaps + gamma(6) * magnitudes
    return own + divergences.error(divergences.full, student, teacher, *of_logits)


def error_of_slope(student: Tensor, teacher: Tensor, narrow: float, *of_logits: Tensor | float) -> Tensor:
    """p·(log p − log q − KL): errors of log p, log q and KL, p's own exp, and `narrow` of the slope's dtype."""
    _, slope = kl_and_slope(student, teacher)
    p = student.double().softmax(-1)
    pairs = zip((student, teacher), of_logits or (0.0, 0.0), strict=True)
    of_log_p, of_log_q = (tolerance.log_softmax(z, error) for z, error in pairs)
    inner = of_log_p + of_log_q + error_of_kl(student, teacher, *of_logits)[:, None]
    return p * inner + (of_log_p + gamma(4, exps=1) + narrow) * (slope.abs() + p * gamma(4))


@pytest.mark.parametrize("name", ROWS)
def test_the_kl_of_rows_is_the_formulas(found: dict[str, Tensor], name: str) -> None:
    vocabulary = ROWS[name][1]
    student, teacher = (side[:, :vocabulary] for side in rows_of(name))
    kl, _ = kl_and_slope(student, teacher)
    error = error_of_kl(student, teacher)
    assert_within(found[f"{name}.values"], kl, error, "KL")
    assert_within(found[f"{name}.values_alone"], kl, error, "KL without a gradient")
    of_sum = gamma(vocabulary, exps=1) + gamma(3) * student.double().abs().amax(-1)
    assert_within(found[f"{name}.log_sum"], student.double().logsumexp(-1), of_sum, "log-sum")
    # One id of the padding in the sums, as likely as the likeliest, or a row in another's place.
    worse = torch.cat([student, student.amax(-1, keepdim=True)], -1), torch.cat([teacher, teacher[:, :1]], -1)
    assert_noticed(kl_and_slope(*worse)[0], kl, error)
    assert_noticed(kl.flip(0), kl, error)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_the_formulas_and_zero_beyond_the_vocabulary(
    found: dict[str, Tensor], name: str, dtype: torch.dtype
) -> None:
    vocabulary = ROWS[name][1]
    student, teacher = (side[:, :vocabulary] for side in rows_of(name))
    _, slope = kl_and_slope(student, teacher)
    # The interpreter cuts bfloat16 off, by up to a whole ε; a GPU rounds.
    error = error_of_slope(student, teacher, torch.finfo(dtype).eps)
    mine = found[f"{name}.slope.{dtype}"]
    assert_within(mine[:, :vocabulary], slope, error, "gradient")
    assert not mine[:, vocabulary:].any()
    assert_noticed(1.05 * slope, slope, error)
    assert_noticed(slope.roll(1, -1), slope, error)


def test_the_fused_loss_with_padded_heads_is_that_of_the_logical_vocabulary(found: dict[str, Tensor]) -> None:
    """Heads of 160 rows become 192, as on a GPU; one token weighs nothing; three chunks."""
    hidden, head = FUSED["hidden"].double().requires_grad_(), FUSED["head"].double().requires_grad_()
    student = hidden @ head[:V].T
    teacher = FUSED["teacher_hidden"].double() @ FUSED["teacher_head"][:V].double().T
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    weights = FUSED["weights"].double()
    (weights * kl).sum().backward()
    assert hidden.grad is not None
    assert head.grad is not None

    of_logits = (
        product(FUSED["hidden"], FUSED["head"][:V]),
        product(FUSED["teacher_hidden"], FUSED["teacher_head"][:V]),
    )
    logits = (student.detach(), teacher)
    of_kl = error_of_kl(*logits, *of_logits)
    assert_within(found["values"], kl.detach(), of_kl, "KL")
    of_loss = (weights * of_kl).sum() + gamma(M) * (weights * kl.detach()).sum()
    assert_within(found["loss"], (weights * kl).sum().detach(), of_loss, "loss")
    chosen = log_p.detach().gather(-1, FUSED["ids"][:, None])[:, 0]
    of_chosen = tolerance.log_softmax(logits[0], of_logits[0]).gather(-1, FUSED["ids"][:, None])[:, 0]
    assert_within(found["logprobs"], chosen, of_chosen, "log-probs")

    slope = kl_and_slope(*logits)[1].abs()
    of_slope = error_of_slope(*logits, 0.0, *of_logits)
    scale = weights[:, None]
    by_hidden = scale * (of_slope @ head[:V].abs() + gamma(V + 1) * (slope @ head[:V].abs()))
    by_head = (scale * of_slope).T @ hidden.abs() + gamma(M + 2) * (scale * slope).T @ hidden.abs()
    assert_within(found["by_hidden"], hidden.grad, by_hidden.detach(), "gradient by hidden states")
    assert_within(found["by_head"][:V], head.grad[:V], by_head.detach(), "gradient by head")
    assert not found["by_head"][V:].any()
    assert not found["by_hidden"][0].any()
    assert_noticed(1.01 * head.grad[:V], head.grad[:V], by_head.detach())
