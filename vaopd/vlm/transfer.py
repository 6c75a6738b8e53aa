"""Copies tensors from the host to a device without waiting for it.

A copy from ordinary memory waits until the device has done all earlier work. From pinned memory it is queued like a
kernel; torch keeps the pinned buffer until the copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the host's tensor on `device`, converted on the host; the copy is queued, where the device allows it."""
    return upload_rows([tensor], device, dtype) if tensor.device.type == "cpu" else tensor.to(device, dtype)


def upload_rows(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the host's tensors one after the other along the first axis, on `device`, by one copy."""
    dtype = dtype or tensors[0].dtype
    if device.type != "cuda":
        joined = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        return joined.to(device, dtype)
    rows = sum(len(tensor) for tensor in tensors)
    pinned = torch.empty((rows, *tensors[0].shape[1:]), dtype=dtype, pin_memory=True)
    at = 0
    for tensor in tensors:
        pinned[at : at + len(tensor)].copy_(tensor)
        at += len(tensor)
    return pinned.to(device, non_blocking=True)
