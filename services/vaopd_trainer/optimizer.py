"""AdamW in float32, torch's own, or with moments of 8 bits each (bitsandbytes): 2 bytes a parameter in place of 8.

The schedule is transformers' `get_cosine_schedule_with_warmup`, whose module would load PEFT and bitsandbytes, too:
half of a trainer's start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vaopd.config import TrainerConfig
from vaopd.errors import ConfigError
from vaopd.process.failures import NO_BITSANDBYTES


def make_optimizer(parameters: Sequence[nn.Parameter], settings: TrainerConfig) -> Optimizer:
    """Returns AdamW over the parameters, which are where the steps will be taken.

    Raises ConfigError for 8 bits without bitsandbytes.
    """
    shared: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw_8bit":
        return _make_8bit(parameters, shared)
    # One pass over parameters, gradients and moments. A CPU keeps the plain form: its runs stay as they were.
    return torch.optim.AdamW(parameters, fused=True if parameters[0].device.type == "cuda" else None, **shared)


def make_schedule(optimizer: Optimizer, *, warmup_steps: int, steps: int) -> LambdaLR:
    """Returns a linear warm-up of the rate, then half a cosine to zero at `steps`."""
    return LambdaLR(optimizer, partial(_compute_factor, warmup_steps=warmup_steps, steps=steps))


def _compute_factor(step: int, *, warmup_steps: int, steps: int) -> float:
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def _make_8bit(parameters: Sequence[nn.Parameter], shared: dict[str, Any]) -> Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(f"{NO_BITSANDBYTES} ({error})") from None

    class CountingAdamW8bit(AdamW8bit):
        """Counts its steps in a tensor, as torch's optimizers do, so that a checkpoint holds and restores the count."""

        def init_state(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
            super().init_state(group, p, gindex, pindex)
            self.state[p]["step"] = torch.tensor(0.0)

        def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
            state = self.state[p]
            count = state["step"]
            state["step"] = int(count)
            super().update_step(group, p, gindex, pindex)
            state["step"] = count.fill_(state["step"])

    optimizer: Optimizer = CountingAdamW8bit(parameters, **shared)
    return optimizer
