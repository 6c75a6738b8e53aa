"""Writes the bill of materials (CycloneDX) and the licences of each profile's lock, for a release.

    python deploy/sbom.py FOLDER [--python PYTHON]

Components and digests come from deploy/locks, licences from the packages' metadata where PYTHON has the same version
installed. Writes FOLDER/sbom-PROFILE.cdx.json and FOLDER/licences-PROFILE.tsv, and says how many licences it could not
read. Needs cyclonedx-bom (`make sbom` installs it apart).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCKS = {"cpu": ("cpu", "torch-cpu"), "gpu": ("gpu",)}
TOOL = (sys.executable, "-m", "cyclonedx_py")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=sys.executable, help="of the environment whose metadata are read")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    licences = {_key(part): part["licenses"] for part in _run("environment", arguments.python) if part.get("licenses")}
    for profile, names in LOCKS.items():
        target = arguments.folder / f"sbom-{profile}.cdx.json"
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as lock:
            lock.write("".join((ROOT / "deploy" / "locks" / f"{name}.txt").read_text() for name in names))
            lock.flush()
            parts = _run("requirements", "--pyproject", str(ROOT / "pyproject.toml"), lock.name, target=target)
        bill = json.loads(target.read_text())
        for part in bill["components"]:
            if found := licences.get(_key(part)):
                part["licenses"] = found
        target.write_text(json.dumps(bill, indent=1) + "\n")
        rows = sorted((part["name"], part["version"], describe(part.get("licenses"))) for part in bill["components"])
        table = arguments.folder / f"licences-{profile}.tsv"
        table.write_text("".join("\t".join(row) + "\n" for row in rows))
        counts = Counter(licence for _, _, licence in rows)
        print(f"{target.name}: {len(parts)} packages, {counts.pop('', 0)} of unknown licence or not installed here")
        for licence, number in counts.most_common():
            print(f"  {number:4} {licence}")
    return 0


def describe(licences: list[dict[str, Any]] | None) -> str:
    """Returns the licence as an SPDX expression or by its name; empty if it is unknown."""
    said = [
        each.get("expression") or each["license"].get("id") or each["license"].get("name") for each in licences or ()
    ]
    spdx = [each.get("expression") or each["license"].get("id") for each in licences or ()]
    said = [text and text.rpartition(" :: ")[2] for text in said]  # a classifier
    return " AND ".join(dict.fromkeys(filter(None, spdx))) or " / ".join(dict.fromkeys(filter(None, said)))


def _key(part: dict[str, Any]) -> tuple[str, str]:
    return part["name"].lower().replace("_", "-").replace(".", "-"), part["version"]


def _run(*arguments: str, target: Path | None = None) -> list[dict[str, Any]]:
    command = [*TOOL, *arguments, "--output-reproducible", "--of", "JSON", "-o", str(target or "-")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    bill = json.loads(target.read_text() if target else done.stdout)
    return list(bill["components"])


if __name__ == "__main__":
    sys.exit(main())
