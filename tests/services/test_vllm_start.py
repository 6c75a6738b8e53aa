"""The order in which a process sets variables, asks torch for devices and starts vLLM; vLLM itself is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Records the variables at every question for devices, and when vLLM would start its processes. torch is made to have
# CUDA, so that the GPU's branches are taken.
RECORD = """
import importlib.machinery, json, os, sys, types
import torch

NAMES = ("VLLM_WORKER_MULTIPROC_METHOD", "PYTORCH_NVML_BASED_CUDA_CHECK")
order = []

def record(what, answer):
    def call(*arguments, **keywords):
        order.append([what, [os.environ.get(name) for name in NAMES]])
        return answer
    return call

for module in (torch.cuda, torch.accelerator):
    module.is_available = record("ask", True)
    module.device_count = record("ask", 1)
torch.cuda._lazy_init = record("ask", None)

class LLM:
    def __init__(self, **options):
        record("start", None)()
        print(json.dumps(order))
        sys.exit(0)

vllm = types.ModuleType("vllm")
vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
vllm.LLM = LLM
sys.modules["vllm"] = vllm
for name in ("entrypoints", "entrypoints.cli", "entrypoints.cli.serve", "utils", "utils.argparse_utils"):
    sys.modules[f"vllm.{name}"] = types.ModuleType(name)
sys.modules["vllm.entrypoints.cli.serve"].cmd_init = LLM
sys.modules["vllm.utils.argparse_utils"].FlexibleArgumentParser = None
from vaopd.config import load_config, load_service_config
config = load_config("configs/tiny.toml")
"""
STARTS = {
    "rollout": "from vaopd.sampling.build import build_engine; build_engine(config, worker='w')",
    "teacher": ("from vaopd_teacher.engines.load import load; load(config, load_service_config(sys.argv[1]).teacher)"),
    "server": "from vaopd.vlm.vllm_start import serve; serve(config.student.model, host='', port=0, name='')",
}


@pytest.mark.parametrize("role", STARTS)
@pytest.mark.parametrize("chosen", [{}, {"VLLM_WORKER_MULTIPROC_METHOD": "forkserver"}], ids=["default", "chosen"])
def test_no_device_is_asked_for_before_forks_are_safe(role: str, chosen: dict[str, str], tmp_path: Path) -> None:
    service = tmp_path / "service.toml"
    service.write_text('[teacher.engine]\nbackend = "vllm"\n')
    unset = ("VLLM_", "PYTORCH_", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    root = Path(__file__).parents[2]
    paths = os.pathsep.join((str(root), str(root / "services")))
    done = subprocess.run(
        [sys.executable, "-c", f"{RECORD}\n{STARTS[role]}", str(service)],
        env=environment | {"PYTHONPATH": paths} | chosen,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    order = json.loads(done.stdout.splitlines()[-1])
    assert [what for what, _ in order][-1] == "start"
    assert len(order) > 1  # devices were asked for
    method = chosen.get("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    assert {tuple(variables) for _, variables in order} == {(method, "1")}
