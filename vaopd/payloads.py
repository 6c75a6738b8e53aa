"""Encodes and decodes the teacher's payload: torch tensors made on the server and read by the trainer.

What travels is `vaopd.types.Tensor`: dtype, shape and little-endian bytes, so bfloat16 arrives bit for bit. Everything
else of a score is numpy.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import get_args

import torch

from vaopd.divergence import top_k_logprobs
from vaopd.errors import InvalidInput, NumericalError
from vaopd.types import ITEMSIZE_BYTES, Payload, PayloadKind, Tensor
from vaopd.wire.common import check_tensor

PAYLOADS: tuple[PayloadKind, ...] = get_args(PayloadKind)
"""The payloads that a teacher of this version can send."""

_NAMES: dict[PayloadKind, tuple[str, ...]] = {
    "none": (),
    "sampled": (),
    "hidden": ("hidden",),
    "hidden_int8": ("hidden_int8", "scales"),
    "hidden_pair": ("hidden", "degraded_hidden"),
    "top_k": ("token_ids", "logprobs", "tail_logprobs"),
}
_INT8_MAX = 127


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Returns the values as a CPU tensor that shares the bytes: read or copy it, but don't write into it.

    Raises InvalidInput when the bytes don't fit dtype and shape.
    """
    check_tensor(tensor.dtype, tensor.shape, tensor.data)
    dtype = getattr(torch, tensor.dtype)
    if not tensor.data:
        return torch.empty(tensor.shape, dtype=dtype)
    with warnings.catch_warnings():
        # torch warns that the bytes are read-only; copying gigabytes only to silence it would be the wrong cure.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(tensor.data, dtype=dtype).reshape(tensor.shape)


def from_torch(tensor: torch.Tensor) -> Tensor:
    """Returns the bytes of a tensor from any device; those of a CPU tensor are shared, so don't write into it.

    Raises InvalidInput for a dtype that doesn't travel.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEMSIZE_BYTES:
        raise InvalidInput(f"tensor dtype {dtype} doesn't travel; use one of {', '.join(ITEMSIZE_BYTES)}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # Not copied: the teacher's device waits for the thread that is here, and a forward's payload may be 100 MB.
    data = flat.view(torch.uint8).numpy().data
    return Tensor(dtype=dtype, shape=tuple(tensor.shape), data=data)  # type: ignore[arg-type]


def compute(
    kind: PayloadKind,
    hidden: torch.Tensor,
    head: torch.Tensor,
    *,
    top_k: int,
    degraded_hidden: torch.Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int = 1024,
) -> dict[str, torch.Tensor]:
    """Returns the tensors by name of M response tokens' payload, from hidden states (M, D) and the LM head (V, D).

    They stay on the device of the hidden states, and nothing here waits for it. top_k: of that payload.
    degraded_hidden: (M, D), for "hidden_pair". vocab_size: V, where the head has rows of padding beyond it.
    """
    if kind == "hidden":
        return {"hidden": hidden}
    if kind == "hidden_pair":
        assert degraded_hidden is not None, "hidden_pair is made of both views"
        return {"hidden": hidden, "degraded_hidden": degraded_hidden}
    if kind == "hidden_int8":
        return dict(zip(_NAMES[kind], _quantise(hidden.float()), strict=True))
    if kind == "top_k":
        tensors = top_k_logprobs(hidden, head, top_k, vocab_size=vocab_size, chunk_tokens=chunk_tokens)
        return dict(zip(_NAMES[kind], tensors, strict=True))
    return {}


def pack(kind: PayloadKind, tensors: Mapping[str, torch.Tensor]) -> Payload:
    """Makes the payload of the tensors that `compute` returned."""
    return Payload(kind=kind, tensors={name: from_torch(tensors[name]) for name in _NAMES[kind]})


def decode(payload: Payload) -> dict[str, torch.Tensor]:
    """Returns a payload's tensors by name (see `vaopd.types.Payload`).

    Raises InvalidInput when one is missing or misshapen.
    """
    expected = _NAMES[payload.kind]
    if set(payload.tensors) != set(expected):
        raise InvalidInput(
            f"a {payload.kind} payload holds tensors {sorted(expected)}, this one {sorted(payload.tensors)}"
        )
    tensors = {name: to_torch(payload.tensors[name]) for name in expected}
    if len({len(tensor) for tensor in tensors.values()}) > 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise InvalidInput(f"the payload's tensors have different numbers of tokens: {shapes}")
    return tensors


def _quantise(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds to 8 bits: (M, D) -> (M, D) int8 and scales (M,), value ≈ int8·scale, off by at most max|row| / 254."""
    scales = wide.abs().amax(-1) / _INT8_MAX if wide.numel() else wide.new_zeros(len(wide))
    divisors = torch.where(scales > 0, scales, 1.0)  # a row of zeros stays one
    rows = (wide / divisors[:, None]).round_().clamp_(-_INT8_MAX, _INT8_MAX)
    return rows.to(torch.int8), scales


def hidden_states(payload: Payload, dtype: torch.dtype) -> torch.Tensor:
    """Returns the original view's hidden states (M, D) of any of the hidden payloads, in the head's `dtype`.

    Raises InvalidInput for another payload or other dtypes and shapes, NumericalError for scales that aren't finite.
    """
    tensors = decode(payload)
    if "hidden" in tensors:
        return tensors["hidden"].to(dtype)
    if payload.kind != "hidden_int8":
        raise InvalidInput(f"a {payload.kind} payload holds no hidden states; ask for a hidden payload")
    rows, scales = tensors["hidden_int8"], tensors["scales"]
    if rows.dtype != torch.int8 or rows.ndim != 2 or scales.dtype != torch.float32 or scales.ndim != 1:
        raise InvalidInput(
            f"a hidden_int8 payload holds int8 rows (M, D) and float32 scales (M,), this one {rows.dtype} of shape "
            f"{tuple(rows.shape)} and {scales.dtype} of shape {tuple(scales.shape)}"
        )
    if not (torch.isfinite(scales) & (scales >= 0)).all():
        raise NumericalError("the payload's scales are not all finite and at least 0; the teacher sent damaged numbers")
    return (rows * scales[:, None]).to(dtype)
