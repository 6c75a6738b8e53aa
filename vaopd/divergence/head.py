"""Applies the LM head: the one product that is as wide as the vocabulary, in the shape and precision that GPUs want.

Shapes: m tokens, D hidden size, V logical vocabulary, V_pad ≥ V rows of the head as it is stored.

cuBLAS' fast kernels want rows of 16 bytes, which Qwen's 151 669 logical ids don't give: on a GPU the product is V_pad
wide, and a view leaves out the logits beyond V. Rounding to bfloat16 moves a logit of 16 to 32 by up to 0.06 nats, so a
GPU writes the sums of bfloat16 products in float32. On a CPU the product is V wide and rounded as its inputs are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vaopd.divergence.products import multiply
from vaopd.errors import InvalidInput

ALIGNED_ROWS = 64
"""A head with a multiple of so many rows is aligned for every kernel and dtype; published checkpoints are."""


def head_logits(hidden: Tensor, head: Tensor, vocab_size: int | None = None) -> Tensor:
    """Returns logits (m, V) from hidden states (m, D) and a head (V_pad, D), in float32 (float64 for float64).

    vocab_size: V, default V_pad. The product runs in autocast's precision, or else the inputs'. The result is new and
    may be overwritten, its rows may lie V_pad apart. Not differentiable: for use under `no_grad` or in an
    `autograd.Function`. Raises InvalidInput for a V out of range, and for hidden states that are no matrix.
    """
    vocab_size = count_ids(head, vocab_size)
    if hidden.ndim != 2:
        raise InvalidInput(f"hidden states have shape {tuple(hidden.shape)}; give one row per token, (M, D)")
    kind = hidden.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    dtype = choose_product_dtype(hidden, head, autocast)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        if not is_padded(hidden.device):
            head = head[:vocab_size]
        logits = multiply(hidden.to(dtype), head.to(dtype).T, wide).to(wide)
        return logits.narrow(1, 0, vocab_size)


def count_ids(head: Tensor, vocab_size: int | None, *, of: str = "") -> int:
    """Returns V: `vocab_size`, or all rows of the head. Raises InvalidInput for more of them, or none.

    of: the owner, for the message.
    """
    found = len(head) if vocab_size is None else vocab_size
    if not 1 <= found <= len(head):
        raise InvalidInput(f"vocab_size = {found} is outside [1, {len(head)}], the rows of the {of}head")
    return found


def is_padded(device: torch.device) -> bool:
    """Whether products on this device are as wide as the head is stored."""
    return device.type == "cuda"


def pad_head(head: Tensor) -> Tensor:
    """Returns the head with rows of zeros up to the next multiple of `ALIGNED_ROWS`; itself if there is none to add."""
    missing = -len(head) % ALIGNED_ROWS
    return F.pad(head, (0, 0, 0, missing)) if missing else head


def choose_product_dtype(hidden: Tensor, head: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """Returns the precision of their product, as autocast chooses it, which leaves float64 alone."""
    dtype = torch.promote_types(hidden.dtype, head.dtype)
    return dtype if autocast is None or dtype == torch.float64 else autocast
