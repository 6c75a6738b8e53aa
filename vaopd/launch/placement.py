"""Chooses which cards of this host each process of a run gets, from the memory that each of them needs.

In: the cards, the configuration. Out: devices by role, the settings that go with them, and the reasons in words. The
teacher gets as many cards as its `processes`, if two are left beside them, otherwise as few as hold it; on several it
is split by tensor parallelism. Where four more are left, there are two such teachers: by the measured rates, scoring is
the longest part of a step. Of the others, most go to the trainer, the rest to rollout workers. With one card left, or
none, processes share one. `vaopd.vlm.memory` counts the bytes.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vaopd.config import Config, load_config
from vaopd.errors import ConfigError
from vaopd.vlm import memory
from vaopd.vlm.memory import GIB, MARGIN, Model

ROLES = ("teacher", "rollout", "trainer")
VLLM_SHARE = 0.85
"""vLLM's share of a card of its own (gpu_memory_utilization); it never gets more."""
GROUP_TOKENS = 20_000
"""Tokens of a group for which the trainer gets room where it shares a card: a prompt and four responses of 4096."""
LEFT_BY_REPLICAS = 4
"""Cards that two teachers leave to the others; with fewer there is one."""
IMAGE_PX = 1_048_576
REMEDIES = (
    ("data.max_pixels=1048576",),
    ("trainer.optimizer=adamw_8bit",),
    ("trainer.optimizer=adamw_8bit", "data.max_pixels=1048576"),
    ("student.lora.rank=32", "trainer.learning_rate=1e-5"),
    ("student.lora.rank=32", "trainer.learning_rate=1e-5", "data.max_pixels=1048576"),
)
"""Settings that take less memory, the least change of a run first."""
_BY_HAND = "; place the processes by --gpus ROLE=DEVICES"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """`gpus`: CUDA_VISIBLE_DEVICES by role, one value per process; `overrides`: settings that belong to it.

    `utilization`: vLLM's share of its card.
    """

    gpus: dict[str, tuple[str, ...]]
    overrides: tuple[str, ...]
    reasons: tuple[str, ...]
    utilization: float

    @property
    def flags(self) -> str:
        """The options of `vaopd up` that place the processes in the same way."""
        devices = [f"--gpus {role}={value}" for role, values in self.gpus.items() for value in values]
        return " ".join((*devices, *map("--set {}".format, self.overrides)))


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
        raise ConfigError(f"CUDA_VISIBLE_DEVICES names {strange[0]!r}, not a number{_BY_HAND}")
    by_index = {card.index: card for card in cards}
    return [by_index[int(part)] for part in wanted if int(part) in by_index]


def assume_cards(text: str) -> list[Card]:
    """Reads NUMBERxGIB: cards to plan for, which needn't be here. Raises ConfigError for another form.

    >>> len(assume_cards("8x79.1"))
    8
    """
    number, _, gib = text.partition("x")
    try:
        return [Card(index=index, gib=float(gib), name="assumed") for index in range(int(number))]
    except ValueError:
        raise ConfigError(f"--cards {text!r} is not NUMBERxGIB, such as 8x79.1") from None


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
        placed[role] = (*placed.get(role, ()), devices)
    if len(placed.get("trainer", ())) > 1:
        raise ConfigError(
            f"--gpus trainer is given {len(placed['trainer'])} times; it is one process or one group of ranks: "
            f"--gpus trainer={','.join(placed['trainer'])}, with --set trainer.processes"
        )
    return placed


def _count_adapters(config: Config, student: Model) -> int:
    """Returns the weights of LoRA on all layers: an upper bound where `target_modules` names some."""
    lora = config.student.lora
    vision_tower = config.student.train_vision_tower
    return 0 if lora is None else student.count_adapter_parameters(lora.rank, vision_tower=vision_tower)


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What the processes of a configuration need, in bytes. `teacher_name` None: none is started."""

    student_name: str
    teacher_name: str | None
    student: Model
    teacher: Model | None
    teacher_ranks: int
    """Those that the configuration asks for."""
    batch_tokens: int
    teacher_head: int
    worker_bytes: int
    smallest_bytes: int
    """Activations of the smallest forward that the trainer can't split: one response after its prompt."""
    group_bytes: int
    image_px: int
    chunk_tokens: int
    forward_tokens: int
    prompts_per_step: int
    vllm: bool
    configured_share: float
    sharded: bool
    """Whether the configuration shards the student."""
    ranks_per_copy: int | None
    adapters: int
    """LoRA's weights; 0: the student learns whole."""
    moment_bytes: int

    @classmethod
    def of(cls, config: Config, *, with_teacher: bool) -> Demand:
        """Counts for a configuration; `with_teacher`: whether one is started here. Raises ConfigError if it can't."""
        student = memory.find_model(config.student.model)
        with_teacher = with_teacher and not config.teacher.shared_base
        hidden = config.teacher.needs_head and not config.teacher.shared_base  # whose head is the student's
        teacher = memory.find_model(config.teacher.model) if with_teacher or hidden else None
        image_px = config.data.max_pixels or IMAGE_PX
        image_bytes = memory.count_image_bytes(student, image_px)
        vllm = config.rollout.engine == "vllm"
        options = getattr(config.rollout, "engine_options", {})
        length = options.get("max_model_len", config.rollout.max_new_tokens + 2048)
        prompt = image_px // (memory.PATCH_PX * memory.MERGE) ** 2 + 512
        smallest = prompt + config.rollout.max_new_tokens
        group = min(GROUP_TOKENS, prompt + config.trainer.rollouts_per_prompt * config.rollout.max_new_tokens)
        token_bytes = memory.count_token_bytes(student)
        return cls(
            student_name=config.student.model,
            teacher_name=config.teacher.model if with_teacher else None,
            student=student,
            teacher=teacher if with_teacher else None,
            teacher_ranks=config.teacher.processes or 1,
            batch_tokens=config.teacher.batch_tokens,
            teacher_head=teacher.head_parameters if teacher is not None and hidden else 0,
            worker_bytes=memory.count_worker_bytes(student, length=length) if vllm else 4 * student.parameters,
            smallest_bytes=smallest * token_bytes + image_bytes,
            group_bytes=max(smallest, group) * token_bytes + image_bytes,
            image_px=image_px,
            chunk_tokens=config.trainer.chunk_tokens,
            forward_tokens=config.trainer.forward_tokens,
            prompts_per_step=config.trainer.prompts_per_step,
            vllm=vllm,
            configured_share=float(options.get("gpu_memory_utilization", 0.9)),
            sharded=config.trainer.sharding.kind != "none",
            ranks_per_copy=getattr(config.trainer.sharding, "ranks_per_copy", None),
            adapters=_count_adapters(config, student),
            moment_bytes=2 if config.trainer.optimizer == "adamw_8bit" else 8,
        )

    def count_teacher_bytes(self, ranks: int) -> int:
        """Counts what each card of a teacher on so many holds; 0 where none is started."""
        if self.teacher is None:
            return 0
        return memory.count_teacher_bytes(self.teacher, batch_tokens=self.batch_tokens, ranks=ranks)

    def list_teacher_cards(self, cards: int, usable_gib: float) -> list[int]:
        """Returns on how many cards the teacher can be, the best first; [0] where none is started."""
        if self.teacher is None:
            return [0]
        fitting = [n for n in self.teacher.ranks if n <= cards and self.count_teacher_bytes(n) / GIB <= usable_gib]
        asked = [self.teacher_ranks] if self.teacher_ranks in fitting and self.teacher_ranks <= cards - 2 else []
        return [*asked, *fitting[:1]]

    def count_trainer_bytes(self, ranks: int, *, sharded: bool) -> int:
        """Counts a trainer rank's memory before any group."""
        shards = min(ranks, self.ranks_per_copy or ranks) if sharded else 1
        return memory.count_trainer_fixed_bytes(
            self.student,
            self.teacher_head,
            ranks=ranks,
            shards=shards,
            chunk_tokens=self.chunk_tokens,
            adapters=self.adapters,
            moment_bytes=self.moment_bytes,
        )

    def choose_ranks(self, cards: int, usable_gib: float) -> tuple[int, bool] | None:
        """Returns the number of trainer ranks, and whether the student is sharded; None if no forward fits.

        It is sharded if that is configured, or if no rank holds it whole. One card is left for a worker, if there are
        two.
        """
        allowed = [n for n in (1, 2, 4, 8) if n <= max(1, cards - 1) and (n == 1 or self.prompts_per_step % n == 0)]
        for ranks in reversed(allowed):
            # Moments of 8 bits can't be sharded.
            kinds = (False,) if ranks == 1 or self.moment_bytes == 2 else (True,) if self.sharded else (False, True)
            for sharded in kinds:
                if (self.count_trainer_bytes(ranks, sharded=sharded) + self.smallest_bytes) / GIB <= usable_gib:
                    return ranks, sharded
        return None


def place_run(
    cards: Sequence[Card], config_path: Path, overrides: Sequence[str] = (), *, with_teacher: bool = True
) -> Placement:
    """Chooses the cards for a run's file. Raises ConfigError, if possible with settings with which it would fit."""
    try:
        return place(cards, Demand.of(load_config(config_path, overrides), with_teacher=with_teacher))
    except ConfigError as error:
        remedy = suggest(cards, config_path, overrides, with_teacher=with_teacher)
        if not remedy:
            raise
        raise ConfigError(f"{error}. It fits with {' '.join(map('--set {}'.format, remedy))}") from None


def suggest(
    cards: Sequence[Card], config_path: Path, overrides: Sequence[str] = (), *, with_teacher: bool = True
) -> tuple[str, ...]:
    """Returns settings of `REMEDIES` with which a run fits, none where it fits as it is or nothing helps."""
    whole = load_config(config_path, overrides).student.lora is None
    for remedy in ((), *REMEDIES) if cards else ():
        if remedy and not whole and remedy[0].startswith("student.lora"):
            continue
        with contextlib.suppress(ConfigError):
            config = load_config(config_path, (*overrides, *remedy))
            place(cards, Demand.of(config, with_teacher=with_teacher))
            return remedy
    return ()


def place(cards: Sequence[Card], demand: Demand) -> Placement:
    """Chooses the cards of each role. Raises ConfigError, with the figures, when the processes don't fit."""
    if not cards:
        raise ConfigError("--gpus auto: this host shows no NVIDIA card; `vaopd doctor` says what it finds")
    smallest = min(card.usable_gib for card in cards)
    counts = demand.list_teacher_cards(len(cards), smallest)
    if not counts:
        assert demand.teacher is not None
        most = max(n for n in demand.teacher.ranks if n <= len(cards))
        raise ConfigError(
            f"--gpus auto: the teacher {demand.teacher_name} needs {demand.count_teacher_bytes(most) / GIB:.1f} GiB"
            f"{f' on each of {most} cards' if most > 1 else ''}, of which {smallest:.1f} are usable; take a smaller "
            "teacher, lower teacher.batch_tokens, or use a teacher on another host (--teacher)"
        )
    for count, replicas in [(count, replicas) for count in counts for replicas in (2, 1)]:
        if replicas > 1 and (not count or len(cards) < replicas * count + LEFT_BY_REPLICAS):
            continue
        teachers = [tuple(cards[index * count : (index + 1) * count]) for index in range(replicas)]
        rest = tuple(cards[replicas * count :])
        if (chosen := demand.choose_ranks(len(rest), smallest)) is not None:
            break
    else:
        most = max(n for n in (1, 2, 4, 8) if n <= max(1, len(rest) - 1))
        shards = most > 1 and demand.moment_bytes != 2
        needed = demand.count_trainer_bytes(most, sharded=shards) + demand.smallest_bytes
        raise ConfigError(
            f"--gpus auto: a trainer rank of {demand.student_name} needs {needed / GIB:.1f} GiB for its shortest "
            f"forward{f', sharded over {most} ranks' if shards else ''}, {smallest:.1f} GiB of a card are usable; "
            "take a smaller student or more cards, or lower data.max_pixels, rollout.max_new_tokens or "
            "trainer.chunk_tokens"
        )
    ranks, sharded = chosen
    if len(rest) >= 2:
        return _describe(demand, teachers, rest[:-ranks], rest[-ranks:], VLLM_SHARE, smallest, sharded)
    return _share(demand, teachers[0], rest, smallest)


def _share(demand: Demand, teacher: tuple[Card, ...], rest: tuple[Card, ...], usable_gib: float) -> Placement:
    """Places the worker beside the teacher or the trainer, or all three on one card."""
    trainer_gib = (demand.count_trainer_bytes(1, sharded=False) + demand.group_bytes) / GIB
    teacher_gib = demand.count_teacher_bytes(len(teacher)) / GIB
    trainer = rest or teacher[:1]
    rooms = {}
    if rest:
        rooms[trainer[0]] = usable_gib - trainer_gib
        rooms |= {teacher[0]: usable_gib - teacher_gib} if teacher else {}
    else:
        rooms[teacher[0]] = usable_gib - teacher_gib - trainer_gib
    card, room = max(rooms.items(), key=lambda item: item[1])
    needed = demand.worker_bytes / GIB
    if room < needed:
        raise ConfigError(
            f"--gpus auto: teacher ({teacher_gib:.1f} GiB a card), trainer ({trainer_gib:.1f} GiB with a group) and a "
            f"rollout worker ({needed:.1f} GiB) don't fit on {len(teacher) + len(rest)} × {usable_gib:.1f} GiB: the "
            f"worker finds {max(0.0, room):.1f}; add a card, or lower data.max_pixels or rollout.max_new_tokens"
        )
    share = math.floor(min(VLLM_SHARE, room / card.gib) * 20) / 20
    return _describe(demand, [teacher], (card,), trainer, share, usable_gib, False)


def _describe(
    demand: Demand,
    teachers: Sequence[tuple[Card, ...]],
    workers: Sequence[Card],
    trainer: Sequence[Card],
    share: float,
    usable_gib: float,
    sharded: bool,
) -> Placement:
    teacher = teachers[0]
    gpus: dict[str, tuple[str, ...]] = {"teacher": tuple(map(_join, teachers))} if teacher else {}
    gpus |= {"rollout": tuple(str(card.index) for card in workers), "trainer": (_join(trainer),)}
    overrides = [f"rollout.workers={len(workers)}"] if len(workers) > 1 else []
    overrides += [f"trainer.processes={len(trainer)}"] if len(trainer) > 1 else []
    overrides += ["trainer.sharding.kind=full"] if sharded and not demand.sharded else []
    overrides += [f"teacher.processes={len(teacher)}"] if teacher and len(teacher) != demand.teacher_ranks else []
    # The configuration's own share stays where the card is the worker's.
    shared = workers[0] in (*teacher, *trainer)
    wanted = share if shared else min(share, demand.configured_share)
    if demand.vllm and wanted != demand.configured_share:
        overrides.append(f"rollout.engine_options.gpu_memory_utilization={wanted:.2f}")
    fixed_gib = demand.count_trainer_bytes(len(trainer), sharded=sharded) / GIB
    taken_gib = 0.0
    if trainer[0] in workers:
        taken_gib = wanted * workers[0].gib if demand.vllm else demand.worker_bytes / GIB
    if trainer[0] in teacher:
        taken_gib += demand.count_teacher_bytes(len(teacher)) / GIB
    room_bytes = (usable_gib - taken_gib - fixed_gib) * GIB
    tokens = memory.count_group_tokens(demand.student, room_bytes=room_bytes, pixels=demand.image_px)
    # A rank of a sharded student that runs out of memory can't begin its step again: the others wait for it.
    most = memory.count_forward_tokens(demand.student, room_bytes=room_bytes)
    overrides += [f"trainer.forward_tokens={most}"] if sharded and most < demand.forward_tokens else []
    reasons = [
        f"teacher on card {' and on card '.join(map(_join, teachers))}: {demand.teacher_name} needs "
        f"{demand.count_teacher_bytes(len(teacher)) / GIB:.1f} GiB"
        + (" of each, its layers split over them" if len(teacher) > 1 else "")
        + f", {usable_gib:.1f} of a card are usable"
    ] if teacher else []  # fmt: skip
    place = "on the card of the " + ("trainer" if workers[0] in trainer else "teacher") if shared else "for each"
    reasons += [
        f"rollout workers on card {_join(workers)}, {place}"
        + (f": vLLM gets {wanted:.0%} of it" if demand.vllm else ""),
        f"trainer on card {_join(trainer)}, the student {'sharded' if sharded else 'whole on each'}: {fixed_gib:.1f} "
        f"GiB before the first token; a group of {tokens:,} tokens with an image of {demand.image_px:,} pixels fits "
        "beside it",
    ]
    return Placement(gpus=gpus, overrides=tuple(overrides), reasons=tuple(reasons), utilization=wanted)


def _join(cards: Sequence[Card]) -> str:
    return ",".join(str(card.index) for card in cards)
