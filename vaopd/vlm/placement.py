"""Checks that a loaded model's weights are where they compute: on the devices, not on the host's memory or disk.

accelerate offloads silently what finds no room, and fetches it for each layer of each forward. Weights that it holds
back are on `meta`: an LM head there, which is read outside a forward, has no numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vaopd.errors import ConfigError

_GIB = 2**30


def check_placement(model: torch.nn.Module, name: str, *, devices_bytes: Sequence[int] | None = None) -> None:
    """Raises ConfigError, with the memory that is needed and there, when weights of the model have no place.

    devices_bytes: each device's whole memory, default that of the GPUs that this process sees.
    """
    weights = list(model.parameters())  # tied ones count once
    absent = [weight for weight in weights if weight.is_meta]
    if not absent:
        return
    if devices_bytes is None:
        devices_bytes = [
            torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())
        ]
    needed, lacking = (sum(weight.numel() * weight.element_size() for weight in part) for part in (weights, absent))
    there = " + ".join(f"{size / _GIB:.1f}" for size in devices_bytes) + " GiB" if devices_bytes else "no GPU"
    raise ConfigError(
        f"{name} needs {needed / _GIB:.1f} GiB for its weights in {str(weights[0].dtype).removeprefix('torch.')}, and "
        f"{lacking / _GIB:.1f} GiB of them found no room; this process sees {there}. Give it more devices (`vaopd "
        "up --gpus teacher=0,1`), free those that it has, or take a smaller model or dtype"
    )
