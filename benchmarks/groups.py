"""Makes random models and prompt groups of a given shape.

The models are Qwen3-VL of the real classes with random weights: text 384 wide and 8 layers, vision 256 wide and 6
layers, about 36 M parameters with a vocabulary of 32 000 and 82 M with 151 936. Nothing is downloaded.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from timing import DEVICE, DTYPE

from vaopd.config import VaOpd
from vaopd.degradation import degrade
from vaopd.payloads import from_torch
from vaopd.tiny.tokenizer import SPECIAL_TOKENS, assemble_tokenizer, build_processor
from vaopd.types import Degradation, GroupScore, ImagePart, Message, Payload, Rollout, RolloutGroup, TextPart
from vaopd.vlm.families import PreparedImage
from vaopd.vlm.model import Vlm
from vaopd.vlm.prompts import PreparedPrompt
from vaopd.vlm.torchvision_compat import ensure_torchvision
from vaopd_teacher.engines.engine import EngineResult, PreparedGroup
from vaopd_teacher.engines.transformers_engine import GroupEngine
from vaopd_teacher.engines.vision_cache import VisionCache
from vaopd_trainer import student_loss
from vaopd_trainer.student_loss import ScoredGroup, WeightedGroup

PATCH_PX, MERGE = 16, 2
MAX_POSITIONS = 8192
BATCH_TOKENS = 16_384
"""The configuration's default."""
VISION_CACHE_BYTES = 2**28
IMAGE_SIDES = {150: (11, 11), 650: (25, 24), 1500: (38, 38)}
"""Prompt tokens -> image tokens by height and width that leave room for a question."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One prompt group: P prompt tokens (150, 650 or 1500), R response tokens, K rollouts.

    ragged: response k has R·(k + 1)/K tokens instead of R, as sampled responses do.
    """

    prompt: int
    response: int
    rollouts: int
    ragged: bool = False

    def __str__(self) -> str:
        return f"P {self.prompt}, R {self.response}{' ragged' if self.ragged else ''}, K {self.rollouts}"

    @property
    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.response] * self.rollouts
        return [max(1, self.response * (k + 1) // self.rollouts) for k in range(self.rollouts)]


HEADLINE = Shape(prompt=650, response=128, rollouts=4)
QUICK = Shape(prompt=150, response=16, rollouts=2)


# ---------------------------------------------------------------------------------------------------------- the models


def save_model(folder: Path, *, vocabulary: int, layers: int = 8) -> Path:
    """Saves a random Qwen3-VL with tokenizer and processor in a folder that transformers and vLLM can load."""
    ensure_torchvision()
    from transformers import Qwen3VLForConditionalGeneration

    quiet()
    processor = build_processor()
    processor.tokenizer = widen(processor.tokenizer, vocabulary)
    processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 2048 * 2048}
    text = {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": layers, "num_attention_heads": 6}
    vision = {"depth": 6, "hidden_size": 256, "intermediate_size": 1024, "num_heads": 4}
    config = make_config(
        processor,
        text={**text, "vocab_size": vocabulary, "num_key_value_heads": 2, "max_position_embeddings": MAX_POSITIONS},
        vision={**vision, "deepstack_visual_indexes": [1, 3]},
        head_dim=64,
        tied=True,
    )
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_config(processor: Any, *, text: dict[str, Any], vision: dict[str, Any], head_dim: int, tied: bool) -> Any:
    """Returns a Qwen3-VL's configuration with the processor's ids; `text`, `vision`: sizes by transformers' names."""
    from transformers import Qwen3VLConfig

    ids = processor.tokenizer.get_vocab()
    rope = {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_interleaved": True}
    rope["mrope_section"] = [head_dim * part // 32 for part in (6, 5, 5)]
    return Qwen3VLConfig(
        text_config={
            "head_dim": head_dim,
            "rope_parameters": rope,
            "tie_word_embeddings": tied,
            "eos_token_id": processor.tokenizer.eos_token_id,
            "bos_token_id": None,
            **text,
        },
        vision_config={
            "out_hidden_size": text["hidden_size"],
            "patch_size": PATCH_PX,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "num_position_embeddings": 48**2,
            **vision,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )


def widen(tokenizer: Any, vocabulary: int) -> Any:
    """Adds entries that no merge makes, so that the tiny tokenizer's vocabulary is as wide as the LM head."""
    learned = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = dict(learned["vocab"])
    for index in range(len(words), vocabulary - len(SPECIAL_TOKENS)):
        words[f"unused{index}"] = index
    return assemble_tokenizer(words, learned["merges"], max_positions=MAX_POSITIONS)


@contextmanager
def model_folder(vocabulary: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vaopd-benchmark-") as name:
        yield save_model(Path(name), vocabulary=vocabulary)


def load(folder: Path) -> Vlm:
    quiet()
    return Vlm.load(folder, dtype=DTYPE, device=DEVICE)


def load_plain(folder: Path) -> Any:
    """Loads the same weights with transformers' own attention, as without this project."""
    from transformers import AutoModelForImageTextToText

    quiet()
    model: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=getattr(torch, DTYPE), attn_implementation="sdpa"
    )
    return model.to(DEVICE).eval()


def quiet() -> None:
    """Switches off transformers' progress bars, so that a command prints only its table."""
    from transformers.utils import logging

    logging.disable_progress_bar()


# ---------------------------------------------------------------------------------------------------------- the groups


def picture(shape: Shape, seed: int) -> PIL.Image.Image:
    """Draws noise of a size that leaves room for the question."""
    height, width = (side * PATCH_PX * MERGE for side in IMAGE_SIDES[shape.prompt])
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def both_views(shape: Shape, seed: int) -> list[PIL.Image.Image]:
    original = picture(shape, seed)
    return [original, degrade(original, Degradation(), seed=0)]


def prepare(vlm: Vlm, images: Sequence[PIL.Image.Image], *, key: str | None = None) -> list[PreparedImage]:
    """Turns images into the vision tower's input. `key` names them for caches; without it, none keeps them."""
    return [
        replace(vlm.prepare_image(image), key=None if key is None else f"{key}:{index}")
        for index, image in enumerate(images)
    ]


def prompt_ids(vlm: Vlm, shape: Shape, image: PreparedImage) -> np.ndarray:
    """Renders a prompt (P,): the image and a question long enough to reach P."""
    message = Message(role="user", content=(ImagePart(sha256="image"), TextPart(text="What is the perimeter?")))
    ids = vlm.render([message], {"image": image}).token_ids
    end = int(np.flatnonzero(ids == vlm.family.image_token_id(vlm.model.config))[-1]) + 2
    if (missing := shape.prompt - len(ids)) < 0:
        raise SystemExit(f"the prompt has {len(ids)} tokens, not {shape.prompt}; use a smaller image")
    return np.concatenate((ids[:end], np.resize(ids[end:], missing), ids[end:]))


def response_ids(vlm: Vlm, shape: Shape, seed: int) -> tuple[np.ndarray, ...]:
    """Draws K arrays (T_k,) of random token ids, none of them special."""
    rng = np.random.default_rng(seed + 1)
    words = vlm.vocab_size - len(SPECIAL_TOKENS)
    return tuple(rng.integers(0, words, length) for length in shape.lengths)


def group(vlm: Vlm, shape: Shape, *, seed: int = 0, images: Sequence[PreparedImage] | None = None) -> PreparedGroup:
    """Makes a prompt group that is ready for the engine, with the hidden payload."""
    original, degraded = images or prepare(vlm, both_views(shape, seed))
    ids = prompt_ids(vlm, shape, original)
    return PreparedGroup(
        group_id=f"group-{seed}",
        original=PreparedPrompt(token_ids=ids, images=(original,)),
        degraded=PreparedPrompt(token_ids=ids, images=(degraded,)),
        responses=response_ids(vlm, shape, seed),
        payload="hidden",
        top_k=0,
    )


def weigh(prepared: PreparedGroup, hidden: torch.Tensor, *, seed: int) -> WeightedGroup:
    """Scores and weighs a group for the student: random log-probs, and a teacher's hidden states (M, D_T)."""
    rng = np.random.default_rng(seed)
    teacher, advantage = (tuple(rng.random(len(ids), dtype=np.float32) for ids in prepared.responses) for _ in range(2))
    teacher = tuple(-row for row in teacher)
    score = GroupScore(
        group_id=prepared.group_id,
        teacher_logprobs=teacher,
        degraded_logprobs=tuple(t - a for t, a in zip(teacher, advantage, strict=True)),
        visual_advantage=advantage,
        payload=Payload(kind="hidden", tensors={"hidden": from_torch(hidden)}),
        prompt_tokens=len(prepared.original.token_ids),
    )
    rollouts = tuple(
        Rollout(rollout_id=str(k), response_ids=ids.astype(np.int32), rollout_logprobs=p, finish_reason="length")
        for k, (ids, p) in enumerate(zip(prepared.responses, teacher, strict=True))
    )
    rollout_group = RolloutGroup(
        group_id=prepared.group_id,
        policy_version=0,
        policy_sha256="",
        prompt_token_ids=prepared.original.token_ids.astype(np.int32),
        rollouts=rollouts,
        worker="benchmark",
        generation_s=0.0,
    )
    return student_loss.weigh(
        ScoredGroup(index=0, group=rollout_group, prompt=prepared.original, score=score), VaOpd(), seed=0
    )


def with_images(prepared: PreparedGroup, images: Sequence[PreparedImage]) -> PreparedGroup:
    """Returns the group with other images of the same size."""
    original, degraded = images
    return replace(
        prepared,
        original=replace(prepared.original, images=(original,)),
        degraded=replace(prepared.degraded, images=(degraded,)),
    )


def engine_for(vlm: Vlm) -> GroupEngine:
    """Makes the engine as the server does, with a cache for some images' features."""
    cache = VisionCache(vlm, capacity_bytes=VISION_CACHE_BYTES)
    return GroupEngine(vlm, batch_tokens=BATCH_TOKENS, vision_cache=cache)


def score(engine: GroupEngine, groups: Sequence[PreparedGroup]) -> list[EngineResult]:
    results = list(engine.score(groups))
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results  # type: ignore[return-value]


def logprobs(results: Sequence[EngineResult]) -> np.ndarray:
    """Concatenates both views' log-probs of every group: (2·M,)."""
    return np.concatenate(
        [part for r in results for part in (r.columns["teacher_logprobs"], r.columns["degraded_logprobs"])]
    )


def image_tokens(shape: Shape) -> int:
    height, width = IMAGE_SIDES[shape.prompt]
    return height * width
