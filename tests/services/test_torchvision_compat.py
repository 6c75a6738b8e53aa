"""`ensure_torchvision` lets transformers' processors import beside a CPU torch, and leaves a sound one alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> str:
    """Each case needs an interpreter of its own: an import that has happened can't be taken back."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_qwen3_vl_processors_import_after_it() -> None:
    code = """
from vaopd.vlm.torchvision_compat import ensure_torchvision
ensure_torchvision()
ensure_torchvision()  # a second call changes nothing
from transformers import AutoProcessor, Qwen3VLVideoProcessor
print(Qwen3VLVideoProcessor.__name__)
"""
    assert run_python(code) == "Qwen3VLVideoProcessor"


def test_set_up_s_line_lets_any_program_import_it(tmp_path: Path) -> None:
    """As a .pth file in the environment, which each Python reads at its start."""
    (line,) = re.findall(r"^  echo '(import .*)' \\$", (ROOT / "deploy" / "setup.sh").read_text(), re.M)
    (tmp_path / "vaopd-torchvision.pth").write_text(line)
    code = f"""
import site, sys
site.addsitedir({str(tmp_path)!r})
assert "torch" not in sys.modules  # it costs nothing until torchvision is imported
import torchvision
from transformers import AutoModelForImageTextToText, Qwen3VLVideoProcessor
print(AutoModelForImageTextToText.__name__)
"""
    assert run_python(code) == "AutoModelForImageTextToText"


def test_nothing_is_declared_beside_a_cuda_build_of_torch() -> None:
    code = """
import torch
torch.version.cuda = "13.0"
from vaopd.vlm.torchvision_compat import ensure_torchvision
ensure_torchvision()
print(hasattr(torch.ops.torchvision, "nms"))
"""
    assert run_python(code) == "False"


def test_nothing_is_declared_where_the_operators_load(tmp_path: Path) -> None:
    """A torchvision whose C++ library loads is sound: any shared library that loads stands for it here."""
    code = f"""
import ctypes.util, pathlib, sys, torch
package = pathlib.Path({str(tmp_path)!r}) / "torchvision"
package.mkdir()
(package / "__init__.py").write_text("")
(package / "_C.so").symlink_to(pathlib.Path(torch.__file__).parent / "lib" / "libc10.so")
sys.path.insert(0, {str(tmp_path)!r})
from vaopd.vlm.torchvision_compat import ensure_torchvision
ensure_torchvision()
print(hasattr(torch.ops.torchvision, "nms"))
"""
    assert run_python(code) == "False"


def test_importing_the_module_does_not_import_torch() -> None:
    code = "import sys, vaopd.vlm.torchvision_compat; print('torch' in sys.modules)"
    assert run_python(code) == "False"
