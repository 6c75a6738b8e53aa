"""Makes `import torchvision` work beside a CPU build of torch.

PyPI's x86 torchvision is a CUDA build. Beside a CPU torch its C++ library can't be loaded, and the Python part then
fails at the two operators that it registers unconditionally, `torchvision::nms` and `torchvision::qnms`. transformers
needs only the Python part (the image and video processors of Qwen3-VL), so declaring these two schemas is enough. A
torchvision that works (a CUDA torch, or PyTorch's own CPU index) is left alone. Where it is needed, `deploy/setup.sh`
lets each Python of the environment call `install`, so that any program there can import transformers and vLLM.
Elsewhere, call `ensure_torchvision()` before using a processor.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

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
    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None or _can_load_library(Path(spec.origin).parent):
        return
    for name, schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Calls `ensure_torchvision` when torchvision is about to be imported, and leaves the import to the others."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "torchvision":
            ensure_torchvision()


def install() -> None:
    """Lets any later `import torchvision` of this process work; a .pth file calls it at every start of Python."""
    sys.meta_path.insert(0, _BeforeTorchvision())


def is_installed() -> bool:
    """Returns whether this Python called `install` at its start."""
    return any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path)


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
