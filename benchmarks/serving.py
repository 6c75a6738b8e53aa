"""Requests, a server process and percentiles, for the measurements of the teacher service."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from vaopd.types import EncodedImage, ImagePart, Message, ScoreRequest, TextPart
from vaopd.vlm.model import Vlm

ROOT = Path(__file__).parents[1]
TINY_TEACHER = ROOT / "models" / "tiny-teacher"


def group(vlm: Vlm, name: str, *, seed: int, side_px: int, rollouts: int, response_tokens: int) -> ScoreRequest:
    """Makes a prompt group as a trainer sends it, with its own image of noise."""
    rng = np.random.default_rng(seed)
    picture = PIL.Image.fromarray(rng.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8))
    image = encoded(picture)
    parts = (ImagePart(sha256=image.sha256), TextPart(text="What is the perimeter of the triangle?"))
    prompt = vlm.render([Message(role="user", content=parts)], {image.sha256: vlm.prepare_image(picture)})
    words = [i for i in range(vlm.vocab_size) if i not in vlm.vision_token_ids]
    return ScoreRequest(
        group_id=name,
        responses=tuple(rng.choice(words, response_tokens).astype(np.int32) for _ in range(rollouts)),
        images=(image,),
        prompt_token_ids=prompt.token_ids.astype(np.int32),
    )


def encoded(picture: PIL.Image.Image) -> EncodedImage:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return EncodedImage(data=buffer.getvalue())


def tokens_of(request: ScoreRequest) -> int:
    """Counts the tokens that the scheduler charges: both views, the prompt once in each."""
    assert request.prompt_token_ids is not None
    return 2 * (len(request.prompt_token_ids) + sum(len(ids) - 1 for ids in request.responses))


@dataclass(frozen=True)
class Server:
    target: str
    pid: int

    def cpu_s(self) -> tuple[float, float]:
        """Returns the processor time of the busiest thread, the engine's, and of all threads; Linux only."""
        threads = []
        for stat in Path(f"/proc/{self.pid}/task").glob("*/stat"):
            fields = stat.read_text().rpartition(")")[2].split()
            threads.append(sum(int(field) for field in fields[11:13]) / os.sysconf("SC_CLK_TCK"))
        return max(threads), sum(threads)


@contextmanager
def teacher_server(model: Path, *, batch_tokens: int, service: str = "", timeout_s: float = 300.0) -> Iterator[Server]:
    """Runs a server process on a free port of the loopback. `service`: the text of its service file."""
    with tempfile.TemporaryDirectory(prefix="vaopd-benchmark-") as name:
        folder = Path(name)
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        (folder / "service.toml").write_text(service)
        (folder / "run.toml").write_text(
            '[run]\nname = "benchmark"\n[data]\nsource = "unused"\n[student]\nmodel = "unused"\n[trainer]\nsteps = 1\n'
            f'[teacher]\nmodel = "{model}"\ndtype = "{dtype}"\ndevice_map = "{device}"\n'
            f'address = "127.0.0.1:0"\nbatch_tokens = {batch_tokens}\n'
        )
        announce = folder / "address"
        command = [sys.executable, "-m", "vaopd_teacher", "--config", str(folder / "run.toml")]
        command += ["--service", str(folder / "service.toml"), "--announce", str(announce)]
        with (folder / "log").open("w") as output:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + timeout_s
            while not announce.exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the teacher did not start:\n{(folder / 'log').read_text()[-2000:]}")
                time.sleep(0.05)
            yield Server(announce.read_text(), server.pid)
        finally:
            server.terminate()
            try:
                server.wait(90)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(np.array(values), percent))
