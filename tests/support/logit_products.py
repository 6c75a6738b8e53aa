"""Counts the matrix products of a block, and the widths that they have."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LogitProducts(TorchDispatchMode):
    """`count` products so far; `widths`: the longest side of each, which is the vocabulary's."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.widths: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.count += 1
            self.widths.add(max(side for factor in args for side in factor.shape))
        return func(*args, **(kwargs or {}))
