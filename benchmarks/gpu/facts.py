"""What the card does by itself: products, copies, and whether a process may fork after torch was asked for devices."""

from __future__ import annotations

import os
import subprocess
import sys

import timing
import torch

from benchmarks.gpu.measure import GIB, Check, measure_s

# A process asks torch for an accelerator, then forks a child that uses it, as vLLM's engine core may be started.
FORK = """
import os, torch
torch.accelerator.is_available()
pid = os.fork()
if pid == 0:
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        print(str(error)[:80], flush=True)
        os._exit(3)
    os._exit(0)
print("child ends with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def run(check: Check) -> None:
    machine = torch.__version__
    check.tell("torch", f"{machine}, CUDA {torch.version.cuda}")
    if not timing.ON_GPU:
        return
    found = torch.cuda.get_device_properties(0)
    check.tell(
        "device",
        f"{found.name}, {found.total_memory / GIB:.1f} GiB, {found.multi_processor_count} SMs, {os.cpu_count()} cores, "
        f"driver {read_driver()}",
        gib=found.total_memory / GIB,
    )
    fork(check)
    left, right = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / measure_s(lambda: left @ right, repeats=10, warm=3)
    check.tell("bf16 product, 8192", f"{rate / 1e12:.0f} TFLOP/s", target="≥ 700", ok=rate > 700e12, tflops=rate / 1e12)
    source = torch.empty(2 * GIB, device="cuda", dtype=torch.uint8)
    copy = torch.empty_like(source)
    rate = 2 * source.numel() / measure_s(lambda: copy.copy_(source), repeats=10, warm=3)
    check.tell("copy on the device", f"{rate / 1e12:.2f} TB/s", target="≥ 2.7", ok=rate > 2.7e12, tb_s=rate / 1e12)
    part, pageable = source[: GIB // 2], torch.empty(GIB // 2, dtype=torch.uint8)
    for name, host in (("pageable", pageable), ("pinned", pageable.pin_memory())):
        up = part.numel() / measure_s(lambda host=host: part.copy_(host)) / 1e9
        down = part.numel() / measure_s(lambda host=host: host.copy_(part)) / 1e9
        check.tell(f"to the device and back, {name}", f"{up:.1f} / {down:.1f} GB/s", up_gb_s=up, down_gb_s=down)


def fork(check: Check) -> None:
    for name, value in (("torch's own check", "0"), ("the NVML check", "1")):
        environment = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": value}
        done = subprocess.run(
            [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, env=environment, check=False
        )
        said = " ".join(done.stdout.split())[-120:]
        right = "ends with 0" in said
        # The product sets the NVML check (vaopd/vlm/vllm_start.py); the other line shows why.
        target = "the child ends with 0" if value == "1" else ""
        check.tell(f"fork after {name}", said, target=target, ok=right if value == "1" else None)


def read_driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError as error:
        return f"unknown ({error})"
    return done.stdout.splitlines()[0] if done.stdout else "unknown"
