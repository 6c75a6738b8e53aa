"""Makes `import torchvision` work beside a CPU build of torch: call `ensure_torchvision()` before using a processor.

PyPI's x86 torchvision is a CUDA build. Beside a CPU torch its C++ library can't be loaded, and the Python part then
fails at the two operators that it registers unconditionally, `torchvision::nms` and `torchvision::qnms`. transformers
needs only the Python part (the image and video processors of Qwen3-VL), so declaring these two schemas is enough. A
torchvision that works (a CUDA torch, or PyTorch's own CPU index) is left alone.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_SCHEMAS = (
    ("nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ("qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
)


def ensure_torchvision() -> None:
    """Declares the operators that a torchvision without its C++ library lacks. Calling it again changes nothing."""
    if "torchvision" in sys.modules:
        return
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _can_load_library(Path(spec.origin).parent):
        return
    for name, schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)


def _can_load_library(package: Path) -> bool:
    """Returns whether torchvision's operators can be loaded, by the same call that `torchvision.extension` makes."""
    import torch

    for library in package.glob("_C.*"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False
