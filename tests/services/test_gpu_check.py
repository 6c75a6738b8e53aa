"""`python -m benchmarks.gpu` at toy size on the CPU, where its GPU branches don't run but everything else does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# `up` starts the whole system, which tests/integration/test_up.py does too.
PHASES = {
    "1": ("facts", "teacher", "exact", "attention", "profile", "oom", "vision"),
    "2": ("kl", "train", "publish", "grpc", "prepare"),
}


def check(*arguments: str, timeout_s: float = 300.0, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "services"), os.environ.get("PYTHONPATH", "")))
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        env={name: value for name, value in os.environ.items() if name != "OUT"} | {"PYTHONPATH": paths} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.mark.slow
def test_every_phase_runs_and_parts_are_merged_in_one_file(tmp_path: Path) -> None:
    found: dict[str, dict] = {}
    for phases in PHASES.values():
        done = check("--cpu", *phases, "--results", str(tmp_path / "results"), OUT=str(tmp_path / "copy"))
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads((tmp_path / "results" / "gpu-cpu.json").read_text())["phases"]
        assert "| met |" in done.stdout
    assert list(found) == [phase for phases in PHASES.values() for phase in phases]
    assert found == json.loads((tmp_path / "copy" / "gpu-cpu.json").read_text())["phases"]

    judged = {(phase, line["what"]): line["ok"] for phase in found for line in found[phase]["lines"]}
    assert not [name for name, ok in judged.items() if ok is False]
    # What doesn't depend on the size is judged on a CPU too.
    assert {phase for (phase, _), ok in judged.items() if ok} >= {"teacher", "exact", "attention", "kl", "grpc"}
    # The engine and the plain implementation compute the same log-probs, in float32.
    (compared,) = [line["numbers"] for line in found["teacher"]["lines"] if "max_nats" in line["numbers"]]
    assert 0 < compared["max_nats"] < 1e-4


@pytest.mark.slow
def test_the_full_check_samples_and_scores_with_the_models_of_a_recipe(tmp_path: Path) -> None:
    """Its other phase, `recipe`, is `vaopd up`, too. Its file has a name of its own."""
    done = check("--cpu", "real", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads((tmp_path / "gpu-full-cpu.json").read_text())["phases"]["real"]["lines"]
    assert [line["ok"] for line in lines] == [True, None, True, True, None]
    assert check("--cpu", "real", "facts").returncode == 2


def test_a_phase_that_fails_is_named_and_the_next_one_runs(tmp_path: Path) -> None:
    broken = tmp_path / "sitecustomize.py"
    broken.write_text("import sys\nsys.modules['benchmarks.gpu.exact'] = None\n")
    paths = os.pathsep.join((str(tmp_path), str(ROOT), str(ROOT / "services")))
    done = check("--cpu", "exact", "attention", PYTHONPATH=paths)
    assert done.returncode == 1
    assert "failed: exact" in done.stdout.splitlines()[-1]
    assert "| attention | P 20, R 5…9, K 2: error |" in done.stdout


def test_without_a_gpu_the_command_says_so() -> None:
    done = check("facts", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "torch finds no GPU here; --cpu" in done.stderr


def test_an_unknown_phase_is_named() -> None:
    done = check("vison")
    assert done.returncode == 2
    assert "no phase 'vison'; there are 1, 2, full, facts, teacher" in done.stderr
