"""The tiny models that tests run: the shipped ones where they are, else untrained ones of the same shape."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from vaopd.tiny.build import build_model
from vaopd.tiny.config import find_model
from vaopd.tiny.tokenizer import build_processor
from vaopd.vlm.model import Vlm

LARGEST_LOGIT = 32.0
"""No tiny model's logits come near it: the scale of their rounding where a test sees single log-probs only."""
_SHIPPED = Path(__file__).parents[2] / "models"
# Emptied when the interpreter ends.
_UNTRAINED = tempfile.TemporaryDirectory(prefix="vaopd-untrained-")


def save_untrained(folder: Path, *, name: str = "teacher", seed: int = 0) -> Path:
    """Writes a tiny model with random weights and its processor into `folder`."""
    processor = build_processor()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(find_model(name).size, processor.tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@functools.cache
def model_folder(name: str) -> Path:
    """The folder of "teacher", "student", "teacher-small" or "teacher-large"."""
    shipped = _SHIPPED / f"tiny-{name}"
    if (shipped / "model.safetensors").is_file():
        return shipped
    return save_untrained(Path(_UNTRAINED.name) / name, name=name)


@functools.cache
def tiny_vlm(name: str = "teacher") -> Vlm:
    """The loaded model in float32; shared by the tests of a process, so leave its weights alone."""
    return Vlm.load(model_folder(name), dtype="float32", device_map="cpu")
