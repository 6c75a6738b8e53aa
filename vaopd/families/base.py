"""What the adapters of all families hand to `vaopd.vlm`."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedImage:
    """One image as the vision tower reads it; compared by identity, so that sharing an object means sharing the work.

    pixel_values: whatever the family's vision tower takes, rows being patches; grid: (t, h, w) in patches;
    num_tokens: placeholder tokens that the prompt holds for it; key: content and view by name, for caches, if known.
    """

    pixel_values: torch.Tensor
    grid: tuple[int, int, int]
    num_tokens: int
    key: str | None = None
