"""How far the student is from the teacher at one token, and how to compute it without a (tokens, vocabulary) matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import tensor

from tests.support import divergences, tolerance
from tests.support.tolerance import assert_noticed, assert_within, product
from vaopd import divergence
from vaopd.divergence import SampledTarget, TopKTarget
from vaopd.errors import InvalidInput

pytestmark = pytest.mark.numeric

M, V, D_S, D_T = 37, 50, 8, 12


def hidden_and_heads(*, requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((M, D_S), (V, D_S), (M, D_T), (V, D_T))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return tuple(t.to(dtype).requires_grad_(requires_grad) for t in tensors)


def top_k_target(hidden: torch.Tensor, head: torch.Tensor, k: int) -> TopKTarget:
    ids, logprobs, tail = divergence.top_k_logprobs(hidden, head, k)
    return TopKTarget(token_ids=ids, logprobs=logprobs, tail_logprobs=tail)


def kl_float64(student_logits: np.ndarray, teacher_logits: np.ndarray) -> np.ndarray:
    """The definition, in float64, independent of the code under test."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    student, teacher = log_softmax(student_logits), log_softmax(teacher_logits)
    return (np.exp(student) * (student - teacher)).sum(-1)


def exact_kl(h_s: torch.Tensor, w_s: torch.Tensor, h_t: torch.Tensor, w_t: torch.Tensor) -> np.ndarray:
    return kl_float64(*((hidden.double() @ head.double().T).numpy() for hidden, head in ((h_s, w_s), (h_t, w_t))))


def kl_error(
    h_s: torch.Tensor,
    w_s: torch.Tensor,
    h_t: torch.Tensor,
    w_t: torch.Tensor,
    terms: divergences.Terms = divergences.full,
) -> torch.Tensor:
    """Of the divergence of every token: the products of D numbers that give the logits, and what is made of these."""
    return divergences.error(terms, h_s @ w_s.T, h_t @ w_t.T, product(h_s, w_s), product(h_t, w_t))


def test_reverse_kl_by_hand() -> None:
    # p_S = (1/2, 1/2), p_T = (1/4, 3/4): KL = ½·log 2 + ½·log(2/3).
    student, teacher = tensor([[0.0, 0.0]]), tensor([[0.0, math.log(3.0)]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    error = divergences.error(divergences.full, student, teacher)
    assert_within(divergence.reverse_kl(student, teacher), expected, error)


def test_the_padding_of_a_head_is_outside_the_distribution() -> None:
    student, teacher = tensor([[0.0, 0.0, 50.0]]), tensor([[0.0, math.log(3.0), -7.0, 99.0]])
    kl = divergence.reverse_kl(student, teacher, vocab_size=2)
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    error = divergences.error(divergences.full, student[:, :2], teacher[:, :2])
    assert_within(kl, expected, error)
    # The id of e^-7 in the teacher's softmax makes every log q smaller by that over 1 + 3.
    assert_noticed(expected + math.log1p(math.exp(-7) / 4), expected, error)


def test_an_id_that_is_masked_out_adds_nothing() -> None:
    """KL = 0.5·log(0.5 / 0.25) + 0.5·log(0.5 / 0.75); by the logits, p·(gap − KL) = ±0.25·log 3."""
    student = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log().requires_grad_()
    kl = divergence.reverse_kl(student, torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64).log())
    assert kl.item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-14)
    kl.backward()
    assert student.grad is not None
    assert student.grad.tolist() == pytest.approx([0.25 * math.log(3), -0.25 * math.log(3), 0.0], rel=1e-14)
    with pytest.raises(InvalidInput, match=r"logits have shape \(1, 3\), the teacher's \(1, 1\)"):
        divergence.reverse_kl(student[None], torch.zeros(1, 1))


def test_no_gradient_flows_into_the_teacher() -> None:
    student, teacher = (torch.randn(4, 3).requires_grad_() for _ in range(2))
    divergence.reverse_kl(student, teacher).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_equal_distributions_have_no_divergence() -> None:
    hidden, head, *_ = hidden_and_heads()
    kl = divergence.fused_reverse_kl(hidden, head, hidden, head)
    assert_within(kl, 0.0, kl_error(hidden, head, hidden, head))


@pytest.mark.parametrize("chunk_tokens", [1, 5, M, 1000])
def test_fused_equals_the_definition_whatever_the_chunk(chunk_tokens: int) -> None:
    h_s, w_s, h_t, w_t = hidden_and_heads()
    found = divergence.fused_reverse_kl(h_s, w_s, h_t, w_t, chunk_tokens=chunk_tokens)
    assert_within(found, exact_kl(h_s, w_s, h_t, w_t), kl_error(h_s, w_s, h_t, w_t))


def test_one_padded_id_is_noticed() -> None:
    """In the student's softmax, or the teacher's; and so are an id too few, and two tokens in each other's place."""
    h_s, w_s, h_t, w_t = hidden_and_heads()
    expected, error = exact_kl(h_s, w_s, h_t, w_t), kl_error(h_s, w_s, h_t, w_t)
    padding = torch.randn(1, D_T, generator=torch.Generator().manual_seed(4))
    p, q = ((h.double() @ w.double().T).log_softmax(-1) for h, w in ((h_s, w_s), (h_t, w_t)))
    padded_p = (h_s.double() @ torch.cat((w_s, padding[:, :D_S])).double().T).log_softmax(-1)[:, :V]
    padded_q = (h_t.double() @ torch.cat((w_t, padding)).double().T).log_softmax(-1)[:, :V]
    for wrong_p, wrong_q in ((padded_p, q), (p, padded_q)):
        assert_noticed(divergences.full(wrong_p, wrong_q).sum(-1), expected, error)
    assert_noticed(exact_kl(h_s, w_s[1:], h_t, w_t[1:]), expected, error)
    assert_noticed(exact_kl(h_s, w_s, h_t[[1, 0, *range(2, M)]], w_t), expected, error)


def test_heads_padded_to_different_widths_meet_on_the_logical_vocabulary() -> None:
    h_s, w_s, h_t, w_t = hidden_and_heads()
    padded = torch.cat([w_t, torch.randn(14, D_T)])
    found = divergence.fused_reverse_kl(h_s, w_s, h_t, padded, vocab_size=V)
    assert_within(found, exact_kl(h_s, w_s, h_t, w_t), kl_error(h_s, w_s, h_t, w_t))
    with pytest.raises(InvalidInput, match="50 rows, teacher's 64; give the shared vocab_size"):
        divergence.fused_reverse_kl(h_s, w_s, h_t, padded)


def test_gradients_equal_those_of_the_plain_reference_and_reach_the_student_only() -> None:
    weights = torch.rand(M, generator=torch.Generator().manual_seed(1))
    plain, fused = (hidden_and_heads(requires_grad=True, dtype=torch.float64) for _ in range(2))
    (weights * divergence.reverse_kl(plain[0] @ plain[1].T, (plain[2] @ plain[3].T).detach())).sum().backward()
    (weights * divergence.fused_reverse_kl(*fused, chunk_tokens=7)).sum().backward()
    for expected, found in zip(plain[:2], fused[:2], strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-6, atol=1e-10)
    assert fused[2].grad is None
    assert fused[3].grad is None


def test_no_matrix_over_all_tokens_and_the_vocabulary_ever_exists() -> None:
    """Watches every tensor that an operation returns, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for item in result if isinstance(result, tuple | list) else (result,):
                if isinstance(item, torch.Tensor):
                    self.numel = max(self.numel, item.numel())
            return result

    tokens, vocabulary, chunk = 512, 301, 16
    generator = torch.Generator().manual_seed(0)
    h_s = torch.randn(tokens, 4, generator=generator, requires_grad=True)
    w_s = torch.randn(vocabulary, 4, generator=generator, requires_grad=True)
    h_t, w_t = torch.randn(tokens, 4, generator=generator), torch.randn(vocabulary, 4, generator=generator)
    with Largest() as largest:
        divergence.fused_reverse_kl(h_s, w_s, h_t, w_t, chunk_tokens=chunk).sum().backward()
    assert largest.numel == chunk * vocabulary


def test_token_logprobs_equal_log_softmax_and_gather() -> None:
    hidden, head, *_ = hidden_and_heads()
    ids = torch.arange(M) % V
    logits = hidden.double() @ head.double().T
    expected = logits.log_softmax(-1).gather(-1, ids[:, None])
    error = tolerance.log_softmax(logits, product(hidden, head)).gather(-1, ids[:, None])
    assert_within(divergence.token_logprobs(hidden, head, ids, chunk_tokens=10)[:, None], expected, error)
    assert_noticed(logits[:, :-1].log_softmax(-1).gather(-1, (ids % (V - 1))[:, None]), expected, error)


@pytest.mark.parametrize("k", [1, 5, 49, 50])
def test_top_k_and_tail_never_exceed_the_exact_divergence(k: int) -> None:
    h_s, w_s, h_t, w_t = hidden_and_heads()
    exact = exact_kl(h_s, w_s, h_t, w_t)
    coarse = divergence.fused_divergence(h_s, w_s, top_k_target(h_t, w_t, k), chunk_tokens=9).double()
    error = kl_error(h_s, w_s, h_t, w_t, divergences.top_k(k))
    assert bool((coarse <= torch.from_numpy(exact) + error).all())
    assert bool((coarse >= -error).all())
    if k >= V - 1:  # a tail of at most one id merges nothing
        assert_within(coarse, exact, error)
    else:
        assert_noticed(exact, coarse, error)  # the comparisons above are not of equal numbers


def test_top_k_and_tail_by_hand() -> None:
    # p_T = (0.5, 0.3, 0.2), p_S = (0.2, 0.2, 0.6), k = 1: buckets {0} and {1, 2}.
    p_t, p_s = tensor([[0.5, 0.3, 0.2]]).log(), tensor([[0.2, 0.2, 0.6]]).log()
    identity = torch.eye(3)
    target = top_k_target(p_t, identity, 1)
    assert target.token_ids.tolist() == [[0]]
    assert_within(target.tail_logprobs, math.log(0.5), tolerance.log_softmax(p_t, product(p_t, identity)).amax(-1))
    kl = divergence.fused_divergence(p_s, identity, target)
    error = kl_error(p_s, identity, p_t, identity, divergences.top_k(1))
    assert_within(kl, 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5), error)


def test_sampled_estimators_by_hand() -> None:
    # p_S(y) = 0.5 and p_T(y) = 0.25: k1 = log 2, k3 = r − 1 − log r with r = ½.
    p_s, p_t = tensor([[0.5, 0.5]]).log(), tensor([[0.25, 0.75]]).log()
    for estimator, expected in (("k1", math.log(2)), ("k3", math.log(2) - 0.5)):
        target = SampledTarget(token_ids=tensor([0]), logprobs=p_t[:, 0], estimator=estimator)  # type: ignore[arg-type]
        found = divergence.fused_divergence(p_s, torch.eye(2), target)
        error = kl_error(p_s, torch.eye(2), p_t, torch.eye(2), divergences.sampled(tensor([0]), estimator))
        assert_within(found, expected, error)
    with pytest.raises(InvalidInput, match="'k2' is unknown; use k1 or k3"):
        SampledTarget(token_ids=tensor([0]), logprobs=tensor([0.0]), estimator="k2")  # type: ignore[arg-type]


def test_k1s_gradient_is_the_reverse_kls_on_average() -> None:
    """Summed over all ids with their probabilities, the score-function gradient is the exact one."""
    logits_s, logits_t = (torch.randn(6, generator=torch.Generator().manual_seed(n)).double() for n in (2, 3))
    logits_s.requires_grad_()
    (exact,) = torch.autograd.grad(divergence.reverse_kl(logits_s, logits_t), logits_s)
    probabilities = logits_s.softmax(-1).detach()
    target = SampledTarget(token_ids=torch.arange(6), logprobs=logits_t.log_softmax(-1), estimator="k1")
    estimates = divergence.fused_divergence(logits_s.expand(6, 6), torch.eye(6).double(), target)
    (average,) = torch.autograd.grad((probabilities * estimates).sum(), logits_s)
    torch.testing.assert_close(average, exact, rtol=1e-6, atol=1e-10)
