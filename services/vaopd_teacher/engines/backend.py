"""A loaded teacher as the server sees it; its weights are held by transformers in this process, or by vLLM.

The server reads prompts with `reader`, hands prepared groups to `engine`, and describes the rest to its clients.
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
    """`payloads`: the kinds that it can send; `columns`: those it computes on request (`vaopd.columns.COLUMNS`).

    `head` (V, D): None when the weights are out of reach, as under vLLM. `close` ends the backend's processes.
    """

    reader: PromptReader
    engine: Engine
    revision: str
    dtype: str
    payloads: tuple[PayloadKind, ...]
    columns: tuple[str, ...] = ()
    head: torch.Tensor | None = None
    vision_cache: VisionCache | None = None
    close: Callable[[], None] = lambda: None
