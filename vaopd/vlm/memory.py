"""Counts what Qwen3-VL needs in GPU memory as teacher, as student in the trainer and in a rollout worker. Torch-free.

Everything follows from the models' configurations. Counted: weights, gradients and AdamW's moments, or a rank's share
of them, autocast's copies or the layers that are gathered, what the backward pass keeps with checkpointed activations,
one chunk of the divergence, the teacher's head. Not counted: fragmentation, NCCL and the CUDA context, for which
`MARGIN` is left. `python benchmarks/memory_table.py --measure` counts the bytes of `KEPT` on the real layers again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaopd.errors import ConfigError
from vaopd.files.hub import find_file

GIB = 2**30
MARGIN = 0.07
"""The share of a card that is left for fragmentation and the CUDA context."""
BATCH_TOKENS = 16_384
"""The default of teacher.batch_tokens."""
CHUNK_TOKENS = 1024
"""The default of trainer.chunk_tokens, and the teacher's own."""
PATCH_PX = 16
MERGE = 2
VLLM_BYTES = 4 * GIB
"""What vLLM takes beside weights and KV cache: its graphs and the activations that it profiles."""
_PUBLISHED = re.compile(r"Qwen/Qwen3-VL-(\w+)-(?:Instruct|Thinking)")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes in a Qwen3-VL's config.json; `name` is for messages."""

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

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, name: str) -> Model:
        """Reads a config.json. Raises ConfigError for a model of another shape than Qwen3-VL's."""
        try:
            text, vision = config["text_config"], config["vision_config"]
            return cls(
                name=name,
                hidden=text["hidden_size"],
                mlp=text["intermediate_size"],
                layers=text["num_hidden_layers"],
                heads=text["num_attention_heads"],
                tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
                vision_hidden=vision["hidden_size"],
                vision_mlp=vision["intermediate_size"],
                vision_depth=vision["depth"],
                kv_heads=text["num_key_value_heads"],
                head_dim=text["head_dim"],
                vocabulary=text["vocab_size"],
                vision_positions=vision["num_position_embeddings"],
                deepstack=len(vision["deepstack_visual_indexes"]),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{name}: its memory can't be counted, since its config.json is not Qwen3-VL's ({error} is missing); "
                "place the processes by --gpus ROLE=DEVICES"
            ) from None

    @property
    def text_parameters(self) -> int:
        """Weights of the text model, embeddings and LM head included."""
        norms = self.layers * (2 * self.head_dim + 2 * self.hidden) + self.hidden
        return self.split_parameters + norms + self.head_parameters * (1 if self.tied else 2)

    @property
    def head_parameters(self) -> int:
        """Weights of the LM head."""
        return self.vocabulary * self.hidden

    @property
    def vision_parameters(self) -> int:
        """Weights of the vision tower."""
        h, mlp = self.vision_hidden, self.vision_mlp
        block = 4 * h + (3 * h * h + 3 * h) + (h * h + h) + (2 * h * mlp + mlp + h)
        merged = h * MERGE**2
        merger = merged * merged + merged + merged * self.hidden + self.hidden
        embedding = 3 * 2 * PATCH_PX**2 * h + h + self.vision_positions * h
        return self.vision_depth * block + embedding + merger + 2 * h + self.deepstack * (merger + 2 * merged)

    @property
    def split_parameters(self) -> int:
        """Weights of the text layers' products, which tensor parallelism splits; each rank has all others."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The numbers of ranks that can share it by tensor parallelism: they divide the key and value heads."""
        return tuple(n for n in range(1, self.kv_heads + 1) if self.kv_heads % n == 0)

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.text_parameters + self.vision_parameters

    def count_adapter_parameters(self, rank: int, *, vision_tower: bool) -> int:
        """Counts LoRA's weights: rank · (in + out) of every linear layer but the LM head."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * (self.hidden + queries) + 2 * (self.hidden + keys)
        widths = self.layers * (attention + 3 * (self.hidden + self.mlp))
        if vision_tower:
            merged = self.vision_hidden * MERGE**2
            block = 6 * self.vision_hidden + 2 * (self.vision_hidden + self.vision_mlp)
            widths += self.vision_depth * block + (1 + self.deepstack) * (3 * merged + self.hidden)
        return rank * widths

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the KV cache for one token, in 16 bits."""
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
"""Qwen/Qwen3-VL-NAME-Instruct, by NAME."""


def find_model(name: str) -> Model:
    """Returns the sizes of a folder's model, or of a hub id: of Qwen's own without network, of others from the cache.

    Raises ConfigError when they are not known here.
    """
    if (match := _PUBLISHED.fullmatch(name)) and match[1] in MODELS and not Path(name).is_dir():
        return MODELS[match[1]]
    try:
        file = find_file(name, "config.json")
        if file is None:
            raise FileNotFoundError
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(
            f"{name}: its memory can't be counted, since there is no config.json of it here; download the model, or "
            "place the processes by --gpus ROLE=DEVICES"
        ) from None
    return Model.from_config(config, name=Path(name).name)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes of a token or patch at the peak of a backward pass (bfloat16 autocast), beside the layers' inputs.

    On a GPU the trainer checkpoints activations: layers keep their inputs only, and one at a time is computed again.
    """

    text_token: int
    """One layer that is computed again, with its gradients, and what is kept outside the layers."""
    patch_block: int
    """What one block keeps, without its gradients."""
    patch: int


KEPT = {
    "2B": Kept(text_token=167_088, patch_block=38_992, patch=17_978),
    "4B": Kept(text_token=246_064, patch_block=38_992, patch=17_978),
    "8B": Kept(text_token=314_672, patch_block=42_640, patch=19_834),
    "32B": Kept(text_token=531_504, patch_block=42_640, patch=19_834),
}
"""As counted on the real layers."""


def find_kept(model: Model) -> Kept:
    """Returns what was counted for a published model; for others, the 2B's bytes by the layers' widths."""
    if MODELS.get(model.name) == model and model.name in KEPT:
        return KEPT[model.name]
    base, kept = MODELS["2B"], KEPT["2B"]

    def width(of: Model) -> int:
        return 4 * of.hidden + 3 * of.mlp + 2 * of.heads * of.head_dim

    vision = model.vision_hidden / base.vision_hidden
    return Kept(
        text_token=round(kept.text_token * width(model) / width(base)),
        patch_block=round(kept.patch_block * vision),
        patch=round(kept.patch * vision),
    )


def count_teacher_working_bytes(
    model: Model, *, batch_tokens: int = BATCH_TOKENS, ranks: int = 1, width: int = 2
) -> int:
    """One forward: the widest layer's tensors, and one chunk of logits in float32 (on rank 0 alone).

    width: bytes of a number in the teacher's dtype, here and below.
    """
    split = 3 * model.mlp + (model.heads + 2 * model.kv_heads) * model.head_dim
    layer = 4 * model.hidden + split // ranks
    return width * batch_tokens * layer + CHUNK_TOKENS * model.vocabulary * (width + 4 + 4)


def count_teacher_bytes(model: Model, *, batch_tokens: int = BATCH_TOKENS, ranks: int = 1, width: int = 2) -> int:
    """A rank's weights and one forward: its share of the layers; embeddings, LM head and tower whole."""
    whole = model.parameters - model.split_parameters
    weights = width * (whole + model.split_parameters // ranks)
    return weights + count_teacher_working_bytes(model, batch_tokens=batch_tokens, ranks=ranks, width=width)


def count_trainer_fixed_bytes(
    student: Model,
    teacher_head_bytes: int,
    *,
    ranks: int,
    shards: int = 1,
    chunk_tokens: int = CHUNK_TOKENS,
    adapters: int = 0,
    moment_bytes: int = 8,
    width: int = 2,
) -> int:
    """A rank without any group: its part of the student, the teacher's head, and one chunk of the divergence.

    teacher_head_bytes: 0 for a payload that doesn't need it. shards: ranks that hold one copy of the student together.
    adapters: LoRA's weights, which learn in place of the student's; 0: it learns whole. moment_bytes: of AdamW for a
    weight; 2 with `trainer.optimizer = "adamw_8bit"`. width: bytes of a number in the student's dtype.
    """
    if adapters:
        # The student in its dtype, spread over the shards; adapters whole, as an upper bound.
        held = -(-width * student.parameters // shards)
        held += _count_whole_bytes(adapters, ranks=ranks, moment_bytes=8, width=width)
    elif shards == 1:
        held = _count_whole_bytes(student.parameters, ranks=ranks, moment_bytes=moment_bytes, width=width)
    else:
        held = _count_sharded_bytes(student, shards=shards, width=width)
    return (
        held
        + teacher_head_bytes
        + (0 if adapters else 4 * student.head_parameters)  # the head's gradient, summed over the chunks
        + (_count_gathered_bytes(student, width=width) if adapters and shards > 1 else 0)
        + count_chunk_bytes(student, chunk_tokens=chunk_tokens, width=width)
    )


def _count_whole_bytes(parameters: int, *, ranks: int, moment_bytes: int, width: int) -> int:
    """Float32 weights and gradients, moments, and autocast's copies; with several ranks, DDP's buckets."""
    return (4 + 4 + moment_bytes + (2 if width == 2 else 0) + (4 if ranks > 1 else 0)) * parameters


def _count_gathered_bytes(student: Model, *, width: int) -> int:
    """What FSDP2 gathers of weights that don't learn: embeddings and LM head, and two layers."""
    ends = student.head_parameters * (1 if student.tied else 2)
    return width * ends + 2 * width * (student.text_parameters - ends) // student.layers


def _count_sharded_bytes(student: Model, *, shards: int, width: int) -> int:
    """A share of float32 weights, gradients and moments; and what FSDP2 gathers, in the student's dtype.

    Embeddings and LM head from the forward to the end of the backward, two layers at a time; with their gradients,
    which are summed over the ranks in float32.
    """
    ends = student.head_parameters * (1 if student.tied else 2)
    layer = (student.text_parameters - ends) // student.layers
    return -(-16 * student.parameters // shards) + (2 * width + 4) * ends + (3 * width + 4) * layer


def count_chunk_bytes(student: Model, *, chunk_tokens: int = CHUNK_TOKENS, width: int = 2) -> int:
    """One chunk of the fused loss: both models' logits as the product leaves them, three matrices in float32."""
    return chunk_tokens * student.vocabulary * (2 * width + 3 * 4)


def count_image_bytes(student: Model, pixels: int, *, width: int = 2) -> int:
    """Each block's input in float32, and one block at a time computed again."""
    patches = pixels // PATCH_PX**2
    kept = find_kept(student)
    # Counted in bfloat16; in float32 at most twice as much.
    return patches * (student.vision_depth * 4 * student.vision_hidden + (kept.patch_block + kept.patch) * width // 2)


def count_token_bytes(student: Model, *, width: int = 2) -> int:
    """Each layer's input in float32, and one layer at a time computed again."""
    return student.layers * 4 * student.hidden + find_kept(student).text_token * width // 2


def count_group_tokens(student: Model, *, room_bytes: float, pixels: int, width: int = 2) -> int:
    """The longest group (prompt and all responses) whose forward and backward fit into `room_bytes` with its image."""
    room_bytes -= count_image_bytes(student, pixels, width=width)
    return max(0, int(room_bytes / count_token_bytes(student, width=width)))


def count_forward_tokens(student: Model, *, room_bytes: float, width: int = 2) -> int:
    """The most tokens whose forward and backward fit into `room_bytes` even if all of them are of images."""
    image_bytes = count_image_bytes(student, (PATCH_PX * MERGE) ** 2, width=width)
    token_bytes = count_token_bytes(student, width=width) + image_bytes
    return max(1, int(room_bytes / token_bytes))


def count_worker_bytes(student: Model, *, length: int, ranks: int = 1, width: int = 2) -> int:
    """The least that each card of a vLLM worker holds: weights, vLLM's own, and the keys of one prompt and response."""
    return VLLM_BYTES + width * (student.parameters + student.kv_bytes_per_token // 2 * length) // ranks
