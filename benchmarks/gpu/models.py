"""Makes models of the published shapes with random weights, and prompt groups of given lengths, on the device."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import groups
import numpy as np
import timing
import torch

from vaopd.tiny.tokenizer import build_processor
from vaopd.vlm import shared_attention
from vaopd.vlm.families import PreparedImage, find_family
from vaopd.vlm.model import Vlm
from vaopd.vlm.prompts import PreparedPrompt
from vaopd.vlm.torchvision_compat import ensure_torchvision
from vaopd_teacher.engines.engine import PreparedGroup
from vaopd_teacher.engines.transformers_engine import GroupEngine
from vaopd_teacher.engines.vision_cache import VisionCache
from vaopd_trainer.student_loss import WeightedGroup

DTYPE = getattr(torch, timing.DTYPE)
# Qwen/Qwen3-VL-NAME-Instruct, config.json: hidden, mlp, layers, heads, tied; the tower's hidden, mlp, depth, deepstack.
SIZES = {
    "2B": (2048, 6144, 28, 16, True, 1024, 4096, 24, [5, 11, 17]),
    "4B": (2560, 9728, 36, 32, True, 1024, 4096, 24, [5, 11, 17]),
    "8B": (4096, 12288, 36, 32, False, 1152, 4304, 27, [8, 16, 24]),
    "toy": (256, 512, 4, 4, False, 128, 256, 4, [0, 1, 2]),
}
VOCABULARY, PADDED = (151_669, 151_936) if timing.ON_GPU else (2000, 2048)
TEXT_TOKENS = 50
BATCH_TOKENS = 16_384


class Models:
    """The teacher and the student that several phases use; made when they are first asked for, one at a time."""

    teacher_size, student_size = ("8B", "2B") if timing.ON_GPU else ("toy", "toy")

    def __init__(self) -> None:
        self._made: dict[str, Vlm] = {}
        self._processor: Any = None

    def teacher(self) -> Vlm:
        """Returns the 8B in bfloat16."""
        return self._get("teacher", self.teacher_size, DTYPE)

    def student(self) -> Vlm:
        """Returns the 2B in float32, as the trainer has it."""
        return self._get("student", self.student_size, torch.float32)

    def drop(self) -> None:
        self._made.clear()
        gc.collect()
        if timing.ON_GPU:
            torch.cuda.empty_cache()

    def _get(self, role: str, size: str, dtype: torch.dtype) -> Vlm:
        if role not in self._made:
            self.drop()
            self._made[role] = self.make(size, dtype)
        return self._made[role]

    def make(self, size: str, dtype: torch.dtype, *, layers: int | None = None) -> Vlm:
        """Makes a model on the device, where its weights are drawn too: 8B on a CPU would take minutes."""
        ensure_torchvision()
        from transformers import Qwen3VLForConditionalGeneration

        shared_attention.register()
        torch.manual_seed(0)
        processor = self._get_processor()
        attention = {"text_config": shared_attention.ATTENTION, "vision_config": "sdpa", "": "sdpa"}
        with torch.device(timing.DEVICE):
            model = Qwen3VLForConditionalGeneration._from_config(
                make_config(processor, size, layers), dtype=dtype, attn_implementation=attention
            )
        # The place of a folder that isn't there: nothing is read from it.
        return Vlm(
            path=Path(size),
            model=model.eval(),
            processor=processor,
            config=model.config,
            family=find_family("qwen3_vl"),
        )

    def _get_processor(self) -> Any:
        if self._processor is None:
            self._processor = build_processor()
            self._processor.tokenizer = groups.widen(self._processor.tokenizer, VOCABULARY)
            self._processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 2048 * 2048}
        return self._processor


def make_config(processor: Any, size: str, layers: int | None) -> Any:
    hidden, mlp, depth_text, heads, tied, v_hidden, v_mlp, depth, deepstack = SIZES[size]
    toy = size == "toy"
    text = {"hidden_size": hidden, "intermediate_size": mlp, "num_attention_heads": heads, "vocab_size": PADDED}
    text |= {"num_hidden_layers": layers or depth_text, "num_key_value_heads": min(8, heads)}
    vision = {"depth": depth, "hidden_size": v_hidden, "intermediate_size": v_mlp, "num_heads": 2 if toy else 16}
    return groups.make_config(
        processor,
        text={**text, "max_position_embeddings": 262_144},
        vision={**vision, "deepstack_visual_indexes": deepstack},
        head_dim=64 if toy else 128,
        tied=tied,
    )


def make_image(tokens: int, seed: int, key: str | None = None) -> PreparedImage:
    """Makes noise of about `tokens` image tokens, as `Vlm.prepare_image` leaves it: in the model's precision."""
    height = max(1, math.isqrt(tokens))
    width = tokens // height
    generator = torch.Generator(timing.DEVICE).manual_seed(seed)
    pixels = (
        torch.randn((4 * height * width, 3 * 2 * 16 * 16), generator=generator, device=timing.DEVICE).to(DTYPE).cpu()
    )
    return PreparedImage(pixel_values=pixels, grid=(1, 2 * height, 2 * width), num_tokens=height * width, key=key)


def count_words(vlm: Vlm) -> int:
    """Returns the number of ids that are plain text."""
    return min(1500, vlm.vocab_size - 300)


def make_group(
    vlm: Vlm, prompt: int, lengths: Sequence[int], *, seed: int = 0, key: str | None = None
) -> PreparedGroup:
    """Makes a group: a prompt of `prompt` tokens, 50 of them text, and a response of each length."""
    rng = np.random.default_rng(seed)
    config, words = vlm.config, count_words(vlm)
    views = [make_image(prompt - TEXT_TOKENS, 2 * seed + i, None if key is None else f"{key}:{i}") for i in (0, 1)]
    n = views[0].num_tokens
    ids = np.concatenate(
        (
            [config.vision_start_token_id],
            [config.image_token_id] * n,
            [config.vision_end_token_id],
            rng.integers(0, words, prompt - n - 2),
        )
    ).astype(np.int64)
    return PreparedGroup(
        group_id=f"g{seed}",
        original=PreparedPrompt(token_ids=ids, images=(views[0],)),
        degraded=PreparedPrompt(token_ids=ids, images=(views[1],)),
        responses=tuple(rng.integers(0, words, length) for length in lengths),
        payload="hidden",
        top_k=0,
    )


def make_engine(vlm: Vlm, *, batch_tokens: int = BATCH_TOKENS) -> GroupEngine:
    cache = VisionCache(vlm, capacity_bytes=8 * 2**30)
    return GroupEngine(vlm, batch_tokens=batch_tokens, vision_cache=cache)


def make_weighted(vlm: Vlm, prompt: int, lengths: Sequence[int], *, width: int) -> WeightedGroup:
    """Makes a scored group for the student: random log-probs, and a teacher's hidden states (M, width)."""
    hidden = torch.randn(sum(lengths), width, device=timing.DEVICE).to(DTYPE).cpu()
    return groups.weigh(make_group(vlm, prompt, lengths), hidden, seed=0)
