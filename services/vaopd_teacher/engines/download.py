"""Copies tensors from a GPU to the host beside the work that follows, into pinned memory, on a stream of its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor


class Download:
    """Several sets of tensors on their way to the host. Tensors on the host stay as they are."""

    def __init__(self, *sets: Mapping[str, Tensor]) -> None:
        self._sets = tuple(map(dict, sets))
        self._event: torch.cuda.Event | None = None
        devices = {tensor.device for found in sets for tensor in found.values() if tensor.is_cuda}
        if not devices:
            return
        (device,) = devices  # all come from the LM head's
        stream = _find_stream(device)
        self._sets = tuple({name: tensor.contiguous() for name, tensor in found.items()} for found in sets)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._sets = tuple({name: _copy(tensor, stream) for name, tensor in found.items()} for found in self._sets)
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(stream)

    def wait(self) -> tuple[dict[str, Tensor], ...]:
        """Returns the sets on the host. Raises torch's errors of the work that the copies waited for."""
        if self._event is not None:
            self._event.synchronize()
        return self._sets


def _copy(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    tensor.record_stream(stream)  # its memory isn't given to others before the copy is done
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


@functools.cache
def _find_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
