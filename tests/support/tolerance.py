"""Tolerances of numeric tests, from the arithmetic: machine epsilon, number of terms, magnitudes, number of layers.

A tolerance bounds what rounding can do on any processor, in any order of summation, so that a test neither depends on
the machine that printed its numbers nor hides a mistake: `assert_within` compares with the bound, `assert_noticed`
shows that a given mistake would fail the same comparison.

Model: every operation is right up to a factor 1 + δ, |δ| ≤ u = ε/2 (2^-24 in float32); an exp is right to 20 ulps, what
torch's softmax kernels have. First order: products of errors, 1e-7 of the bound, are left out. Source of the bounds:
N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1 to 3.5.

Not from here: numbers made in float64, where the default of `pytest.approx` (1e-6 relative) and an explicit 1e-10 are
ten and six orders of magnitude above ε (of float32, that default is 16 u: a dozen terms of one sign); and bitwise
equality of what was computed twice in the same shapes. Other shapes or batches are other orders of summation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

EXP_ROUNDINGS = 40
"""20 ulps (ATen/cpu/vec: "a faster version of exp with ULP=20") are 40 u. Other exps are right to one or two."""
TERMS_PER_WIDTH = 10
"""Sums in a row in one layer, in units of its width: norm 1, query 1, scores 1/4, softmax and values over up to `width`
keys 2, output 1, norm 1, MLP 1 up and 2 down (twice as wide); rounded up."""


def gamma(terms: int, dtype: torch.dtype = torch.float32, *, exps: int = 0) -> float:
    """Bounds the error of a sum or dot product of n terms t relative to Σ|t|: γ_n = n·u / (1 − n·u).

    From 36 terms on 6·√n takes the place of n: rounding errors of both signs cancel. With λ = 6 that fails in one of
    10^5 sums of 256 terms (2n·exp(-λ²/2); N. J. Higham and T. Mary, SIAM J. Sci. Comput. 41 (2019), theorem 3.1). It
    isn't for equal terms, whose errors all have one sign. `exps` in the making of a term add 40 u each.
    """
    u = torch.finfo(dtype).eps / 2
    relative = (min(terms, 6 * math.sqrt(terms)) + EXP_ROUNDINGS * exps) * u
    return relative / (1 - relative)


def product(left: Tensor, right: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bounds the error of each element of `left @ right.T`: γ_D·Σ_d |left_md·right_vd|. (M, D), (V, D) -> (M, V)"""
    return gamma(left.shape[-1], dtype) * (left.detach().double().abs() @ right.detach().double().abs().T)


def log_softmax(logits: Tensor, error: Tensor | float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bounds the error of the log-probs of `logits` (..., V), which are off by up to `error` already.

    log p_j = z_j − max − log Σ exp(z − max) is off by (1 − p_j)·error_j + Σ p_i·error_i, i ≠ j (its derivatives: what
    is almost certain hardly moves), by γ_V and an exp in the sum, by one rounding of each difference, and by four of
    numbers the size of max and log V: the sum's logarithm, and the differences of an implementation that takes
    log Σ exp z from z_j.
    """
    z = logits.detach().double()
    errors, p = torch.as_tensor(error, dtype=torch.float64).expand_as(z), z.softmax(-1)
    moved = (1 - 2 * p) * errors + (p * errors).sum(-1, keepdim=True)
    vocabulary, largest = z.shape[-1], z.amax(-1, keepdim=True)
    differences = gamma(1, dtype) * (largest - z + z.log_softmax(-1).abs())
    of_sum = gamma(vocabulary, dtype, exps=1) + gamma(4, dtype) * (largest.abs() + math.log(vocabulary))
    return moved + differences + of_sum


def rollout_weights(means: Tensor, error: Tensor | float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bounds the error of the rollout weights of mean advantages m (..., K) that are off by up to `error`.

    The weights are softmax(z) with z = (m − mean m) / (deviation + ε).
    A difference is off by twice error + γ_K+2·max m, for that is what it is made of; the deviation, their root mean
    square, by no more; z by both over the deviation, and by γ_K+6·|z|. Softmax takes twice the largest of these.
    """
    m, siblings = means.detach().double(), means.shape[-1]
    centred = m - m.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt() + 1e-6  # the method's ε
    z = centred / deviation
    difference = 2 * (torch.as_tensor(error, dtype=torch.float64) + gamma(siblings + 2, dtype) * m.abs()).amax(-1, True)
    of_z = difference / deviation * (1 + z.abs()) + gamma(siblings + 6, dtype) * z.abs()
    own = gamma(siblings + 3, dtype, exps=1)
    return z.softmax(-1) * (2 * of_z.amax(-1, keepdim=True) + own)


def propagated(
    terms: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    errors: Sequence[Tensor | float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Bounds the error of f = Σ_n terms(x)_n, where `terms` maps inputs (M, ...) row by row to (M, n): -> (M,).

    It is Σ_j |∂f/∂x_j|·error_j of the inputs, by autograd in float64, and (γ_n+2 and an exp)·Σ|terms|: each term is up
    to one exp, a difference and a product, and then they are summed.
    """
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    parts = terms(*leaves)
    gradients = torch.autograd.grad(parts.sum(), leaves)
    own = gamma(parts.shape[-1] + 2, dtype, exps=1)
    moved = ((g.abs() * error).flatten(1).sum(-1) for g, error in zip(gradients, errors, strict=True))
    return sum(moved, own * parts.detach().abs().sum(-1))


def forward(config: Any, *, sides: int = 2, dtype: torch.dtype = torch.float32) -> float:
    """Bounds the error of a hidden state or a row of logits after a whole forward: 3·√(sides·N)·u of its norm.

    N = 10·Σ width over the layers of text model and vision tower, the terms of all sums on the way (TERMS_PER_WIDTH).
    `sides`: 2 to compare two forwards in `dtype`, 1 for one against float64. In place of the worst case, whose
    condition numbers multiply from layer to layer into a bound that says nothing, errors of independent signs add up in
    the 2-norm (Higham and Mary; λ = 3, three standard deviations), and residual stream and norms carry them through the
    layers as they are. tests/unit/test_tolerance.py holds this against real forwards.

    The logits are the hidden states' images under one head, errors included: the same factor bounds a row's largest
    error relative to its largest magnitude. So it does for log-probs, which are logits too.

    In float64 transformers' norms still go through float32: once in 10^8 elements two forwards that agree to 10^-16
    round to neighbours there, hence γ_10 of float32 in addition. Forwards of two implementations are best compared so.
    """
    towers = [(config.text_config, "num_hidden_layers"), (config.vision_config, "depth")]
    widths = sum(getattr(c, name if hasattr(c, name) else "num_hidden_layers") * c.hidden_size for c, name in towers)
    own = 3 * math.sqrt(sides * TERMS_PER_WIDTH * widths) * torch.finfo(dtype).eps / 2
    return own + gamma(10) if dtype == torch.float64 else own


def logprobs(config: Any, hidden: Tensor, head: Tensor) -> Tensor:
    """Bounds the difference of a log-prob between two whole float32 forwards: twice that of its row's logits. (M,)

    `hidden` (M, D) of one of them and `head` (V, D) say how large the logits are. `log_softmax` is tighter where all of
    a row's logits are at hand.
    """
    return 2 * forward(config) * (hidden.float() @ head.float().T).detach().abs().amax(-1)


def backward(
    config: Any, gradients: Mapping[str, Tensor], *, sides: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Bounds the error of each parameter's gradient in the 2-norm: 3 times `forward`, a backward being twice as long.

    Relative to the gradient's norm, or to a hundredth of the norm of all gradients, where it is the small rest of terms
    that cancel: a constant added to all scores changes no softmax, so that key biases have no gradient but rounding.
    """
    total = float(torch.stack([g.norm() for g in gradients.values()]).norm())
    relative = 3 * forward(config, sides=sides, dtype=dtype)
    return {name: relative * max(float(g.norm()), 0.01 * total) for name, g in gradients.items()}


def assert_within(found: Any, expected: Any, bound: Any, what: str = "") -> None:
    """Fails unless |found − expected| ≤ bound everywhere; names the worst element."""
    excess, found, expected, bound = _excess(found, expected, bound)
    if bool((excess <= 1).all()):
        return
    worst = int(excess.nan_to_num(nan=math.inf).argmax())
    raise AssertionError(
        f"{what or 'value'}: {int((~(excess <= 1)).sum())} of {excess.numel()} outside their tolerance; the worst, "
        f"number {worst}, is {found[worst]:.9g}, expected {expected[worst]:.9g} ± {bound[worst]:.2g}"
    )


def assert_noticed(wrong: Any, expected: Any, bound: Any) -> None:
    """Fails unless a mistake that gives `wrong` lies outside the tolerance somewhere, however the rounding went.

    That takes twice the bound: the expected value may be off by all of it towards the wrong one.
    """
    excess, *_ = _excess(wrong, expected, bound)
    largest = float(excess.max())
    assert largest > 2, f"the mistake reaches {largest:.2g} of the tolerance, so a test could miss it"


def _excess(found: Any, expected: Any, bound: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The difference in units of the bound, and all three, flat."""
    tensors = (x.detach() if isinstance(x, Tensor) else torch.tensor(np.asarray(x)) for x in (found, expected, bound))
    values = torch.broadcast_tensors(*(x.double() for x in tensors))
    found, expected, bound = (x.flatten() for x in values)
    return torch.where(found == expected, 0.0, (found - expected).abs() / bound), found, expected, bound
