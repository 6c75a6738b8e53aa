"""Measures a tiny model's greedy accuracy on figures drawn with held-out scans."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from vaopd.data.handwritten_geometry import Question, Split, draw, draw_question, load_scans
from vaopd.degradation import pixelate
from vaopd.evaluation import committed_answer, is_correct
from vaopd.tiny.tokenizer import render_chat

if TYPE_CHECKING:
    from PIL import Image
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

MAX_NEW_TOKENS = 64
BATCH = 50


def measure_accuracy(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    *,
    num_questions: int,
    split: Split = "test",
    seed: int = 0,
) -> dict[str, float]:
    """Measures the share of right greedy answers, 0 to 1.

    Returns "accuracy", "accuracy_pixelated" (images pixelated to 10 %) and "accuracy_KIND" for each kind of question.
    """
    rng = np.random.default_rng(seed)
    by_kind: dict[str, list[tuple[Question, Image.Image]]] = defaultdict(list)
    for _ in range(num_questions):
        question = draw_question(rng)
        by_kind[question.kind].append((question, draw(question, load_scans(split), rng)))
    right: dict[str, float] = defaultdict(int)
    right_pixelated = 0
    model.eval()
    for kind, asked in by_kind.items():  # prompts of one kind are equally long, so none needs padding
        for start in range(0, len(asked), BATCH):
            batch = asked[start : start + BATCH]
            right[kind] += _count_right(model, processor, batch)
            right_pixelated += _count_right(
                model, processor, [(question, pixelate(image)) for question, image in batch]
            )
    return {
        "accuracy": round(sum(right.values()) / num_questions, 4),
        "accuracy_pixelated": round(right_pixelated / num_questions, 4),
        **{f"accuracy_{kind}": round(right[kind] / len(by_kind[kind]), 4) for kind in sorted(by_kind)},
    }


def _count_right(
    model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, batch: list[tuple[Question, Image.Image]]
) -> int:
    text = render_chat(processor, batch[0][0].asked)
    inputs = processor(text=[text] * len(batch), images=[image for _, image in batch], return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)  # type: ignore[misc]
    responses = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(is_right(response, question.answer) for response, (question, _) in zip(responses, batch, strict=True))


def is_right(response: str, answer: str) -> bool:
    """Whether a response is right. A tiny model has learned to end with a box: a text without one needs no judge."""
    return committed_answer(response) is not None and is_correct(response, answer)
