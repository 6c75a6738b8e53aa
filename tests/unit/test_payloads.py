"""Payload tensors survive the way into bytes and back bit for bit, bfloat16 included."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.support import tolerance
from tests.support.tolerance import assert_within, gamma, product
from vaopd.errors import InvalidInput, NumericalError
from vaopd.payloads import compute, decode, from_torch, hidden_states, pack, to_torch
from vaopd.types import Payload, PayloadKind, Tensor

pytestmark = pytest.mark.numeric


def encode(kind: PayloadKind, hidden: torch.Tensor, head: torch.Tensor, *, top_k: int = 1) -> Payload:
    return pack(kind, compute(kind, hidden, head, top_k=top_k))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8, torch.int8]
)
def test_a_tensor_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    tensor = (torch.arange(12).reshape(3, 4) * 1.25).to(dtype)
    sent = from_torch(tensor)
    assert sent.shape == (3, 4)
    assert torch.equal(to_torch(sent), tensor)


def test_bfloat16_travels_as_its_two_bytes() -> None:
    # 1.0 is 0x3F80 and -2.0 is 0xC000 in bfloat16, little-endian on the wire.
    assert from_torch(torch.tensor([1.0, -2.0], dtype=torch.bfloat16)).data == b"\x80\x3f\x00\xc0"


def test_a_transposed_tensor_travels_in_row_major_order() -> None:
    assert from_torch(torch.tensor([[1, 2], [3, 4]]).T).numpy().tolist() == [[1, 3], [2, 4]]


def test_an_empty_tensor_keeps_its_shape() -> None:
    assert to_torch(from_torch(torch.empty(0, 7))).shape == (0, 7)


def test_neither_making_nor_reading_a_tensor_copies_anything() -> None:
    """The teacher's device waits while its thread makes a payload."""
    tensor = torch.arange(4, dtype=torch.bfloat16)
    sent = from_torch(tensor)
    assert tensor.data_ptr() == np.frombuffer(sent.data, np.uint8).ctypes.data == to_torch(sent).data_ptr()


def test_bytes_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(InvalidInput, match="needs 16 bytes, got 3"):
        to_torch(Tensor(dtype="float32", shape=(4,), data=b"abc"))


def test_a_dtype_that_does_not_travel_is_named() -> None:
    with pytest.raises(InvalidInput, match="complex64"):
        from_torch(torch.zeros(1, dtype=torch.complex64))


def test_the_top_k_payload_holds_the_largest_and_the_rest() -> None:
    # Logits log(1, 2, 4, 8): probabilities 1/15, 2/15, 4/15, 8/15; the two largest are ids 3 and 2, 3/15 remain.
    hidden = torch.tensor([[1.0]])
    head = torch.log(torch.tensor([[1.0], [2.0], [4.0], [8.0]]))
    tensors = decode(encode("top_k", hidden, head, top_k=2))
    assert tensors["token_ids"].tolist() == [[3, 2]]
    # Of logits that are logarithms rounded to float32, times one.
    error = tolerance.log_softmax(head.T, product(hidden, head)).amax(-1)
    assert_within(tensors["logprobs"][0], [math.log(8 / 15), math.log(4 / 15)], error)
    assert_within(tensors["tail_logprobs"], math.log(3 / 15), error)


def test_the_hidden_payload_is_the_hidden_states() -> None:
    hidden = torch.randn(3, 5, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decode(encode("hidden", hidden, torch.zeros(7, 5)))["hidden"], hidden)


def test_the_hidden_pair_has_the_original_view_s_hidden_states_and_the_degraded_one_s() -> None:
    hidden, degraded = torch.randn(2, 3, 5, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    payload = pack("hidden_pair", compute("hidden_pair", hidden, torch.zeros(7, 5), top_k=1, degraded_hidden=degraded))
    assert torch.equal(hidden_states(payload, torch.bfloat16), hidden)
    assert torch.equal(decode(payload)["degraded_hidden"], degraded)
    assert sum(len(tensor.data) for tensor in payload.tensors.values()) == 2 * 3 * 5 * 2


def test_a_payload_that_lacks_a_tensor_is_refused() -> None:
    with pytest.raises(InvalidInput, match="hidden"):
        decode(Payload(kind="hidden"))


def int8(hidden: torch.Tensor) -> Payload:
    return encode("hidden_int8", hidden, torch.zeros(7, hidden.shape[1]))


def test_int8_hidden_states_by_hand() -> None:
    # Largest 12.7, so a step is 0.1: 12.7 is 127 steps, -0.26 rounds to -3 of them, 0.04 to none.
    payload = int8(torch.tensor([[12.7, -0.26, 0.04], [0.0, 0.0, 0.0]]))
    tensors = decode(payload)
    assert tensors["hidden_int8"].tolist() == [[127, -3, 0], [0, 0, 0]]
    assert_within(tensors["scales"], [0.1, 0.0], gamma(2) * 0.1)
    found = hidden_states(payload, torch.float32)
    assert_within(found[0], [12.7, -0.3, 0.0], gamma(3) * torch.tensor([12.7, 0.3, 0.0]))
    assert found[1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_off_by_at_most_half_a_scale_of_its_own_row(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.arange(-20, 20)  # rows of very different size don't cost each other precision
    hidden = (torch.randn(40, 64, generator=generator) * sizes[:, None]).to(dtype)
    found = hidden_states(int8(hidden), torch.float32)
    scales = decode(int8(hidden))["scales"]
    assert torch.equal(scales, hidden.float().abs().amax(-1) / 127)
    # And what float32 rounds of a quotient of up to 127 steps, and of their product with the scale.
    assert_within(found, hidden.float(), (0.5 + 127 * gamma(3)) * scales[:, None])


def test_int8_of_no_tokens_is_no_tokens() -> None:
    assert hidden_states(int8(torch.empty(0, 5)), torch.float32).shape == (0, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_int8_refuses_scales_that_are_not_finite(bad: float) -> None:
    tensors = dict(int8(torch.ones(1, 2)).tensors, scales=from_torch(torch.tensor([bad])))
    with pytest.raises(NumericalError, match="scales are not all finite"):
        hidden_states(Payload(kind="hidden_int8", tensors=tensors), torch.float32)


def test_hidden_states_come_in_the_precision_of_the_head() -> None:
    hidden = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    payload = encode("hidden", hidden, torch.zeros(7, 5))
    assert torch.equal(hidden_states(payload, torch.float32), hidden)
    assert hidden_states(int8(hidden), torch.bfloat16).dtype == torch.bfloat16


def test_what_holds_no_hidden_states_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="a sampled payload holds no hidden states"):
        hidden_states(Payload(kind="sampled"), torch.float32)
    swapped = {"hidden_int8": from_torch(torch.zeros(3)), "scales": from_torch(torch.zeros(3))}
    with pytest.raises(InvalidInput, match=r"this one torch.float32 of shape \(3,\)"):
        hidden_states(Payload(kind="hidden_int8", tensors=swapped), torch.float32)
