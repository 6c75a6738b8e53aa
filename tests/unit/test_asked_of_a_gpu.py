"""What a GPU is asked to do, seen on fake tensors: they name a device, and have neither memory nor numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vaopd.config import TrainerConfig
from vaopd.divergence.head import head_logits
from vaopd.divergence.products import add_product, multiply
from vaopd_trainer.optimizer import make_optimizer


class Products(TorchDispatchMode):
    """The matrix products, each with the shapes of its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, list[int], list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket == torch.ops.aten.mm:
            self.asked.append((func._overloadname, list(args[0].shape), list(args[1].shape)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def asked() -> Iterator[list[tuple[str, list[int], list[int]]]]:
    with FakeTensorMode(), Products() as products:
        yield products.asked


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


def test_logits_are_float32_sums_as_wide_as_the_stored_head(asked: list[Any]) -> None:
    """150 ids in a table of 192 rows. "dtype" is the product that writes other numbers than its factors'."""
    logits = head_logits(fake(3, 8), fake(192, 8), 150)
    assert asked == [("dtype", [3, 8], [8, 192])]
    assert (logits.shape, logits.dtype, logits.stride()) == ((3, 150), torch.float32, (192, 1))


def test_gradients_of_logits_are_float32_sums(asked: list[Any]) -> None:
    slope, total = fake(3, 192), fake(192, 8, dtype=torch.float32)
    assert multiply(slope, fake(192, 8), torch.float32).dtype == torch.float32
    add_product(total, slope.T, fake(3, 8), first=True)
    assert asked == [("dtype", [3, 192], [192, 8]), ("dtype_out", [192, 3], [3, 8])]


def test_a_step_of_adamw_is_one_kernel(asked: list[Any]) -> None:
    weight = torch.nn.Parameter(fake(3, dtype=torch.float32))
    assert make_optimizer([weight], TrainerConfig(steps=1)).param_groups[0]["fused"] is True
