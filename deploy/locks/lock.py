"""Resolves the profiles `cpu` and `gpu` with uv: versions of all packages that are known to go together.

`python deploy/locks/lock.py` writes cpu.txt and gpu.txt beside this file, each with its date; `--check` resolves both
again with the versions in them, by the packages' metadata alone, and exits with 1 when that fails or gives another
list. The files hold for Python 3.11 to 3.13 and are used as constraints: pip install -c deploy/locks/gpu.txt '.[gpu]'.

Environment: PIP_FIND_LINKS and TORCH_INDEX, where torch's CPU build is found (see deploy/setup.sh).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
EXTRAS = {"cpu": ("cpu", "dev"), "gpu": ("gpu",)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 for a lock that isn't valid")
    check = parser.parse_args().check
    failed = False
    for profile in EXTRAS:
        lock = FOLDER / f"{profile}.txt"
        found, error = resolve(profile, constraints=lock if check else None)
        if error:
            print(f"{lock.relative_to(ROOT)} can't be resolved:\n{error}", file=sys.stderr)
        elif not check:
            header = f"# {', '.join(EXTRAS[profile])}: resolved on {date.today()} by deploy/locks/lock.py\n"
            lock.write_text(header + "\n".join(found) + "\n")
            print(f"{lock.relative_to(ROOT)}: {len(found)} packages")
        elif differing := sorted(strip_markers(found) ^ strip_markers(read(lock))):
            error = f"differs in {', '.join(differing)}; make locks"
            print(f"{lock.relative_to(ROOT)} {error}", file=sys.stderr)
        failed = failed or bool(error)
    return int(failed)


def read(lock: Path) -> list[str]:
    """Returns a lock's requirements, with their markers."""
    return [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]


def strip_markers(requirements: list[str]) -> set[str]:
    """Returns NAME==VERSION of each. uv words the markers in another way when it starts from constraints."""
    return {line.partition(" ;")[0] for line in requirements}


def resolve(profile: str, *, constraints: Path | None) -> tuple[list[str], str]:
    """Returns the profile's packages, pinned, and uv's message if there is no solution."""
    uv = shutil.which("uv", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if uv is None:
        return [], "uv is not installed; pip install uv"
    with tempfile.TemporaryDirectory(prefix="vaopd-lock-") as name:
        output = Path(name) / "lock.txt"
        command = [uv, "pip", "compile", "pyproject.toml", "--output-file", str(output), "--quiet"]
        command += ["--universal", "--python-version", "3.11", "--no-header", "--no-annotate"]
        for extra in EXTRAS[profile]:
            command += ["--extra", extra]
        if links := os.environ.get("PIP_FIND_LINKS"):
            command += ["--find-links", links]
        if profile == "cpu" and (index := os.environ.get("TORCH_INDEX")):
            command += ["--index", index, "--index-strategy", "unsafe-best-match"]
        if constraints is not None:
            command += ["--constraint", str(constraints)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        return (output.read_text().splitlines(), "") if done.returncode == 0 else ([], done.stderr)


if __name__ == "__main__":
    sys.exit(main())
