"""Runs the numeric tests with the kernels of other processors: python -m tests.numerics [PYTEST ARGUMENT ...]

torch, oneDNN and MKL choose their kernels by what the processor can do, and these differ in the order of their sums and
in their exp. Each setting forbids the wider ones, in a process of its own; a test that fails in one of them has a
tolerance that a processor printed (see tests/support/tolerance.py), or a real error that one kernel hides.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "this processor's own": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "no AVX in torch": {"ATEN_CPU_CAPABILITY": "default"},
    "SSE4.1 everywhere": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",  # MKL's own sums, in the order that every x86 processor has
    },
}
_ROOT = Path(__file__).parents[1]
_WORKERS = ("--numprocesses", "2", "--dist", "loadfile")


def main(arguments: list[str]) -> int:
    """Returns 1 when a test fails under any of the settings. Everything is run, also after a failure."""
    own = _own_capability()
    failed = []
    for name, environment in SETTINGS.items():
        if environment.get("ATEN_CPU_CAPABILITY") == "avx2" and own not in ("AVX2", "AVX512"):
            print(f"{name}: skipped, this processor has {own} only", flush=True)
            continue
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-m", "numeric and not slow", *_WORKERS, *arguments]
        run = subprocess.run(
            command,
            cwd=_ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if run.returncode:
            failed.append(name)
            print(run.stdout)
        settings = " ".join(f"{key}={value}" for key, value in environment.items()) or f"torch uses {own}"
        last = run.stdout.strip().splitlines()[-1].strip("= ")
        print(f"{name} ({settings}): {last}; {time.monotonic() - began:.0f} s", flush=True)
    return 1 if failed else 0


def _own_capability() -> str:
    """AVX512, AVX2, DEFAULT or another architecture's: what torch chooses by itself."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    environment = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
