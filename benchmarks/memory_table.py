"""What Qwen3-VL needs in GPU memory as teacher, as student in the trainer and in the rollout engine; who goes where.

One command, its tables in Markdown: `python benchmarks/memory_table.py`. Everything follows from the published
configurations; nothing is downloaded and no GPU is needed. The bytes that a trainer needs for the backward pass were
counted on the real layers (`--measure` does it again, by kept_bytes.py, in a minute). Activations are
checkpointed.

The arithmetic is vaopd/vlm/memory.py's, the placement `vaopd up --gpus auto`'s (vaopd/launch/placement.py).
`--measure-ranks` compares it with the resident memory of real trainer ranks (benchmarks/rank_memory.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from vaopd.config import load_config
from vaopd.launch.cards import Card
from vaopd.launch.placement import Demand, Placement, place
from vaopd.vlm.memory import (
    BATCH_TOKENS,
    CHUNK_TOKENS,
    GIB,
    MARGIN,
    MODELS,
    PATCH_PX,
    VLLM_BYTES,
    Model,
    count_chunk_bytes,
    count_group_tokens,
    count_image_bytes,
    count_teacher_bytes,
    count_teacher_working_bytes,
    count_token_bytes,
    count_trainer_fixed_bytes,
)

ROOT = Path(__file__).parents[1]
CARD_GIB = 79.1  # what an 80 GB card offers
# The paper's bounds on an image, and one between them.
PIXELS = (262_144, 1_048_576, 4_194_304)
STUDENTS = ("2B", "4B", "8B")
LORA_RANK = 32  # of geometry3k-8b-lora.toml


def group_tokens(student: Model, teacher: Model, *, ranks: int, pixels: int, taken_gib: float = 0.0) -> int:
    """The longest group whose forward and backward fit on a card beside everything else."""
    fixed = count_trainer_fixed_bytes(student, 2 * teacher.head_parameters, ranks=ranks)
    return count_group_tokens(student, room_bytes=(usable() - taken_gib) * GIB - fixed, pixels=pixels)


def usable() -> float:
    return CARD_GIB * (1 - MARGIN)


def gib(number_of_bytes: float) -> str:
    return f"{number_of_bytes / GIB:.1f}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, tuple("---" for _ in head), *rows)]
    return "\n".join(lines) + "\n"


def model_table() -> str:
    rows = []
    for model in MODELS.values():
        rows.append((
            model.name, f"{model.parameters:,}", gib(2 * model.parameters), gib(count_teacher_working_bytes(model)),
            *(gib(count_teacher_bytes(model, ranks=ranks)) for ranks in (1, 2, 4)),
            gib(2 * model.head_parameters), f"{2 * model.hidden:,}", f"{model.kv_bytes_per_token // 1024}",
        ))  # fmt: skip
    return table(
        ("Qwen3-VL", "parameters", "weights, bf16 (GiB)", "teacher's forward (GiB)", "teacher on one card (GiB)",
         "on each of 2", "on each of 4", "LM head, bf16 (GiB)", "hidden payload (bytes a token)",
         "KV cache (KiB a token)"),
        rows,
    )  # fmt: skip


def trainer_table() -> str:
    students, rows = [MODELS[name] for name in STUDENTS], []

    def add(name: str, size: str, count: Callable[[Model], float]) -> None:
        rows.append((name, size, *(gib(count(student)) for student in students)))

    per_parameter = ((4, "weights"), (4, "gradients"), (8, "AdamW's moments"), (2, "autocast's bf16 copies"))
    for size, name in per_parameter:
        add(name, f"{size} bytes × parameters", lambda student, size=size: size * student.parameters)
    name = "gradient buckets, with `trainer.processes` > 1"
    add(name, "4 bytes × parameters", lambda student: 4 * student.parameters)
    add("gradient of the head, summed over chunks", "4 bytes × head", lambda student: 4 * student.head_parameters)
    name = f"one chunk of the divergence (`trainer.chunk_tokens = {CHUNK_TOKENS}`)"
    add(name, "16 bytes × tokens × vocabulary", count_chunk_bytes)
    for name in ("4B", "8B", "32B"):
        head = 2 * MODELS[name].head_parameters
        add(f"head of the {name} teacher (payload `hidden` only)", "2 bytes × head", lambda _, head=head: head)
    sizes = " / ".join(f"{count_token_bytes(student):,}" for student in students)
    name = "kept for the backward pass, per 1000 tokens of a group"
    add(name, f"{sizes} bytes a token", lambda student: 1000 * count_token_bytes(student))
    for pixels in PIXELS:
        patches = f"{pixels // PATCH_PX**2:,} patches"
        name = f"the same, an image of {pixels:,} pixels"
        add(name, patches, lambda student, pixels=pixels: count_image_bytes(student, pixels))
    return table(("part of a trainer rank", "size", *(f"{name} student, GiB" for name in STUDENTS)), rows)


def group_table() -> str:
    """Longest groups beside a student that is whole on its rank; the next table has sharded ones."""
    rows, head_bytes = [], 2 * MODELS["8B"].head_parameters
    for student in (MODELS[name] for name in STUDENTS):
        adapters = student.count_adapter_parameters(LORA_RANK, vision_tower=True)
        for name, options in (
            ("one rank", {}),
            ("several ranks", {"ranks": 2}),
            ("one rank, moments of 8 bits", {"moment_bytes": 2}),
            (f"one rank, LoRA of rank {LORA_RANK}", {"adapters": adapters}),
        ):
            fixed = count_trainer_fixed_bytes(student, head_bytes, **{"ranks": 1, **options})
            fits = [count_group_tokens(student, room_bytes=usable() * GIB - fixed, pixels=pixels) for pixels in PIXELS]
            rows.append((student.name, name, gib(fixed), *(f"{tokens:,}" if tokens else "–" for tokens in fits)))
    sizes = (f"tokens of a group, image of {pixels:,} px" for pixels in PIXELS)
    return table(("student", "on", "GiB before the first token", *sizes), rows)


def sharding_table() -> str:
    """Whole, and over 2, 4 and 8 ranks; a hybrid's rank is that of its copy."""
    rows = []
    teacher, pixels = MODELS["8B"], PIXELS[1]
    for student in MODELS.values():
        row = [student.name]
        for shards in (1, 2, 4, 8):
            fixed = count_trainer_fixed_bytes(student, 2 * teacher.head_parameters, ranks=shards, shards=shards)
            tokens = count_group_tokens(student, room_bytes=usable() * GIB - fixed, pixels=pixels)
            row.append(f"{gib(fixed)}: {tokens:,}" if tokens else f"{gib(fixed)}: –")
        rows.append(tuple(row))
    return table(("student", "whole, one rank", "2 ranks of a copy", "4", "8"), rows)


def choose(gpus: int, teacher: str) -> Placement:
    """As `vaopd up --gpus auto` places the recipe on as many 80 GB cards."""
    config = load_config(ROOT / "configs" / f"geometry3k-{teacher.lower()}.toml")
    cards = [Card(index=index, gib=CARD_GIB) for index in range(gpus)]
    return place(cards, Demand.of(config, with_teacher=True))


def format_command(config: str, chosen: Placement) -> str:
    parts = chosen.flags.split(" --set ")
    return f"vaopd up {config} \\\n    " + " \\\n    --set ".join(parts)


def full_length_sequences(student: Model, utilization: float, length: int = 12_288) -> int:
    """Responses of the greatest length whose keys and values fit into a worker's share, weights and 4 GiB aside."""
    room = utilization * CARD_GIB * GIB - 2 * student.parameters - VLLM_BYTES
    return int(room / (student.kv_bytes_per_token * length))


def placement_sections() -> Iterator[str]:
    student = MODELS["2B"]
    for gpus in (2, 4, 8):
        rows, commands = [], []
        for name in ("4B", "8B", "32B"):
            chosen = choose(gpus, name)
            trainer = chosen.gpus["trainer"][0].split(",")
            shared = chosen.utilization if chosen.gpus["rollout"][0] in trainer else 0.0
            tokens = group_tokens(
                student, MODELS[name], ranks=len(trainer), pixels=PIXELS[1], taken_gib=CARD_GIB * shared
            )
            rows.append((
                name, " and ".join(chosen.gpus["teacher"]),
                *(",".join(chosen.gpus[role]).replace(",", ", ") for role in ("rollout", "trainer")),
                f"{chosen.utilization:.2f}", str(full_length_sequences(student, chosen.utilization)), f"{tokens:,}",
            ))  # fmt: skip
            commands.append(format_command(f"configs/geometry3k-{name.lower()}.toml", chosen))
        yield f"### {gpus} cards\n\n" + table(
            ("teacher", "its cards", "rollout workers", "trainer", "vLLM's share of its card",
             "responses of 12,288 tokens at once", "tokens of a group, image of 1,048,576 px"),
            rows,
        ) + "\n```bash\n" + "\n".join(commands) + "\n```\n"  # fmt: skip


def page() -> str:
    placements = "\n".join(placement_sections())
    return f"""# Memory and placement, computed

This page shows how much memory teacher, worker and trainer need, and which of 2, 4 or 8 cards each gets.
`python benchmarks/memory_table.py` computes it and says how; `make reference` updates the page. A GiB is 2^30 bytes.
An 80 GB card has {CARD_GIB} GiB, of which {MARGIN:.0%} are left as a margin. The memory of a layer's backward pass was
counted on the real layers, on a CPU; of the figures below only two were measured on a GPU.

## The models

{model_table()}
The teacher's forward has `teacher.batch_tokens = {BATCH_TOKENS}`. On several cards each text layer is split, while
embeddings, LM head and vision tower are whole on each (`teacher.processes`). Its cache of the vision tower's output is
in the host's memory.

## A trainer rank

{trainer_table()}
A group is one forward and backward: the prompt once, and all K responses. The longest group that fits on an 80 GB card
used by nothing else, in tokens, with an 8B teacher; – : the student doesn't fit whole.

{group_table()}
A large image costs as much as thousands of tokens: `data.max_pixels` is the first thing to lower, then
`rollout.max_new_tokens`, then `trainer.chunk_tokens`. Activations are checkpointed, which is the default on a GPU.

## Whole and sharded students

What a rank holds before the first token, in GiB, and the longest group that fits beside it, in tokens, with an image of
1,048,576 pixels and an 8B teacher. The columns are the ranks that hold one copy: all of them with
`trainer.sharding.kind = "full"`, `ranks_per_copy` of them with `"hybrid"`. – : nothing fits.

{sharding_table()}
Measured on one H200, with compiled layers and a group of 2650 tokens: a whole 2B took 34.2 GiB at its peak, where
41.3 are counted; sharded over one rank, which is all overhead and no share, 35.6, where 40.1 are counted. Without
compiled layers it took 43.2.

## Placement: a 2B student on 80 GB cards

The teacher gets as few cards as it fits on, and the 32B two if two more are left; with four more, there are two
teachers. Of the others, most go to the trainer. Look at a step's times in `vaopd report`: if *waiting for rollouts* is
long, add workers; if *waiting for scores* is long, add a teacher; otherwise add ranks.

{placements}"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="count the bytes kept for the backward pass again")
    parser.add_argument(
        "--measure-ranks", action="store_true", help="train small models on 1, 2 and 4 ranks, in minutes"
    )
    options = parser.parse_args()
    if options.measure:
        from kept_bytes import measure

        measure()
    elif options.measure_ranks:
        import rank_memory

        rank_memory.measure()
    else:
        print(page(), end="")
