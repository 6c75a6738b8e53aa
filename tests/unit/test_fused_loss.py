"""The one-pass loss: the same numbers and gradients as full logits, for every target, however it is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import divergences, tolerance
from tests.support.logit_products import LogitProducts
from tests.support.tolerance import assert_noticed, assert_within, gamma, product
from vaopd.divergence import (
    DIVERGENCES,
    FullTarget,
    SampledTarget,
    Target,
    TopKTarget,
    fused,
    fused_divergence,
    fused_loss,
    targets,
    token_logprobs,
    top_k_logprobs,
)
from vaopd.divergence import head as heads
from vaopd.errors import InvalidInput

pytestmark = pytest.mark.numeric

M, V, D_S, D_T, K = 23, 40, 6, 9, 5
TARGETS = ("full", "top_k", "k1", "k3")
IDS = torch.arange(M) * 7 % V
TERMS = {
    "full": divergences.full,
    "top_k": divergences.top_k(K),
    "k1": divergences.sampled(IDS, "k1"),
    "k3": divergences.sampled(IDS, "k3"),
}


def made(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers in every precision: they are float32's."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float().to(dtype)


def student(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    hidden, head = made(0, M, D_S, dtype=dtype), made(1, V, D_S, dtype=dtype)
    return hidden.requires_grad_(), head.requires_grad_()


def weights(dtype: torch.dtype = torch.float64) -> Tensor:
    return made(9, M, dtype=dtype).abs()


def target_of(kind: str, dtype: torch.dtype = torch.float64) -> Target:
    hidden, head = made(2, M, D_T, dtype=dtype), made(3, V, D_T, dtype=dtype)
    if kind == "full":
        return FullTarget(hidden=hidden, head=head)
    if kind == "top_k":
        ids, logprobs, tail = top_k_logprobs(hidden, head, K)
        return TopKTarget(token_ids=ids, logprobs=logprobs, tail_logprobs=tail)
    return SampledTarget(token_ids=IDS, logprobs=token_logprobs(hidden, head, IDS), estimator=kind)  # type: ignore[arg-type]


def plain(kind: str, hidden: Tensor, head: Tensor) -> Tensor:
    """(M,) from full logits by autograd, in the precision of the inputs."""
    log_p = torch.log_softmax(hidden @ head.T, -1)
    log_q = torch.log_softmax(made(2, M, D_T) @ made(3, V, D_T).T, -1).to(log_p.dtype)
    if kind != "k1":
        return TERMS[kind](log_p, log_q).sum(-1)
    sampled_p, sampled_q = (x.gather(-1, IDS[:, None])[:, 0] for x in (log_p, log_q))
    return (sampled_p - sampled_q).detach() * (1 + sampled_p - sampled_p.detach())  # the score function


def close(found: Any, expected: Any, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("chunk_tokens", [1, 7, M, 1000, None])
def test_values_and_gradients_are_those_of_full_logits(kind: str, chunk_tokens: int | None) -> None:
    hidden, head = student()
    loss, found = fused_loss(hidden, head, target_of(kind), weights(), chunk_tokens=chunk_tokens)
    expected = plain(kind, hidden, head)
    close(found, expected.detach())
    close(loss, (weights() * expected).sum())
    assert not found.requires_grad
    close(torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad((weights() * expected).sum(), (hidden, head)))


def slopes(kind: str, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """(M, V): the divergences' gradients by the student's logits, differentiable once more."""
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    if kind == "k1":
        log_ratio = (log_p - log_q).gather(-1, IDS[:, None])
        return log_ratio * (nn.functional.one_hot(IDS, V) - log_p.exp())
    (gradient,) = torch.autograd.grad(TERMS[kind](log_p, log_q).sum(), student_logits, create_graph=True)
    return gradient


class Errors:
    """What rounding does to divergences, loss and gradients, when the products are `narrow` and all else float32."""

    def __init__(self, kind: str, narrow: torch.dtype = torch.float32) -> None:
        (hidden, head), teacher = student(), (made(2, M, D_T), made(3, V, D_T))
        logits = [(h @ w.T).detach().requires_grad_() for h, w in ((hidden, head), teacher)]
        # In bfloat16: both factors and the result are rounded, the sum is float32's.
        inner = 0.0 if narrow == torch.float32 else gamma(3, narrow)
        of_logits = [product(h, w) + inner * (h.abs() @ w.abs().T).detach() for h, w in ((hidden, head), teacher)]
        self.divergences = divergences.error(TERMS[kind], *logits, *of_logits)

        slope = slopes(kind, *logits)
        moved = [error + tolerance.log_softmax(z) for z, error in zip(logits, of_logits, strict=True)]
        by_logit = [torch.autograd.grad(column.sum(), logits, retain_graph=True) for column in slope.T]
        of_slope = torch.stack(
            [sum((g.abs() * e).sum(-1) for g, e in zip(row, moved, strict=True)) for row in by_logit], dim=-1
        )
        # Made of p and the divergence: (p or the sampled id) · (divergence and gap), an exp and a few roundings.
        slope, p = slope.detach().abs(), logits[0].detach().softmax(-1)
        of_slope += (gamma(4, exps=1) + inner) * (slope + p)
        of_slope += self.divergences[:, None] * (p + (nn.functional.one_hot(IDS, V) if kind[0] == "k" else 0))

        scale, hidden, head = weights()[:, None], hidden.detach().abs(), head.detach().abs()
        self.by_hidden = scale * (of_slope @ head + (gamma(V) + inner) * (slope @ head))
        self.by_head = (scale * of_slope).T @ hidden + (gamma(M) + inner) * (scale * slope).T @ hidden


@pytest.mark.parametrize("kind", TARGETS)
def test_in_float32_they_agree_with_float64(kind: str) -> None:
    """To what the logits (sums of D), their log-softmax and the sums over V and M round, nothing else."""
    hidden, head = student(torch.float32)
    loss, found = fused_loss(hidden, head, target_of(kind, torch.float32), weights(torch.float32), chunk_tokens=7)
    exact, errors = student(), Errors(kind)
    expected = plain(kind, *exact)
    theirs = torch.autograd.grad((weights() * expected).sum(), exact)
    by_hidden, by_head = torch.autograd.grad(loss, (hidden, head))
    assert_within(found, expected, errors.divergences, "divergence")
    assert_within(by_hidden, theirs[0], errors.by_hidden, "gradient by hidden states")
    assert_within(by_head, theirs[1], errors.by_head, "gradient by head")
    of_sum = (weights() * errors.divergences).sum() + gamma(M) * (weights() * expected.abs()).sum()
    assert_within(loss, (weights() * expected).sum(), of_sum, "loss")


@pytest.mark.parametrize("kind", TARGETS)
def test_the_smallest_mistakes_are_noticed_in_float32(kind: str) -> None:
    """One token's weight off by 1 %, one padded id in the student's softmax, two tokens in each other's place."""
    exact, errors = student(), Errors(kind)
    expected = plain(kind, *exact)
    by_hidden, by_head = torch.autograd.grad((weights() * expected).sum(), exact, retain_graph=True)
    sizes = by_hidden.norm(dim=-1)
    for token in (sizes > 0.2 * sizes.median()).nonzero():  # some gradients all but vanish, whatever they weigh
        off = weights()
        off[token] *= 1.01
        assert_noticed(off[:, None] / weights()[:, None] * by_hidden, by_hidden, errors.by_hidden)
        off[token] = 0
        (without,) = torch.autograd.grad((off * expected).sum(), exact[1], retain_graph=True)
        assert_noticed(without, by_head, errors.by_head)
    logits = [(h @ w.T).detach() for h, w in (exact, (made(2, M, D_T), made(3, V, D_T)))]
    padding = (exact[0] @ made(4, D_S)).detach()[:, None]
    log_p, log_q = torch.cat((logits[0], padding), -1).log_softmax(-1)[:, :V], logits[1].log_softmax(-1)
    assert_noticed(TERMS[kind](log_p, log_q).sum(-1), expected, errors.divergences)
    assert_noticed(expected[[1, 0, *range(2, M)]], expected, errors.divergences)


@pytest.mark.parametrize("kind", ["full", "top_k", "k3"])  # k1's gradient is on purpose not its value's
@pytest.mark.parametrize("loss", [True, False])
def test_gradcheck(kind: str, loss: bool) -> None:
    target = target_of(kind)

    def function(hidden: Tensor, head: Tensor) -> Tensor:
        if loss:
            return fused_loss(hidden, head, target, weights(), chunk_tokens=5)[0]
        return fused_divergence(hidden, head, target, chunk_tokens=5)

    assert torch.autograd.gradcheck(function, student())


def compare_by_forward_kl(log_p: Tensor, log_q: Tensor, *, differentiate: bool) -> tuple[Tensor, Tensor | None]:
    """KL(teacher ‖ student), whose gradient by the student's logits is p − q."""
    p, q = log_p.exp(), log_q.exp()
    return (q * (log_q - log_p)).sum(-1), p - q if differentiate else None


@pytest.mark.parametrize("kind", ["full", "top_k"])
def test_another_divergence_takes_one_function(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIVERGENCES, "forward_kl", compare_by_forward_kl)  # type: ignore[arg-type]
    target: Any = target_of(kind)
    hidden, head = student()
    loss, found = fused_loss(hidden, head, replace(target, divergence="forward_kl"), weights(), chunk_tokens=7)
    log_p = torch.log_softmax(hidden @ head.T, -1)
    log_q = torch.log_softmax(made(2, M, D_T) @ made(3, V, D_T).T, -1)
    if kind == "top_k":  # k ids and the mass of the others
        ids = log_q.topk(K).indices
        log_p, log_q = (
            torch.cat([x.gather(-1, ids), x.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)], -1)
            for x in (log_p, log_q)
        )
    expected = (log_q.exp() * (log_q - log_p)).sum(-1)
    close(found, expected.detach())
    close(torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad((weights() * expected).sum(), (hidden, head)))


def test_an_unknown_divergence_is_named() -> None:
    target: Any = target_of("full")
    with pytest.raises(InvalidInput, match="divergence 'chi2' is unknown; use one of reverse_kl"):
        replace(target, divergence="chi2")


@pytest.mark.parametrize("kind", TARGETS)
def test_the_differentiable_divergence_has_the_same_gradients(kind: str) -> None:
    hidden, head = student()
    loss, _ = fused_loss(hidden, head, target_of(kind), weights(), chunk_tokens=7)
    other = (weights() * fused_divergence(hidden, head, target_of(kind), chunk_tokens=7)).sum()
    close(torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(other, (hidden, head)))


def test_the_losss_own_gradient_scales_and_the_graph_can_be_walked_twice() -> None:
    hidden, head = student()
    loss, _ = fused_loss(hidden, head, target_of("full"), weights())
    (once,) = torch.autograd.grad(loss, head, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, head)
    close(thrice, 3 * once)


def test_gradients_of_several_forwards_add_up() -> None:
    hidden, head = student()
    for _ in range(2):
        fused_loss(hidden, head, target_of("full"), weights())[0].backward()
    expected = torch.autograd.grad(2 * (weights() * plain("full", hidden, head)).sum(), (hidden, head))
    close((hidden.grad, head.grad), expected)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    hidden, head = student()
    rest = hidden if frozen == "head" else head
    (head if frozen == "head" else hidden).requires_grad_(False)
    loss, _ = fused_loss(hidden, head, target_of("full"), weights())
    close(torch.autograd.grad(loss, rest), torch.autograd.grad((weights() * plain("full", hidden, head)).sum(), rest))


def test_a_head_tied_to_the_embeddings_gets_both_gradients() -> None:
    ids = torch.arange(M) % V
    table = nn.Parameter(made(1, V, D_S))

    def gradient(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        (found,) = torch.autograd.grad(loss_of(torch.tanh(table[ids]), table[:V]), table)
        return found

    close(
        gradient(lambda hidden, head: fused_loss(hidden, head, target_of("full"), weights(), chunk_tokens=7)[0]),
        gradient(lambda hidden, head: (weights() * plain("full", hidden, head)).sum()),
    )


@pytest.mark.parametrize("kind", TARGETS)
def test_no_tokens_are_no_loss_and_no_gradient(kind: str) -> None:
    head = made(1, V, D_S).requires_grad_()
    hidden = torch.empty(0, D_S, dtype=torch.float64, requires_grad=True)
    empty: dict[str, Target] = {
        "full": FullTarget(hidden=torch.empty(0, D_T, dtype=torch.float64), head=made(3, V, D_T)),
        "top_k": TopKTarget(
            token_ids=torch.empty(0, K, dtype=torch.int32), logprobs=torch.empty(0, K), tail_logprobs=torch.empty(0)
        ),
    }
    sampled = SampledTarget(token_ids=torch.empty(0, dtype=torch.int32), logprobs=torch.empty(0))
    loss, found = fused_loss(hidden, head, empty.get(kind, sampled), torch.empty(0))
    by_hidden, by_head = torch.autograd.grad(loss, (hidden, head))
    assert (loss.item(), found.shape, by_hidden.shape) == (0.0, (0,), (0, D_S))
    assert not by_head.any()


def test_without_gradients_only_values_are_computed() -> None:
    hidden, head = student()
    with torch.no_grad():
        loss, found = fused_loss(hidden, head, target_of("full"), weights())
    assert not loss.requires_grad
    close(found, plain("full", hidden, head).detach())
    with torch.inference_mode():
        close(fused_divergence(hidden, head, target_of("full")), found)


def test_under_autocast_products_are_bfloat16_and_sums_float32() -> None:
    hidden, head = student(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = fused_loss(hidden, head, target_of("full", torch.float32), weights(torch.float32), chunk_tokens=7)
    assert (loss.dtype, found.dtype) == (torch.float32, torch.float32)
    gradients = torch.autograd.grad(loss, (hidden, head))
    exact, errors = student(), Errors("full", torch.bfloat16)
    expected = plain("full", *exact)
    assert_within(found, expected, errors.divergences)
    theirs = torch.autograd.grad((weights() * expected).sum(), exact)
    for gradient, other, error in zip(gradients, theirs, (errors.by_hidden, errors.by_head), strict=True):
        assert gradient.dtype == torch.float32
        assert_within(gradient, other, error)
        assert_noticed(-other, other, error)


def test_bfloat16_weights_get_gradients_that_were_summed_in_float32() -> None:
    """512 equal tokens, one per chunk: in bfloat16 the sum would stop growing at 256 times a summand."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    head = torch.tensor([[0.0], [1.0]], dtype=torch.bfloat16, requires_grad=True)
    target = FullTarget(hidden=hidden, head=torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16))
    loss, _ = fused_loss(hidden, head, target, torch.ones(512), chunk_tokens=1)
    one, _ = fused_loss(hidden[:1], head, FullTarget(hidden=hidden[:1], head=target.head), torch.ones(1))
    (total,), (single,) = torch.autograd.grad(loss, head), torch.autograd.grad(one, head)
    assert_within(total, 512 * single, gamma(2, torch.bfloat16) * 512 * single.abs())  # both are rounded at the end


@pytest.mark.parametrize("weight", [2.0**-30, 0.0])
def test_small_weights_reach_a_head_in_float16(weight: float) -> None:
    """2^-30 is 0 in float16. The loss's scale, as a scaler sets it, brings them back, exactly."""
    gradients = []
    for each, scale in ((1.0, 1.0), (weight, 2.0**30)):
        hidden, head = student(torch.float16)
        loss, _ = fused_loss(hidden, head, target_of("full", torch.float16), torch.full((M,), each), chunk_tokens=7)
        gradients.append(torch.autograd.grad(loss * scale, (hidden, head)))
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        assert expected.any()
        assert torch.equal(found, expected if weight else torch.zeros_like(expected))


def test_a_tail_too_small_for_float32_adds_nothing() -> None:
    """The student is sure of the teacher's only id: the mass of the rest is e^-200."""
    hidden, head = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [0.0]])
    target = TopKTarget(
        token_ids=torch.tensor([[0]]), logprobs=torch.tensor([[-0.5]]), tail_logprobs=torch.tensor([-0.9327521])
    )
    loss, found = fused_loss(hidden, head, target, torch.ones(1))
    assert_within(found, 0.5, gamma(4) * 0.5)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.item() == 0.0


def test_what_does_not_fit_together_is_refused_by_name() -> None:
    hidden, head = student()
    with pytest.raises(InvalidInput, match=r"shape \(5,\), expected one per token, \(23,\)"):
        fused_loss(hidden, head, target_of("full"), torch.ones(5))
    with pytest.raises(InvalidInput, match="student has 22 response tokens, the teacher's payload 23"):
        fused_loss(hidden[:22], head, target_of("full"), torch.ones(22))
    with pytest.raises(InvalidInput, match="student's head has 39 rows, teacher's 40"):
        fused_loss(hidden, head[:39], target_of("full"), weights())
    with pytest.raises(InvalidInput, match="top k = 5 exceeds the student's vocabulary of 4"):
        fused_loss(hidden, head[:4], target_of("top_k"), weights())
    with pytest.raises(InvalidInput, match=r"hidden states have shape \(1, 23, 6\); give one row per token"):
        top_k_logprobs(hidden[None], head, 1)
    with pytest.raises(InvalidInput, match="23 tokens have 22 ids"):
        token_logprobs(hidden, head, IDS[:22])


@pytest.mark.parametrize("wrong", [-1, 0, V + 1])
def test_a_vocabulary_that_a_head_does_not_have_is_refused(wrong: int) -> None:
    hidden, head = student()
    for use in (
        lambda: fused_loss(hidden, head, target_of("full"), weights(), vocab_size=wrong),
        lambda: token_logprobs(hidden.detach(), head.detach(), IDS, vocab_size=wrong),
        lambda: top_k_logprobs(hidden, head, 1, vocab_size=wrong),
        lambda: heads.head_logits(hidden, head, wrong),
    ):
        with pytest.raises(InvalidInput, match=rf"vocab_size = {wrong} is outside \[1, 40\], the rows of the"):
            use()
    short = FullTarget(hidden=made(2, M, D_T), head=made(3, 3, D_T), vocab_size=V)
    with pytest.raises(InvalidInput, match=r"vocab_size = 40 is outside \[1, 3\], the rows of the teacher's head"):
        fused_loss(hidden, head, short, weights())
    with pytest.raises(InvalidInput, match=f"chunk_tokens = {min(wrong, 0)} must be at least 1"):
        fused_loss(hidden, head, target_of("full"), weights(), chunk_tokens=min(wrong, 0))


@pytest.mark.parametrize("rows", [1, M + 1])
def test_a_target_of_other_lengths_is_neither_cut_nor_spread(rows: int) -> None:
    hidden, head = student()
    listed = TopKTarget(token_ids=IDS[:, None], logprobs=-torch.ones(M, 1), tail_logprobs=-torch.ones(rows))
    for target in (SampledTarget(token_ids=IDS, logprobs=-torch.ones(rows)), listed):
        with pytest.raises(InvalidInput, match=rf"logprobs have shape \({rows},\), its ids ask for \(23,\)"):
            fused_loss(hidden, head, target, weights())


@pytest.mark.parametrize("kind", TARGETS)
def test_products_as_wide_as_padded_heads_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: 40 rows become 64."""
    target, (hidden, head) = target_of(kind), student()
    for module in (fused, heads, targets):
        monkeypatch.setattr(module, "is_padded", lambda device: True)
    with LogitProducts() as products:
        loss, found = fused_loss(hidden, head, target, weights(), chunk_tokens=7)
    assert products.widths == {64}
    expected = plain(kind, hidden, head)
    close(found, expected.detach())
    close(torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad((weights() * expected).sum(), (hidden, head)))


def test_one_pass_over_the_heads_each_way() -> None:
    """Per chunk both models' logits and the student's two gradients; the backward pass multiplies no matrices."""
    hidden, head = student()
    target, chunks = target_of("full"), 4
    with LogitProducts() as products:
        loss, _ = fused_loss(hidden, head, target, weights(), chunk_tokens=-(-M // chunks))
        assert products.count == 4 * chunks
        loss.backward()
        assert products.count == 4 * chunks
