"""The cards of a host: those that nvidia-smi shows, those that a plan assumes, those that `--gpus` gives to a role."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vaopd.config import Config
from vaopd.errors import ConfigError
from vaopd.vlm.memory import MARGIN

ROLES = ("teacher", "rollout", "trainer")
H100_GIB = 79.1
BY_HAND = "; place the processes by --gpus ROLE=DEVICES"
_DEVICE = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")
_ASSUMED = re.compile(r"(\d+)(?:x(\d+(?:\.\d*)?))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A GPU: its number as nvidia-smi counts, its memory, and the driver's version where it is known."""

    index: int
    gib: float
    name: str = "GPU"
    driver: str = ""

    @property
    def usable_gib(self) -> float:
        """The memory without the margin."""
        return self.gib * (1 - MARGIN)


def list_cards() -> list[Card]:
    """Returns the host's NVIDIA cards, those in CUDA_VISIBLE_DEVICES if that is set; none without a driver."""
    fields = "index,memory.total,name,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_cards(done.stdout, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_cards(text: str, *, visible: str | None) -> list[Card]:
    """Reads nvidia-smi's lines, MiB in the second field. Raises ConfigError unless `visible` lists numbers.

    >>> parse_cards("0, 81559, NVIDIA H100 80GB HBM3, 580.159.04", visible=None)[0].name
    'NVIDIA H100 80GB HBM3'
    """
    cards = []
    for line in text.splitlines():
        index, mib, name, driver = (part.strip() for part in line.split(",", 3))
        if mib.isdigit():  # "[N/A]" for a card without memory of its own
            cards.append(Card(index=int(index), gib=int(mib) / 1024, name=name, driver=driver))
    if visible is None:
        return cards
    wanted = [part.strip() for part in visible.split(",") if part.strip()]
    if strange := [part for part in wanted if not part.isdigit()]:
        raise ConfigError(f"CUDA_VISIBLE_DEVICES names {strange[0]!r}, not a number{BY_HAND}")
    by_index = {card.index: card for card in cards}
    return [by_index[int(part)] for part in wanted if int(part) in by_index]


def assume_cards(text: str) -> list[Card]:
    """Reads NUMBERxGIB, with commas where cards differ: cards to plan for, which needn't be here. Raises ConfigError.

    NUMBER alone: of an H100's memory.

    >>> [card.gib for card in assume_cards("1,2x23.6")]
    [79.1, 23.6, 23.6]
    """
    sizes: list[float] = []
    for part in text.split(","):
        match = _ASSUMED.fullmatch(part.strip())
        if match is None or not (gib := float(match[2] or H100_GIB)):
            raise ConfigError(
                f"--cards {text!r} is not NUMBER or NUMBERxGIB, such as 8 or 8x79.1, nor several with commas"
            )
        sizes += [gib] * int(match[1])
    return [Card(index=index, gib=gib, name="assumed") for index, gib in enumerate(sizes)]


def parse_gpus(values: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Reads the values of `--gpus`; a role given several times has as many processes. Raises ConfigError.

    >>> parse_gpus(["teacher=0,1", "rollout=2", "rollout=3"])
    {'teacher': ('0,1',), 'rollout': ('2', '3')}
    """
    placed: dict[str, tuple[str, ...]] = {}
    for value in values:
        role, separator, devices = value.partition("=")
        if not separator or role not in ROLES:
            raise ConfigError(f"--gpus {value!r} is not of the form ROLE=DEVICES with ROLE out of {', '.join(ROLES)}")
        names = [name.strip() for name in devices.split(",")] if devices.strip() else []  # none: a process on the CPU
        if strange := next((name for name in names if not _DEVICE.fullmatch(name) or names.count(name) > 1), None):
            fault = "is given twice" if names.count(strange) > 1 else "is neither a number nor GPU-…"
            raise ConfigError(
                f"--gpus {value}: {strange!r} {fault}; list each device once, as nvidia-smi numbers them, e.g. "
                f"--gpus {role}=0,1"
            )
        placed[role] = (*placed.get(role, ()), ",".join(names))
    if len(placed.get("trainer", ())) > 1:
        raise ConfigError(
            f"--gpus trainer is given {len(placed['trainer'])} times; it is one process or one group of ranks: "
            f"--gpus trainer={','.join(placed['trainer'])}, with --set trainer.processes"
        )
    return placed


def count_worker_cards(config: Config) -> int:
    """Returns on how many cards one rollout worker runs: vLLM's tensor times pipeline parallelism."""
    options = getattr(config.rollout, "engine_options", {})
    return int(options.get("tensor_parallel_size", 1)) * int(options.get("pipeline_parallel_size", 1))


def check_gpus(config: Config, gpus: Mapping[str, Sequence[str]], *, with_teacher: bool) -> None:
    """Raises ConfigError for chosen devices that no process would use, and for a role without any beside the others."""
    if not any(value for values in gpus.values() for value in values):
        return
    for devices in gpus.get("trainer", ()):
        if config.trainer.processes < (there := devices.count(",") + 1):
            raise ConfigError(
                f"--gpus trainer={devices}: trainer.processes = {config.trainer.processes} leaves "
                f"{there - config.trainer.processes} of {there} devices idle; --set trainer.processes={there}, or give "
                "fewer"
            )
    workers, each = gpus.get("rollout", ()), count_worker_cards(config)
    if len(workers) > config.rollout.workers:
        raise ConfigError(
            f"--gpus rollout is given {len(workers)} times, and rollout.workers = {config.rollout.workers}: the others "
            f"would stay idle; --set rollout.workers={len(workers)}, or give fewer"
        )
    for devices in workers:
        if devices and (there := devices.count(",") + 1) != each:
            raise ConfigError(
                f"--gpus rollout={devices}: a worker runs on {each} (rollout.engine_options.tensor_parallel_size), and "
                f"{there} {'is' if there == 1 else 'are'} given; --gpus rollout=DEVICE for each worker, or --set "
                f"rollout.engine_options.tensor_parallel_size={there}"
            )
    roles = {"rollout", "trainer", *(["teacher"] if with_teacher and config.teacher.device_map != "cpu" else [])}
    if missing := sorted(roles - set(gpus)):
        raise ConfigError(
            f"--gpus places {', '.join(gpus)} alone: {' and '.join(missing)} would take card 0, whatever else is on "
            f"it; add {' '.join(f'--gpus {role}=DEVICES' for role in missing)}, or use --gpus auto"
        )
