"""Products with the gradient of the logits, whose factors may be bfloat16 and whose sums are float32.

A GPU writes the float32 sums of bfloat16 products as they are; a CPU rounds them like the factors.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def multiply(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """Returns the product, on a GPU with its float32 sums as they are, elsewhere rounded like the factors."""
    if left.is_cuda and left.dtype != wide:
        return torch.mm(left, right, out_dtype=wide)
    return left @ right


def add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Adds a product to `total`, float32 where the factors are bfloat16: bfloat16 sums would stop growing.

    The first one is written instead: on a GPU, filling 1.2 GB with zeros and reading them takes as long as a product.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
    elif first and left.is_cuda:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(left @ right)
    elif left.is_cuda and _can_add_wide(left.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    elif left.is_cuda:
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total += left @ right


@functools.cache
def _can_add_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of halves to a float32 matrix in one call; older ones want halves to add to."""
    total = torch.full((8, 8), 1.0 + 2**-20, device=device)
    ones = torch.ones(8, 8, device=device, dtype=dtype)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 9.0 + 2**-20).all())
