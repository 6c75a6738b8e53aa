"""Makes `import torchvision` work beside a CPU build of torch: call `ensure_torchvision()` before using a processor.

PyPI's x86 torchvision is a CUDA build. Beside a CPU torch its C++ library can't be loaded, and the Python part then
stops at the two operators that it registers unconditionally, `torchvision::nms` and `torchvision::qnms`. transformers
needs only the Python part (the image and video processors of Qwen3-VL), so declaring these two schemas is enough. Where
torchvision is sound (a CUDA torch, or PyTorch's own CPU index), or absent, nothing is done.
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
    """Declare what a torchvision without its C++ library lacks; once per process, again and again does no harm."""
    if "torchvision" in sys.modules:
        return
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _library_loads(Path(spec.origin).parent):
        return
    for name, schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)


def _library_loads(package: Path) -> bool:
    """Whether torchvision's own operators can be had: the very step that `torchvision.extension` takes later."""
    import torch

    for library in package.glob("_C.*"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False
