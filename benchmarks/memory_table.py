"""What Qwen3-VL needs in GPU memory as teacher, as student in the trainer and in the rollout engine; who goes where.

One command, its tables in Markdown: `python benchmarks/memory_table.py`. Everything follows from the published
configurations; nothing is downloaded and no GPU is needed. The bytes that a trainer keeps for the backward pass were
measured on the real layers (`--measure` does it again, on the CPU, in half a minute). Activations are checkpointed.

What is counted: weights, gradients, AdamW's moments, autocast's copies, what the backward pass keeps, one chunk of the
divergence, the teacher's head. What is not: fragmentation, NCCL and the CUDA context, for which a margin is left.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

GIB = 2**30
CARD_GIB = 79.1  # what an 80 GB card offers
MARGIN = 0.07  # for fragmentation and the context
BATCH_TOKENS = 16_384  # teacher.batch_tokens
CHUNK_TOKENS = 1024  # trainer.chunk_tokens, and the teacher's own
ROLLOUTS = 4
PATCH_PX = 16
MERGE = 2
# The paper's bounds on an image, and one between them.
PIXELS = (262_144, 1_048_576, 4_194_304)
PROMPTS_PER_STEP = 16


@dataclass(frozen=True, kw_only=True)
class Model:
    """The published config.json of Qwen/Qwen3-VL-NAME-Instruct, as far as it has to do with sizes."""

    name: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    tied: bool
    vision_hidden: int
    vision_mlp: int
    vision_depth: int
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 151_936
    vision_positions: int = 2304
    deepstack: int = 3

    @property
    def text_parameters(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads) + 2 * self.head_dim
        layer = attention + 3 * self.hidden * self.mlp + 2 * self.hidden
        return self.layers * layer + self.hidden + self.head_parameters * (1 if self.tied else 2)

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def vision_parameters(self) -> int:
        h, mlp = self.vision_hidden, self.vision_mlp
        block = 4 * h + (3 * h * h + 3 * h) + (h * h + h) + (2 * h * mlp + mlp + h)
        merged = h * MERGE**2
        merger = merged * merged + merged + merged * self.hidden + self.hidden
        embedding = 3 * 2 * PATCH_PX**2 * h + h + self.vision_positions * h
        return self.vision_depth * block + embedding + merger + 2 * h + self.deepstack * (merger + 2 * merged)

    @property
    def parameters(self) -> int:
        return self.text_parameters + self.vision_parameters

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


MODELS = {
    model.name: model
    for model in (
        Model(name="2B", hidden=2048, mlp=6144, layers=28, heads=16, tied=True,
              vision_hidden=1024, vision_mlp=4096, vision_depth=24),
        Model(name="4B", hidden=2560, mlp=9728, layers=36, heads=32, tied=True,
              vision_hidden=1024, vision_mlp=4096, vision_depth=24),
        Model(name="8B", hidden=4096, mlp=12288, layers=36, heads=32, tied=False,
              vision_hidden=1152, vision_mlp=4304, vision_depth=27),
        Model(name="32B", hidden=5120, mlp=25600, layers=64, heads=64, tied=False,
              vision_hidden=1152, vision_mlp=4304, vision_depth=27),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that the backward pass of a layer needs (bfloat16 autocast), by `--measure`.

    On a GPU the trainer checkpoints activations: layers keep their inputs only, and one at a time is computed again.
    """

    text_token_layer: int
    text_token: int
    patch_block: int
    patch: int


KEPT = {
    "2B": Kept(text_token_layer=133_288, text_token=17_420, patch_block=38_992, patch=17_978),
    "4B": Kept(text_token_layer=195_880, text_token=21_516, patch_block=38_992, patch=17_978),
}


def teacher_working_bytes(model: Model) -> int:
    """One forward of BATCH_TOKENS in bfloat16: the widest layer's tensors, and one chunk of logits in float32."""
    layer = 4 * model.hidden + 3 * model.mlp + (model.heads + 2 * model.kv_heads) * model.head_dim
    return 2 * BATCH_TOKENS * layer + CHUNK_TOKENS * model.vocabulary * (2 + 4 + 4)


def teacher_bytes(model: Model) -> int:
    return 2 * model.parameters + teacher_working_bytes(model)


def trainer_fixed_bytes(student: Model, teacher: Model, *, ranks: int) -> int:
    """A rank without any group: float32 weights, gradients, moments; autocast's copies; the teacher's head; one chunk.

    With several ranks, DistributedDataParallel keeps its buckets beside the gradients.
    """
    per_parameter = 4 + 4 + 8 + 2 + (4 if ranks > 1 else 0)
    return (
        per_parameter * student.parameters
        + 2 * teacher.head_parameters
        + 4 * student.head_parameters  # the head's gradient, summed over the chunks
        + chunk_bytes(student)
    )


def chunk_bytes(student: Model) -> int:
    """One chunk of the fused loss: both models' logits as the product leaves them, three matrices in float32."""
    return CHUNK_TOKENS * student.vocabulary * (2 * 2 + 3 * 4)


def image_bytes(student: Model, pixels: int) -> int:
    """Each block's input in float32, and one block at a time computed again."""
    patches = pixels // PATCH_PX**2
    kept = KEPT[student.name]
    return patches * (student.vision_depth * 4 * student.vision_hidden + kept.patch_block + kept.patch)


def token_bytes(student: Model) -> int:
    """Each layer's input in float32, and one layer at a time computed again."""
    kept = KEPT[student.name]
    return student.layers * 4 * student.hidden + kept.text_token_layer + kept.text_token


def group_tokens(student: Model, teacher: Model, *, ranks: int, pixels: int, gpus_gib: float = CARD_GIB) -> int:
    """The longest group (prompt and all responses) whose forward and backward fit beside everything else."""
    room = gpus_gib * (1 - MARGIN) * GIB - trainer_fixed_bytes(student, teacher, ranks=ranks)
    return max(0, int((room - image_bytes(student, pixels)) / token_bytes(student)))


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
        cards = math.ceil(teacher_bytes(model) / GIB / usable())
        rows.append((
            model.name, f"{model.parameters:,}", gib(2 * model.parameters), gib(teacher_working_bytes(model)),
            str(cards), gib(2 * model.head_parameters), f"{2 * model.hidden:,}", f"{model.kv_bytes_per_token // 1024}",
        ))  # fmt: skip
    return table(
        ("Qwen3-VL", "parameters", "weights, bf16 (GiB)", "teacher's forward (GiB)", "80 GB cards as teacher",
         "LM head, bf16 (GiB)", "hidden payload (bytes a token)", "KV cache (KiB a token)"),
        rows,
    )  # fmt: skip


def trainer_table() -> str:
    student, rows = MODELS["2B"], []
    per_parameter = ((4, "weights"), (4, "gradients"), (8, "AdamW's moments"), (2, "autocast's bf16 copies"))
    for size, name in per_parameter:
        rows.append((name, f"{size} bytes × parameters", gib(size * student.parameters)))
    rows.append(("gradient buckets, with `trainer.processes` > 1", "4 bytes × parameters", gib(4 * student.parameters)))
    rows.append(("gradient of the head, summed over chunks", "4 bytes × head", gib(4 * student.head_parameters)))
    name = f"one chunk of the divergence (`trainer.chunk_tokens = {CHUNK_TOKENS}`)"
    rows.append((name, "16 bytes × tokens × vocabulary", gib(chunk_bytes(student))))
    for name in ("4B", "8B", "32B"):
        head = gib(2 * MODELS[name].head_parameters)
        rows.append((f"head of the {name} teacher (payload `hidden` only)", "2 bytes × head", head))
    rows.append(("kept for the backward pass, per 1000 tokens of a group", f"{token_bytes(student):,} bytes a token",
                 gib(1000 * token_bytes(student))))  # fmt: skip
    for pixels in PIXELS:
        patches = f"{pixels // PATCH_PX**2:,} patches"
        rows.append((f"the same, an image of {pixels:,} pixels", patches, gib(image_bytes(student, pixels))))
    return table(("part of a trainer rank, 2B student", "size", "GiB"), rows)


def group_table() -> str:
    student, rows = MODELS["2B"], []
    for teacher in ("4B", "8B", "32B"):
        for ranks in (1, 2):
            fits = [group_tokens(student, MODELS[teacher], ranks=ranks, pixels=pixels) for pixels in PIXELS]
            rows.append((teacher, "1" if ranks == 1 else "2 and more", *(f"{tokens:,}" for tokens in fits)))
    return table(
        ("teacher", "trainer ranks", *(f"tokens of a group, image of {pixels:,} px" for pixels in PIXELS)), rows
    )


@dataclass(frozen=True, kw_only=True)
class Placement:
    """CUDA devices by role; `rollout` has one entry per worker. `utilization`: vLLM's share of its card."""

    teacher: tuple[int, ...]
    rollout: tuple[int, ...]
    trainer: tuple[int, ...]
    utilization: float

    def command(self, config: str) -> str:
        workers = [("rollout", (device,)) for device in self.rollout]
        roles = [("teacher", self.teacher), *workers, ("trainer", self.trainer)]
        parts = [f"--gpus {role}={','.join(map(str, devices))}" for role, devices in roles]
        options = []
        if len(self.rollout) > 1:
            options.append(f"--set rollout.workers={len(self.rollout)}")
        if len(self.trainer) > 1:
            options.append(f"--set trainer.processes={len(self.trainer)}")
        if self.utilization != 0.85:
            options.append(f"--set rollout.engine_options.gpu_memory_utilization={self.utilization:.2f}")
        return f"vaopd up {config} \\\n    " + " \\\n    ".join((" ".join(parts), *options))


def placement(gpus: int, teacher: Model, student: Model) -> Placement:
    """The teacher on as few cards as hold it; of the others, most go to the trainer, whose ranks must divide B.

    On two cards, the workers share the card that has more room left.
    """
    cards = math.ceil(teacher_bytes(teacher) / GIB / usable())
    teacher_cards = tuple(range(cards))
    rest = gpus - cards
    if rest == 1:
        trainer = (cards,)
        beside_teacher = usable() - teacher_bytes(teacher) / GIB / cards
        # Beside the trainer, a group of 20 000 tokens with a middling image has to fit too.
        group = 20_000 * token_bytes(student) + image_bytes(student, PIXELS[1])
        beside_trainer = usable() - (trainer_fixed_bytes(student, teacher, ranks=1) + group) / GIB
        device, room = max(((0, beside_teacher), (cards, beside_trainer)), key=lambda pair: pair[1])
        utilization = math.floor(min(0.85, room / CARD_GIB) * 20) / 20
        return Placement(teacher=teacher_cards, rollout=(device,), trainer=trainer, utilization=utilization)
    ranks = max(n for n in (1, 2, 4, 8) if n < rest and PROMPTS_PER_STEP % n == 0)
    trainer = tuple(range(gpus - ranks, gpus))
    return Placement(
        teacher=teacher_cards, rollout=tuple(range(cards, gpus - ranks)), trainer=trainer, utilization=0.85
    )


def full_length_sequences(student: Model, utilization: float, length: int = 12_288) -> int:
    """Responses of the greatest length whose keys and values fit into a worker's share, weights and 4 GiB aside."""
    room = utilization * CARD_GIB * GIB - 2 * student.parameters - 4 * GIB
    return int(room / (student.kv_bytes_per_token * length))


def placement_sections() -> Iterator[str]:
    student = MODELS["2B"]
    for gpus in (2, 4, 8):
        rows, commands = [], []
        for name in ("4B", "8B", "32B"):
            teacher = MODELS[name]
            chosen = placement(gpus, teacher, student)
            ranks = len(chosen.trainer)
            shared = chosen.utilization if chosen.rollout[0] in chosen.trainer else 0.0
            tokens = group_tokens(
                student, teacher, ranks=ranks, pixels=PIXELS[1], gpus_gib=CARD_GIB * (1 - shared / (1 - MARGIN))
            )
            rows.append((
                name, ", ".join(map(str, chosen.teacher)), ", ".join(map(str, chosen.rollout)),
                ", ".join(map(str, chosen.trainer)), f"{chosen.utilization:.2f}",
                str(full_length_sequences(student, chosen.utilization)), f"{tokens:,}",
            ))  # fmt: skip
            commands.append(chosen.command(f"configs/geometry3k-{name.lower()}.toml"))
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
An 80 GB card has {CARD_GIB} GiB, of which {MARGIN:.0%} are left as a margin. Nothing here has been measured on a GPU;
the memory of a layer's backward pass was counted on the real layers, on a CPU.

## The models

{model_table()}
The teacher's forward has `teacher.batch_tokens = {BATCH_TOKENS}`. Its cache of the vision tower's output is in the
host's memory.

## A trainer rank

{trainer_table()}
A group is one forward and backward: the prompt once, and all K responses. The longest group that fits on an 80 GB card
used by nothing else, in tokens:

{group_table()}
A large image costs as much as thousands of tokens: `data.max_pixels` is the first thing to lower, then
`rollout.max_new_tokens`, then `trainer.chunk_tokens`. Activations are checkpointed, which is the default on a GPU.
Weights are replicated on every rank, not sharded.

## Placement: a 2B student on 80 GB cards

The teacher gets as few cards as it fits on; of the others, most go to the trainer. Look at a step's times in
`vaopd report`: if *waiting for rollouts* is long, add workers; if *waiting for scores* is long, add a teacher;
otherwise add ranks.

{placements}"""


def measure() -> None:
    """Counts the bytes that autograd keeps on the real layers, by differences in layers and tokens."""
    from vaopd.vlm.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.set_num_threads(1)

    def build(model: Model, layers: int, depth: int) -> torch.nn.Module:
        text = {"vocab_size": 64, "hidden_size": model.hidden, "intermediate_size": model.mlp,
                "num_hidden_layers": layers, "num_attention_heads": model.heads,
                "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim}  # fmt: skip
        vision = {"depth": depth, "hidden_size": model.vision_hidden, "intermediate_size": model.vision_mlp,
                  "num_heads": 16, "out_hidden_size": model.hidden, "patch_size": PATCH_PX,
                  "deepstack_visual_indexes": [0], "num_position_embeddings": model.vision_positions}  # fmt: skip
        config = Qwen3VLConfig(text_config=text, vision_config=vision)
        return Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").train()

    def kept(network: torch.nn.Module, run: object) -> int:
        parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        storages: dict[int, torch.Tensor] = {}  # the tensors are held, so that no address comes twice

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            run()  # type: ignore[operator]
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    for name in KEPT:
        model, text, vision = MODELS[name], {}, {}
        for size in (1, 2):
            network = build(model, size, size)
            for tokens in (64, 128):
                ids = torch.full((1, tokens), 5)
                text[size, tokens] = kept(
                    network, lambda n=network, i=ids: n.model.language_model(input_ids=i, use_cache=False)
                )
                pixels, grid = torch.randn(tokens, 3 * 2 * PATCH_PX**2), torch.tensor([[1, tokens // 16, 16]])
                vision[size, tokens] = kept(network, lambda n=network, p=pixels, g=grid: n.model.visual(p, grid_thw=g))
        found = []
        for counts in (text, vision):
            each = (counts[2, 128] - counts[2, 64] - counts[1, 128] + counts[1, 64]) / 64
            found += [round(each), round((counts[1, 128] - counts[1, 64]) / 64 - each)]
        print(name, Kept(text_token_layer=found[0], text_token=found[1], patch_block=found[2], patch=found[3]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="count the bytes kept for the backward pass again")
    if parser.parse_args().measure:
        measure()
    else:
        print(page(), end="")
