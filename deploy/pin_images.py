"""Pins the base images: IMAGE:TAG becomes IMAGE:TAG@sha256:DIGEST in the Dockerfiles and docker-compose.yml.

`python3 deploy/pin_images.py` asks the registries for today's digests, by skopeo or docker; run it for each release,
and when an image has been rebuilt. tests/unit/test_locks.py refuses a tag without a digest once any image has one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [*sorted((ROOT / "deploy").rglob("*Dockerfile")), ROOT / "docker-compose.yml"]
BASE = re.compile(r"^(FROM |\s*image: )(docker\.io/[^\s:@]+:[^\s@]+)(@sha256:[0-9a-f]{64})?$", re.MULTILINE)


def main() -> int:
    texts = {path: path.read_text() for path in FILES}
    images = sorted({found[2] for text in texts.values() for found in BASE.finditer(text)})
    digests = {image: find_digest(image) for image in images}  # all of them, before a file is changed
    for path, text in texts.items():
        path.write_text(BASE.sub(lambda found: f"{found[1]}{found[2]}@{digests[found[2]]}", text))
    print("\n".join(f"{image}@{digest}" for image, digest in digests.items()))
    return 0


def find_digest(image: str) -> str:
    """Returns the digest of the image's manifest list, which holds for every architecture."""
    if shutil.which("skopeo"):
        command = ["skopeo", "inspect", "--no-tags", "--format", "{{.Digest}}", f"docker://{image}"]
    elif shutil.which("docker"):
        command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", image]
    else:
        raise SystemExit("neither skopeo nor docker is installed; apt install skopeo")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    digest = done.stdout.strip()
    if done.returncode or not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise SystemExit(f"{image}: no digest; no file was changed: {(done.stderr or digest).strip()[-300:]}")
    return digest


if __name__ == "__main__":
    sys.exit(main())
