"""Estimates what a step takes on H100s: sampling, scoring, training, handing the weights over. Torch-free.

Operations and bytes are counted from the models' configurations; the rates are those that benchmarks/RESULTS.md
measured on one H100. Sampling has no measurement yet: its figure is the time in which weights and KV cache pass through
the card's memory, so a lower bound. Preparation on the host and the network are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vaopd.config import Config
from vaopd.errors import ConfigError
from vaopd.launch.cards import H100_GIB, Card, count_worker_cards
from vaopd.launch.placement import IMAGE_PX, Demand, count_adapters
from vaopd.telemetry.progress_line import format_duration
from vaopd.vlm import memory
from vaopd.vlm.memory import GIB, MERGE, PATCH_PX, Model

PEAK_FLOPS, MEMORY_BYTES_PER_S = 989e12, 3.35e12
"""Of an H100 SXM, by its data sheet."""
SCORING_SHARE = 0.54
"""Of the peak, measured: an 8B teacher, P 650, R 1000, K 4, both views, 283 ms."""
TRAINING_SHARE = 0.17
"""Of the peak by useful operations, measured: a 2B student, P 650, R 1000, K 4, 349 ms."""
SHARED_MEMORY = "/dev/shm"
PUBLISHING_BYTES_PER_S, BY_MEMORY_BYTES_PER_S = 4.26e9 / 7.2, 4.26e9 / 4.6
"""Measured: the 2B student's weights from trainer to worker by /tmp, and by /dev/shm."""
PROMPT_TEXT = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Seconds of one optimizer step by part, for responses of `response` tokens."""

    response: int
    sampling_s: float
    scoring_s: float
    training_s: float
    publishing_s: float
    overlaps: bool
    """Whether sampling continues while the trainer trains (max_policy_lag > 0)."""

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        sampled, trained = self.sampling_s + self.scoring_s, self.training_s + self.publishing_s
        return max(sampled, trained) if self.overlaps else sampled + trained


def count_forward(model: Model, *, prompt: int, response: int, siblings: int, pixels: int) -> float:
    """Operations of one view of a group: the prompt and its image once, the LM head on responses only."""
    layers = model.text_parameters - model.head_parameters * (1 if model.tied else 2)
    tokens, patches = prompt + siblings * response, pixels / PATCH_PX**2
    pairs = prompt**2 / 2 + siblings * (prompt * response + response**2 / 2)
    attention = 4 * model.layers * model.heads * model.head_dim * pairs
    heads = 2 * model.head_parameters * siblings * response
    return 2 * layers * tokens + attention + heads + 2 * model.vision_parameters * patches


def estimate_step(config: Config, *, response: int, workers: int, ranks: int, teacher_cards: int = 1) -> Step:
    """Estimates a step on H100s. Raises ConfigError for models whose sizes are not known here.

    teacher_cards: of all teachers; those that share one are taken to be as fast as replicas, and so are workers' cards.
    """
    student, teacher = memory.find_model(config.student.model), memory.find_model(config.teacher.model)
    groups, siblings = config.trainer.prompts_per_step, config.trainer.rollouts_per_prompt
    pixels, prompt = count_pixels(config), count_prompt_tokens(config)
    in_memory = str(config.weights.folder or "").startswith(SHARED_MEMORY)
    views = 1 if config.objective.variant == "standard" else 2
    scored = count_forward(teacher, prompt=prompt, response=response, siblings=siblings, pixels=pixels)
    trained = count_forward(student, prompt=prompt, response=response, siblings=siblings, pixels=pixels)
    rollouts = math.ceil(groups * siblings / workers)
    # Adapters leave out the gradients of the weights that they are added to; only they are handed over, in float32.
    adapters = count_adapters(config, student)
    published, passes = (4 * adapters, 2) if adapters else (2 * student.parameters, 3)
    moved = 2 * student.parameters + rollouts * (prompt + response / 2) * student.kv_bytes_per_token
    return Step(
        response=response,
        sampling_s=response * moved / MEMORY_BYTES_PER_S / count_worker_cards(config),
        scoring_s=groups * views * scored / (SCORING_SHARE * PEAK_FLOPS) / teacher_cards,
        training_s=groups * passes * trained / (TRAINING_SHARE * PEAK_FLOPS) / ranks,
        publishing_s=published / (BY_MEMORY_BYTES_PER_S if in_memory else PUBLISHING_BYTES_PER_S),
        overlaps=config.trainer.max_policy_lag > 0,
    )


def describe_cost(
    config: Config, gpus: Mapping[str, Sequence[str]] = {}, *, with_teacher: bool = True
) -> Iterator[str]:
    """Yields the lines of an estimate, or the one that says why there is none. gpus: devices by role, if chosen."""
    if config.teacher.device_map == "cpu":
        yield "no estimate: the figures are for GPUs, and teacher.device_map is cpu"
        return
    workers, ranks = config.rollout.workers, config.trainer.processes
    teachers = gpus.get("teacher", ())
    teacher_cards = sum(value.count(",") + 1 for value in teachers) if teachers else config.teacher.processes or 1
    teacher_cards = ranks if config.teacher.shared_base else teacher_cards  # each scores its own groups
    try:
        longest = config.rollout.max_new_tokens
        steps = [
            estimate_step(config, response=response, workers=workers, ranks=ranks, teacher_cards=teacher_cards)
            for response in dict.fromkeys((max(1, longest // 4), longest))
        ]
        cards = count_cards(config, gpus, with_teacher=with_teacher)
    except ConfigError as error:
        yield f"no estimate: {error}"
        return
    prompt = count_prompt_tokens(config)
    yield (
        f"estimate for H100s: {cards} card{'s' * (cards > 1)}, {workers} worker{'s' * (workers > 1)}, {ranks} trainer "
        f"rank{'s' * (ranks > 1)}; prompts of {prompt} tokens"
    )
    for step in steps:
        hours = config.trainer.steps * step.total_s / 3600
        yield (
            f"  responses of {step.response} tokens: {step.total_s:.0f} s a step = sampling ≥ {step.sampling_s:.0f} + "
            f"scoring {step.scoring_s:.0f} + training {step.training_s:.0f} + handing over {step.publishing_s:.0f}"
            f"{' (sampling and scoring beside training)' if step.overlaps else ''}; {config.trainer.steps} steps "
            f"{format_duration(hours * 3600)} h, {hours * cards:.0f} card-hours"
        )
    if config.weights.folder is None and config.weights.transport == "folder" and config.student.lora is None:
        size = 2 * memory.find_model(config.student.model).parameters
        yield (
            f"  with --set weights.folder={SHARED_MEMORY}: handing over {size / BY_MEMORY_BYTES_PER_S:.0f}; it needs "
            f"{3 * size / GIB:.0f} GiB of memory there"
        )
    yield (
        "  measured on one H100: the rates of scoring, training and handing over; counted: operations and bytes; a "
        "lower bound: sampling; left out: evaluations, checkpoints, the host's part"
    )


def count_pixels(config: Config) -> int:
    """Returns the pixels of an image, which is taken to have a megapixel unless less is allowed."""
    return min(config.data.max_pixels or IMAGE_PX, IMAGE_PX)


def count_prompt_tokens(config: Config) -> int:
    """Returns the tokens of a prompt with such an image and a short question."""
    return count_pixels(config) // (PATCH_PX * MERGE) ** 2 + PROMPT_TEXT


def count_cards(config: Config, gpus: Mapping[str, Sequence[str]], *, with_teacher: bool) -> int:
    """Counts the cards chosen; where none are, one for each worker, rank of the trainer, and rank of the teacher."""
    if gpus:
        return len({card for values in gpus.values() for value in values for card in value.split(",")})
    demand = Demand.of(config, with_teacher=with_teacher)
    teacher = demand.list_teacher_cards([Card(index=index, gib=H100_GIB) for index in range(8)])[0]
    return teacher + config.rollout.workers * count_worker_cards(config) + config.trainer.processes
