"""The researcher's way, from JSON Lines of her own to the dry run of a push: examples/own_run.sh, as it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_from_data_of_one_s_own_to_a_model_for_others(tmp_path: Path) -> None:
    """Plain transformers and plain vLLM load the model in the product's own environment."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'services'}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [ROOT / "examples" / "own_run.sh", tmp_path / "own"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^transformers: \S", done.stdout, re.M)
    assert re.search(r"^vLLM: \S", done.stdout, re.M)
    assert re.search(
        r"files, [\d,]+ bytes, would go to https://huggingface.co/YOUR_NAME/own; nothing was sent$", done.stdout.strip()
    )
    assert "columns: text = prompt, images = picture, answer = label" in done.stderr
    assert json.loads((tmp_path / "own" / "accuracy.json").read_text())["prompts"] == 8
    for name in ("report.html", "model/README.md", "model/model.safetensors"):
        assert (tmp_path / "own" / "runs" / "own" / name).is_file()
