"""Chooses which cards of this host each process of a run gets, from the memory that each of them needs.

In: the cards, the configuration. Out: devices by role, the settings that go with them, and the reasons in words. The
teacher gets as many cards as its `processes`, if two are left beside them, otherwise as few as hold it; on several it
is split by tensor parallelism. Where four more are left, there are two such teachers: by the measured rates, scoring is
the longest part of a step. Of the others, up to two thirds go to the trainer, the rest to workers. With one left, or
none, processes share one. Where cards differ, the smallest that hold it are the teacher's and the largest the
trainer's. `vaopd.vlm.memory` counts the bytes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vaopd.config import Config, load_config
from vaopd.errors import ConfigError
from vaopd.launch.cards import Card, count_worker_cards
from vaopd.vlm import memory
from vaopd.vlm.memory import GIB, Model

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
    ("student.lora.rank=32", "trainer.learning_rate=1e-5", "data.max_pixels=1048576", "trainer.forward_tokens=8192"),
)
"""Settings that take less memory, the least change of a run first."""
WIDTHS = {"float32": 4, "bfloat16": 2}
"""Bytes of a number by dtype."""


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


def count_adapters(config: Config, student: Model) -> int:
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
    teacher_width: int
    teacher_head_bytes: int
    width: int
    """Bytes of a number in the student's dtype; `teacher_width`: in the teacher's."""
    length: int
    """Tokens of a worker's longest prompt and response."""
    worker_cards: int
    """On how many cards one worker runs, by the configuration."""
    smallest_bytes: int
    """Activations of the smallest forward that the trainer can't split: one response after its prompt."""
    group_bytes: int
    image_px: int
    chunk_tokens: int
    forward_tokens: int
    prompts_per_step: int
    vllm: bool
    configured_share: float
    sharded: bool | None
    """Whether the configuration shards the student; None: as memory demands, unless `--set` says."""
    ranks_per_copy: int | None
    adapters: int
    """LoRA's weights; 0: the student learns whole."""
    moment_bytes: int
    ranks: int | None
    """Trainer ranks that `--set` asks for; None: to be chosen. `workers`: likewise."""
    workers: int | None

    @classmethod
    def of(cls, config: Config, overrides: Sequence[str] = (), *, with_teacher: bool) -> Demand:
        """Counts for a configuration; `with_teacher`: whether one is started here. Raises ConfigError if it can't.

        overrides: the settings in it that are the command line's.
        """
        student = memory.find_model(config.student.model)
        with_teacher = with_teacher and not config.teacher.shared_base and config.teacher.device_map != "cpu"
        hidden = config.teacher.needs_head and not config.teacher.shared_base  # whose head is the student's
        teacher = memory.find_model(config.teacher.model) if with_teacher or hidden else None
        image_px = config.data.max_pixels or IMAGE_PX
        width, teacher_width = WIDTHS[config.student.dtype], WIDTHS[config.teacher.dtype]
        image_bytes = memory.count_image_bytes(student, image_px, width=width)
        kind = config.trainer.sharding.kind
        set_by_hand = {override.partition("=")[0] for override in overrides}
        vllm = config.rollout.engine == "vllm"
        options = getattr(config.rollout, "engine_options", {})
        length = options.get("max_model_len", config.rollout.max_new_tokens + 2048)
        prompt = image_px // (memory.PATCH_PX * memory.MERGE) ** 2 + 512
        smallest = prompt + config.rollout.max_new_tokens
        group = prompt + config.trainer.rollouts_per_prompt * config.rollout.max_new_tokens
        group = min(GROUP_TOKENS, config.trainer.forward_tokens, group)
        token_bytes = memory.count_token_bytes(student, width=width)
        return cls(
            student_name=config.student.model,
            teacher_name=config.teacher.model if with_teacher else None,
            student=student,
            teacher=teacher if with_teacher else None,
            teacher_ranks=config.teacher.processes or 1,
            batch_tokens=config.teacher.batch_tokens,
            teacher_width=teacher_width,
            teacher_head_bytes=teacher_width * teacher.head_parameters if teacher is not None and hidden else 0,
            width=width,
            length=length,
            worker_cards=count_worker_cards(config),
            smallest_bytes=smallest * token_bytes + image_bytes,
            group_bytes=max(smallest, group) * token_bytes + image_bytes,
            image_px=image_px,
            chunk_tokens=config.trainer.chunk_tokens,
            forward_tokens=config.trainer.forward_tokens,
            prompts_per_step=config.trainer.prompts_per_step,
            vllm=vllm,
            configured_share=float(options.get("gpu_memory_utilization", 0.9)),
            sharded=True if kind != "none" else False if "trainer.sharding.kind" in set_by_hand else None,
            ranks_per_copy=getattr(config.trainer.sharding, "ranks_per_copy", None),
            adapters=count_adapters(config, student),
            moment_bytes=2 if config.trainer.optimizer == "adamw_8bit" else 8,
            ranks=config.trainer.processes if "trainer.processes" in set_by_hand else None,
            workers=config.rollout.workers if "rollout.workers" in set_by_hand else None,
        )

    def count_teacher_bytes(self, ranks: int) -> int:
        """Counts what each card of a teacher on so many holds; 0 where none is started."""
        if self.teacher is None:
            return 0
        return memory.count_teacher_bytes(
            self.teacher, batch_tokens=self.batch_tokens, ranks=ranks, width=self.teacher_width
        )

    def list_teacher_cards(self, cards: Sequence[Card]) -> list[int]:
        """Returns on how many of the cards the teacher can be, the best first; [0] where none is started."""
        if self.teacher is None:
            return [0]
        fitting = [n for n in self.teacher.ranks if len(self.list_holding(cards, n)) >= n]
        asked = [self.teacher_ranks] if self.teacher_ranks in fitting and self.teacher_ranks <= len(cards) - 2 else []
        return [*asked, *fitting[:1]]

    def list_holding(self, cards: Sequence[Card], ranks: int) -> list[Card]:
        """Returns the cards that hold a teacher's rank out of so many."""
        return [card for card in cards if self.count_teacher_bytes(ranks) / GIB <= card.usable_gib]

    def count_worker_bytes(self, cards: int) -> int:
        """Counts the least that each card of a rollout worker on so many holds."""
        if not self.vllm:
            return 2 * self.width * self.student.parameters
        return memory.count_worker_bytes(self.student, length=self.length, ranks=cards, width=self.width)

    def choose_workers(self, cards: Sequence[Card]) -> list[tuple[Card, ...]]:
        """Deals cards to rollout workers: as few for each as hold it, or as many as configured; [] if none holds it."""
        share = min(VLLM_SHARE, self.configured_share)
        for each in (self.worker_cards,) if self.worker_cards > 1 or not self.vllm else self.student.ranks:
            needed = self.count_worker_bytes(each) / GIB
            holding = [card for card in cards if needed <= (share * card.gib if self.vllm else card.usable_gib)]
            most = len(holding) // each
            if most >= (self.workers or 1):
                return [tuple(holding[i * each : (i + 1) * each]) for i in range(self.workers or most)]
        return []

    def count_trainer_bytes(self, ranks: int, *, sharded: bool) -> int:
        """Counts a trainer rank's memory before any group."""
        shards = min(ranks, self.ranks_per_copy or ranks) if sharded else 1
        return memory.count_trainer_fixed_bytes(
            self.student,
            self.teacher_head_bytes,
            ranks=ranks,
            shards=shards,
            chunk_tokens=self.chunk_tokens,
            adapters=self.adapters,
            moment_bytes=self.moment_bytes,
            width=self.width,
        )

    def list_ranks(self, cards: int) -> list[int]:
        """Returns the possible numbers of trainer ranks, the best first; one card is left for a worker, if possible.

        The most are best, but not over two for each card of a worker, which would be the slower part.
        """
        if self.ranks is not None:
            return [self.ranks] if self.ranks <= max(1, cards - 1) else []
        fitting = [n for n in (8, 4, 2, 1) if n <= max(1, cards - 1) and (n == 1 or self.prompts_per_step % n == 0)]
        return sorted(fitting, key=lambda n: n > 2 * (cards - n))

    def find_sharding(self, trainer: Sequence[Card]) -> bool | None:
        """Returns whether ranks on these cards shard the student; None if no forward fits.

        They do if that is configured, or if no rank holds it whole.
        """
        ranks, usable_gib = len(trainer), min(card.usable_gib for card in trainer)
        # Moments of 8 bits can't be sharded.
        chosen = False if ranks == 1 or self.moment_bytes == 2 else self.sharded
        for sharded in (False, True) if chosen is None else (chosen,):
            if (self.count_trainer_bytes(ranks, sharded=sharded) + self.smallest_bytes) / GIB <= usable_gib:
                return sharded
        return None


def place_run(
    cards: Sequence[Card], config_path: Path, overrides: Sequence[str] = (), *, with_teacher: bool = True
) -> Placement:
    """Chooses the cards for a run's file. Raises ConfigError, if possible with settings with which it would fit."""
    try:
        return place(cards, Demand.of(load_config(config_path, overrides), overrides, with_teacher=with_teacher))
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
        # A student with adapters has its own learning rate.
        settings = tuple(part for part in remedy if whole or not part.startswith(("student.lora", "trainer.learning")))
        with contextlib.suppress(ConfigError):
            config = load_config(config_path, (*overrides, *settings))
            place(cards, Demand.of(config, overrides, with_teacher=with_teacher))
            return settings
    return ()


def place(cards: Sequence[Card], demand: Demand) -> Placement:
    """Chooses the cards of each role. Raises ConfigError, with the figures, when the processes don't fit."""
    if not cards:
        raise ConfigError("--gpus auto: this host shows no NVIDIA card; `vaopd doctor` says what it finds")
    ordered = sorted(cards, key=lambda card: card.gib)
    counts = demand.list_teacher_cards(ordered)
    if not counts:
        assert demand.teacher is not None
        most = max(n for n in demand.teacher.ranks if n <= len(cards))
        raise ConfigError(
            f"--gpus auto: the teacher {demand.teacher_name} needs {demand.count_teacher_bytes(most) / GIB:.1f} GiB"
            f"{f' on each of {most} cards' if most > 1 else ''}, of which {ordered[-most].usable_gib:.1f} are usable; "
            "take a smaller teacher, lower teacher.batch_tokens, or use a teacher on another host (--teacher)"
        )
    for count, replicas in [(count, replicas) for count in counts for replicas in (2, 1)]:
        if replicas > 1 and (not count or len(cards) < replicas * count + LEFT_BY_REPLICAS):
            continue
        taken = demand.list_holding(ordered, count)[: replicas * count] if count else []
        if len(taken) < replicas * count:
            continue
        rest = [card for card in ordered if card not in taken]
        for ranks in demand.list_ranks(len(rest)) if len(rest) > 1 else ():
            workers = demand.choose_workers(rest[:-ranks])
            if workers and (sharded := demand.find_sharding(rest[-ranks:])) is not None:
                teachers = [tuple(taken[index * count : (index + 1) * count]) for index in range(replicas)]
                return _describe(demand, teachers if count else [], workers, rest[-ranks:], None, sharded, cards)
    trainer = rest[-1:] or taken[:1]
    if max(demand.ranks or 1, demand.workers or 1) == 1 and demand.find_sharding(trainer) is not None:
        return _share(demand, taken, trainer, cards)
    if (asked := (demand.ranks or 1) + (demand.workers or 1) * demand.worker_cards) > max(2, len(rest)):
        raise ConfigError(
            f"--gpus auto: {asked} cards are asked for by trainer.processes, rollout.workers and "
            f"rollout.engine_options, and {len(rest)} of {len(cards)} are left beside the teacher; lower one of them"
        )
    most = max(demand.list_ranks(len(rest)), default=1)
    shards = most > 1 and demand.moment_bytes != 2 and demand.sharded is not False
    needed = demand.count_trainer_bytes(most, sharded=shards) + demand.smallest_bytes
    usable_gib = min(card.usable_gib for card in rest[-most:] or taken[:1])
    worker = demand.count_worker_bytes(demand.worker_cards) / GIB
    raise ConfigError(
        f"--gpus auto: a trainer rank of {demand.student_name} needs {needed / GIB:.1f} GiB for its shortest "
        f"forward{f', sharded over {most} ranks' if shards else ''}, and a rollout worker {worker:.1f}; "
        f"{usable_gib:.1f} GiB of a card are usable; take a smaller student or more cards, or lower data.max_pixels, "
        "rollout.max_new_tokens or trainer.chunk_tokens"
    )


def _share(demand: Demand, teacher: Sequence[Card], trainer: Sequence[Card], cards: Sequence[Card]) -> Placement:
    """Places the worker beside the teacher or the trainer, or all three on one card."""
    trainer_gib = (demand.count_trainer_bytes(1, sharded=False) + demand.group_bytes) / GIB
    teacher_gib = demand.count_teacher_bytes(len(teacher)) / GIB
    rooms = {trainer[0]: trainer[0].usable_gib - trainer_gib}
    if teacher:
        rooms[teacher[0]] = rooms.get(teacher[0], teacher[0].usable_gib) - teacher_gib
    card, room = max(rooms.items(), key=lambda item: item[1])
    needed = demand.count_worker_bytes(1) / GIB
    if room < needed:
        raise ConfigError(
            f"--gpus auto: teacher ({teacher_gib:.1f} GiB a card), trainer ({trainer_gib:.1f} GiB with a group) and a "
            f"rollout worker ({needed:.1f} GiB) don't fit on {' + '.join(f'{card.usable_gib:.1f}' for card in cards)} "
            f"GiB: the worker finds {max(0.0, room):.1f}; add a card, or lower data.max_pixels or "
            "rollout.max_new_tokens"
        )
    share = math.floor(min(VLLM_SHARE, room / card.gib) * 20) / 20
    return _describe(demand, [tuple(teacher)] if teacher else [], [(card,)], trainer, share, False, cards)


def _describe(
    demand: Demand,
    teachers: Sequence[Sequence[Card]],
    workers: Sequence[Sequence[Card]],
    trainer: Sequence[Card],
    share: float | None,
    sharded: bool,
    cards: Sequence[Card],
) -> Placement:
    """Puts a choice into words. share: vLLM's, of a card that another process uses too; None: of one of its own."""
    teacher, each = teachers[0] if teachers else (), len(workers[0])
    gpus: dict[str, tuple[str, ...]] = {"teacher": tuple(map(_join, teachers))} if teachers else {}
    gpus |= {"rollout": tuple(map(_join, workers)), "trainer": (_join(trainer),)}
    overrides = [f"rollout.workers={len(workers)}"] if len(workers) > 1 and not demand.workers else []
    overrides += [f"trainer.processes={len(trainer)}"] if len(trainer) > 1 and not demand.ranks else []
    overrides += ["trainer.sharding.kind=full"] if sharded and not demand.sharded else []
    overrides += [f"teacher.processes={len(teacher)}"] if teacher and len(teacher) != demand.teacher_ranks else []
    if each != demand.worker_cards:
        overrides.append(f"rollout.engine_options.tensor_parallel_size={each}")
    # The configuration's own share stays where the card is the worker's.
    wanted = share if share is not None else min(VLLM_SHARE, demand.configured_share)
    if demand.vllm and wanted != demand.configured_share:
        overrides.append(f"rollout.engine_options.gpu_memory_utilization={wanted:.2f}")
    fixed_gib = demand.count_trainer_bytes(len(trainer), sharded=sharded) / GIB
    taken_gib = 0.0
    if trainer[0] in workers[0]:
        taken_gib = wanted * trainer[0].gib if demand.vllm else demand.count_worker_bytes(1) / GIB
    if trainer[0] in teacher:
        taken_gib += demand.count_teacher_bytes(len(teacher)) / GIB
    room_bytes = (min(card.usable_gib for card in trainer) - taken_gib - fixed_gib) * GIB
    width = demand.width
    tokens = memory.count_group_tokens(demand.student, room_bytes=room_bytes, pixels=demand.image_px, width=width)
    # A rank of a sharded student that runs out of memory can't begin its step again: the others wait for it.
    most = memory.count_forward_tokens(demand.student, room_bytes=room_bytes, width=width)
    overrides += [f"trainer.forward_tokens={most}"] if sharded and most < demand.forward_tokens else []
    reasons = [
        f"teacher on card {' and on card '.join(map(_join, teachers))}: {demand.teacher_name} needs "
        f"{demand.count_teacher_bytes(len(teacher)) / GIB:.1f} GiB"
        + (" of each, its layers split over them" if len(teacher) > 1 else "")
        + f", {min(card.usable_gib for card in teacher):.1f} of a card are usable"
    ] if teacher else []  # fmt: skip
    beside = f"on the card of the {'trainer' if trainer[0] in workers[0] else 'teacher'}"
    place = beside if share is not None else "one for each" if each == 1 else f"{each} for each, which share its layers"
    reasons += [
        f"rollout workers on card {' and on card '.join(map(_join, workers))}, {place}"
        + (f": vLLM gets {wanted:.0%} of it" if demand.vllm else ""),
        f"trainer on card {_join(trainer)}, the student {'sharded' if sharded else 'whole on each'}: {fixed_gib:.1f} "
        f"GiB before the first token; a group of {tokens:,} tokens with an image of {demand.image_px:,} pixels fits "
        "beside it",
    ]
    used = {card.index for group in (*teachers, *workers, trainer) for card in group}
    if idle := [card for card in cards if card.index not in used]:
        reasons.append(f"card {_join(idle)} stays idle")
    return Placement(gpus=gpus, overrides=tuple(overrides), reasons=tuple(reasons), utilization=wanted)


def _join(cards: Sequence[Card]) -> str:
    return ",".join(str(card.index) for card in cards)
