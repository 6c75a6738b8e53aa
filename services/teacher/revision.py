"""The teacher's revision: a digest that changes when the weights or their shape change.

It covers each weight's name, shape and dtype as loaded, up to 64 values spread evenly over it, and the configuration.
It does not cover every value (a 32B model would take minutes to read): two checkpoints that differ only between the
sampled values would look alike, which training or merging never yields.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

_SAMPLES = 64
# They say where the files lay and what wrote them, not what the model is.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "_commit_hash")


def revision_of(model: Any) -> str:
    """Hex SHA-256; the same on every host and for every placement of the same weights in the same dtype."""
    digest = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.is_meta:  # offloaded by accelerate: its values are elsewhere
            continue
        flat = weight.detach().reshape(-1)
        places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), _SAMPLES), dtype=torch.float64).long()
        digest.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
