"""A loaded teacher as the server sees it, whichever backend holds the weights: transformers in this process, or vLLM.

The server reads prompts with `reader`, hands prepared groups to `engine`, and tells its clients the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vaopd.types import PayloadKind
from vaopd.vlm.prompts import PromptReader
from vaopd_teacher.engines.engine import Engine
from vaopd_teacher.engines.vision_cache import VisionCache


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Backend:
    """`payloads`: what it can send. `head` (V, D): None where the weights are out of reach, as under vLLM."""

    reader: PromptReader
    engine: Engine
    revision: str
    dtype: str
    payloads: tuple[PayloadKind, ...]
    head: torch.Tensor | None = None
    vision_cache: VisionCache | None = None
    close: Callable[[], None] = lambda: None
