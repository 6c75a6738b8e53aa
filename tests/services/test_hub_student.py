"""A student that is named by a hub id: its files lie in the hub's cache, from which each policy takes them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.models import model_folder

PUBLISH = """
import sys
from pathlib import Path
from vaopd.run.snapshots import publish_snapshot
from vaopd.vlm.model import Vlm
student = Vlm.load("org/tiny")
policy = publish_snapshot(Path(sys.argv[1]), 0, student.model.state_dict(), model_files_from=student.path)
print(Vlm.load(policy.path).fingerprint == student.fingerprint)
"""


def test_its_policies_are_whole_model_folders(tmp_path: Path) -> None:
    """The six configurations of the paper name their students so."""
    cached = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(model_folder("student"), cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH, str(tmp_path / "run")],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True\n", done.stderr
    written = {path.name for path in (tmp_path / "run" / "policy" / "v000000").iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"} <= written
