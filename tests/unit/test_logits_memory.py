"""Of logits, which are larger than anything else of a teacher's forward, one chunk is alive at a time."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support import tolerance
from tests.support.tolerance import assert_noticed, assert_within
from vaopd.divergence import FullTarget, fused_loss, token_logprobs, top_k_logprobs
from vaopd.errors import InvalidInput
from vaopd_trainer.expected_score import score_tokens

M, V, D, CHUNK = 24, 512, 4, 6


class Matrices(TorchDispatchMode):
    """The most (chunk, vocabulary) matrices that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.shape == (CHUNK, V):
                place = tensor.untyped_storage().data_ptr()
                self._alive[place] += 1
                weakref.finalize(tensor, self._gone, place)
                self.most = max(self.most, len(self._alive))
        return result

    def _gone(self, place: int) -> None:
        self._alive[place] -= 1
        if not self._alive[place]:
            del self._alive[place]


def hidden_and_head() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(M, D, generator=generator), torch.randn(V, D, generator=generator)


def test_a_teachers_log_probs_take_one_chunk_of_logits() -> None:
    hidden, head = hidden_and_head()
    with torch.inference_mode(), Matrices() as matrices:
        token_logprobs(hidden, head, torch.arange(M), chunk_tokens=CHUNK)
    assert matrices.most == 1


def test_the_top_k_take_one_chunk_of_logits() -> None:
    hidden, head = hidden_and_head()
    with torch.inference_mode(), Matrices() as matrices:
        top_k_logprobs(hidden, head, 8, chunk_tokens=CHUNK)
    assert matrices.most == 1


def test_the_loss_takes_three() -> None:
    """log p, log q, and what one of the operations between them needs."""
    hidden, head = hidden_and_head()
    target = FullTarget(hidden=hidden, head=head)
    with Matrices() as matrices:
        fused_loss(hidden.requires_grad_(), head, target, torch.ones(M), chunk_tokens=CHUNK)
    assert matrices.most <= 3


def test_the_expected_va_takes_five_of_half_the_size() -> None:
    """Log-probs of the student and of both views, and two that come of them: less than the loss's three."""
    hidden, head = hidden_and_head()
    with Matrices() as matrices:
        target = FullTarget(hidden=hidden.roll(1, 0), head=head)
        score_tokens(hidden, head, target, hidden.roll(2, 0), vocab_size=V, chunk_tokens=2 * CHUNK)
    assert matrices.most <= 5


@pytest.mark.numeric
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_tail_far_below_float32s_rounding_keeps_its_log_mass(scale: float) -> None:
    hidden, head = hidden_and_head()
    head = head * scale
    ids, values, tail = top_k_logprobs(hidden, head, 8, chunk_tokens=CHUNK)
    logits = hidden.double() @ head.double().T
    exact, errors = logits.log_softmax(-1), tolerance.log_softmax(logits, tolerance.product(hidden, head))
    expected = exact.topk(8)
    assert torch.equal(ids.long(), expected.indices)
    assert_within(values, expected.values, errors.gather(-1, expected.indices))
    rest = exact.scatter(-1, expected.indices, -torch.inf).logsumexp(-1)
    # A log-sum-exp is off by no more than the largest of its terms is, and by the sum's rounding, which that includes.
    error = errors.scatter(-1, expected.indices, 0).amax(-1)
    assert_within(tail, rest, error)
    one_less = exact.scatter(-1, exact.topk(9).indices, -torch.inf).logsumexp(-1)
    assert_noticed(one_less, rest, error)


def test_the_whole_vocabulary_leaves_an_empty_tail() -> None:
    hidden, head = hidden_and_head()
    _, values, tail = top_k_logprobs(hidden, head, V)
    assert torch.isfinite(values).all()
    assert (tail == -torch.inf).all()


def test_a_head_that_is_spread_over_ranks_is_refused_by_name(tmp_path: Any) -> None:
    hidden, head = hidden_and_head()
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        spread = DTensor.from_local(head, init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(InvalidInput, match="spread over ranks"):
            fused_loss(hidden, spread, FullTarget(hidden=hidden, head=head), torch.ones(M))
    finally:
        torch.distributed.destroy_process_group()
