"""The teacher's revision: a digest that changes when the weights or their shape change.

It covers each weight's name, shape and dtype, up to 64 values spread evenly over it, and the configuration. It does not
cover every value (a 32B model would take minutes to read): two checkpoints that differ only between the sampled values
would look alike, which training or merging never yields. A loaded model is read in the dtype it was loaded in, a folder
in that of its files, so their revisions differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from vaopd.errors import ConfigError
from vaopd.vlm.adapters import name_base

_SAMPLES = 64
_SAMPLE_BYTES = 8
# Keys of the configuration that name the files' place and writer, not the model.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "_commit_hash")


def compute_revision(model: Any) -> str:
    """Returns a hex SHA-256 that is equal on every host for the same weights in the same dtype, adapters apart.

    If several ranks share the model, all of them have to call this at the same time.
    """
    digest = _digest_of_config(model.config.to_dict())
    for name, weight in sorted(name_base(model.state_dict()).items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.is_meta:  # offloaded by accelerate: its values are elsewhere
            continue
        flat = (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().reshape(-1)
        places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), _SAMPLES), dtype=torch.float64).long()
        digest.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def compute_folder_revision(folder: Path, *, dtype: str) -> str:
    """Returns a hex SHA-256 of a folder's weights, in any number of files, and of the compute dtype.

    Raises ConfigError when the folder holds no safetensors files.
    """
    digest = _digest_of_config(json.loads((folder / "config.json").read_text()) | {"dtype": dtype})
    found = sorted(entry for path in folder.glob("*.safetensors") for entry in _list_weights(path))
    if not found:
        raise ConfigError(f"{folder} holds no safetensors files; save the model with `save_pretrained`")
    for name, kind, path, start, end in found:
        digest.update(f"{name} {kind}".encode())
        with path.open("rb") as file:
            count = min(-(-(end - start) // _SAMPLE_BYTES), _SAMPLES)
            for index in range(count):
                file.seek(start + index * max(0, end - start - _SAMPLE_BYTES) // max(1, count - 1))
                digest.update(file.read(min(_SAMPLE_BYTES, end - start)))
    return digest.hexdigest()


def _digest_of_config(config: Mapping[str, Any]) -> Any:
    kept = {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())


def _list_weights(path: Path) -> Iterable[tuple[str, str, Path, int, int]]:
    """Yields each weight's name, "shape dtype", file, start and end; a file is header length (8 bytes), JSON, bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, f"{entry['shape']} {entry['dtype']}", path, 8 + length + start, 8 + length + end
