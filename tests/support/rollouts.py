"""Random tiny students as policy snapshots, requests about small images, and what a plain forward says of responses."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from tests.support import tolerance
from vaopd.run.snapshots import describe_model
from vaopd.tiny.build import build_model
from vaopd.tiny.config import TinySize
from vaopd.tiny.tokenizer import build_processor
from vaopd.types import EncodedImage, ImagePart, Message, PolicyVersion, RolloutRequest, SamplingSettings, TextPart

# The LM head is tied, and padded: 496 rows for 479 ids.
SIZE = TinySize(
    hidden=64, layers=2, kv_heads=1, vision_hidden=32, vision_depth=1, deepstack=(0,), padded_vocab=496, tied=True
)
MAX_PIXELS = 64 * 64
"""Smaller than the 96×96 px of the images, so that the bound shows: 2×2 image tokens instead of 3×3."""


def random_student(folder: Path, *, version: int) -> PolicyVersion:
    """A snapshot with weights of its own for each version, odd ones in several files; two EOS ids, as Qwen3-VL has."""
    processor = build_processor()
    tokenizer = processor.tokenizer
    torch.manual_seed(version)
    model = build_model(SIZE, tokenizer)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    # A trap: an engine that mixes the model's own defaults in would sample from one token only.
    model.generation_config.do_sample = True
    model.generation_config.top_k = 1
    path = folder / f"v{version:06d}"
    model.save_pretrained(path, max_shard_size="100KB" if version % 2 else "5GB")
    processor.save_pretrained(path)
    return replace(describe_model(path), version=version)


def noise_image(seed: int) -> EncodedImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return EncodedImage(data=file.getvalue())


def ask(
    group_id: str = "g",
    *,
    images: tuple[EncodedImage, ...] = (),
    text: str = "Read the numbers.",
    rollouts: int = 4,
    version: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 16,
    seed: int = 0,
) -> RolloutRequest:
    """One user turn: the images, then the text."""
    content = (*(ImagePart(sha256=image.sha256) for image in images), TextPart(text=text))
    return RolloutRequest(
        group_id=group_id,
        messages=(Message(role="user", content=content),),
        images=images,
        num_rollouts=rollouts,
        sampling=SamplingSettings(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed),
        policy_version=version,
    )


class PlainStudent:
    """The reference: transformers' own processor and one forward over the whole sequence, no cache, no sampler."""

    def __init__(self, policy: PolicyVersion) -> None:
        from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

        self.processor = AutoProcessor.from_pretrained(policy.path, max_pixels=MAX_PIXELS)
        self.model = Qwen3VLForConditionalGeneration.from_pretrained(policy.path, dtype=torch.float32).eval()

    def inputs(self, request: RolloutRequest) -> Any:
        turn = {"role": "user", "content": [{"type": "image"} for _ in request.images]}
        turn["content"].append({"type": "text", "text": request.messages[0].content[-1].text})
        text = self.processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        images = [PIL.Image.open(io.BytesIO(image.data)) for image in request.images]
        # As in the paper: scaled to the pixel bounds first, each side floored; here only the upper one counts.
        shrinks = [min(1.0, (MAX_PIXELS / (image.width * image.height)) ** 0.5) for image in images]
        scaled = [
            image if shrink == 1 else image.resize((int(image.width * shrink), int(image.height * shrink)))
            for image, shrink in zip(images, shrinks, strict=True)
        ]
        return self.processor(text=[text], images=scaled or None, return_tensors="pt")

    @torch.inference_mode()
    def logprobs(self, request: RolloutRequest, response_ids: np.ndarray) -> np.ndarray:
        """(T, V) over the logical vocabulary, for the positions that predict the response."""
        inputs = self.inputs(request)
        prompt_tokens = inputs["input_ids"].shape[1]
        response = torch.from_numpy(response_ids.astype(np.int64))[None]
        extended = dict(inputs)
        extended["input_ids"] = torch.cat([inputs["input_ids"], response], dim=1)
        extended["attention_mask"] = torch.ones_like(extended["input_ids"])
        if "mm_token_type_ids" in inputs:
            text = torch.zeros_like(response, dtype=inputs["mm_token_type_ids"].dtype)
            extended["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], text], dim=1)
        logits = self.model(**extended).logits[0, prompt_tokens - 1 : -1, : len(self.processor.tokenizer)]
        return logits.double().log_softmax(dim=-1).numpy()

    def sampled_logprobs(self, request: RolloutRequest, response_ids: np.ndarray) -> np.ndarray:
        """(T,)"""
        return self.logprobs(request, response_ids)[np.arange(len(response_ids)), response_ids]

    def sampled_error(self, request: RolloutRequest, response_ids: np.ndarray) -> np.ndarray:
        """(T,): how far another float32 forward's log-probs may be from `sampled_logprobs`."""
        rows = torch.from_numpy(self.logprobs(request, response_ids))
        of_logits = tolerance.forward(self.model.config) * rows.abs().amax(-1, keepdim=True)
        return tolerance.log_softmax(rows, of_logits).numpy()[np.arange(len(response_ids)), response_ids]

    def greedy(self, request: RolloutRequest, *, banned: list[int], eos_ids: list[int]) -> list[int]:
        response: list[int] = []
        while len(response) < request.sampling.max_new_tokens and (not response or response[-1] not in eos_ids):
            # One token that is never looked at stands for the next: its place is predicted by the last real one.
            allowed = self.logprobs(request, np.array([*response, 0]))[-1].copy()
            allowed[banned] = -np.inf
            response.append(int(allowed.argmax()))
        return response
