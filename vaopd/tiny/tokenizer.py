"""Builds the tiny models' tokenizer: byte-level BPE in Qwen's arrangement, trained on the task's sentences.

Every digit is one token, by Qwen's splitting rule, so that reading a digit is one decision. Each task has a tokenizer
of its own, in which each of the cards' words is one token too. The special tokens are
Qwen's, so that the real processor, chat template and vLLM work with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from vaopd.data import handwritten_cards
from vaopd.data.handwritten_geometry import KINDS, PHRASINGS, READ_QUESTION, Question
from vaopd.tiny.config import MAX_POSITIONS, MERGE, PATCH_PX, Task
from vaopd.vlm.torchvision_compat import ensure_torchvision

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer, Qwen3VLProcessor

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
NUM_TOKENS = {"geometry": 479, "cards": 600}
"""At most: 256 bytes, merges, and at the end the 8 special tokens."""

_EVERYDAY = (
    # Added to the task's sentences, so that other English isn't split into bytes.
    "system user assistant You are a helpful assistant. Put the final answer in \\boxed{}. What is the number in the "
    "image? There is one figure with two numbers here and they have been written by hand. First look at the picture, "
    "then think about which side is meant, because the question asks for something that can be worked out from it. "
    "This image shows that the value of the other number is not the same, so the result would be more than what we "
    "have. If it is not known, say so; otherwise give just the number. Let me think step by step and check the result."
)


def build_tokenizer(task: Task = "geometry") -> Qwen2Tokenizer:
    """Trains a task's tokenizer; the result is always the same, byte for byte."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS[task] - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator({"geometry": _make_corpus, "cards": _make_cards_corpus}[task](), trainer)
    learned = json.loads(raw.to_str())["model"]
    return assemble_tokenizer(learned["vocab"], learned["merges"])


def assemble_tokenizer(
    vocab: dict[str, int], merges: Sequence[Sequence[str]], *, max_positions: int = MAX_POSITIONS
) -> Qwen2Tokenizer:
    """Makes a tokenizer of `vocab` (word to id, without gaps), followed by Qwen's special tokens."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    first_special = len(vocab)
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(merge) for merge in merges],  # type: ignore[misc]
        added_tokens_decoder={
            first_special + i: AddedToken(token, normalized=False, special=True)
            for i, token in enumerate(SPECIAL_TOKENS)
        },
        unk_token=None,  # type: ignore[arg-type]  # every byte is in the alphabet
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
        model_max_length=max_positions,
    )


def build_processor(task: Task = "geometry") -> Qwen3VLProcessor:
    """Builds the real processor with a task's tokenizer; an image of 96×96 px becomes 9 tokens."""
    ensure_torchvision()
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    shape = {
        "patch_size": PATCH_PX,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": 32 * 32, "longest_edge": 384 * 384},
    }
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shape),
        tokenizer=build_tokenizer(task),
        video_processor=Qwen3VLVideoProcessor(**shape),
        chat_template=Path(__file__).with_name("chat_template.jinja").read_text(),
    )


def render_chat(processor: Qwen3VLProcessor, asked: str) -> str:
    """Renders a prompt of one image and a question in the chat template."""
    content = [{"type": "image"}, {"type": "text", "text": asked}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],  # type: ignore[arg-type]
        add_generation_prompt=True,
    )


def _make_corpus() -> list[str]:
    example = {"triangle": (3, 4, 5), "rectangle": (6, 7), "angle": (89,)}
    sentences = [READ_QUESTION] * 8 + [_EVERYDAY]
    for kind in KINDS:
        question = Question(kind=kind, numbers=example[kind.split("_")[0]])
        sentences += [question.asked] * 8
        sentences += [question.write_solution((i, j, k)) for i, j, k in product(range(PHRASINGS), repeat=3)]
    return sentences


def _make_cards_corpus() -> list[str]:
    cards = handwritten_cards
    reading = cards.Question(digits=(1, 2, 3, 4, 5)).write_reading()
    return [cards.READ_QUESTION, cards.ASKED, reading, " ".join(["", *cards.WORDS])] * 8 + [_EVERYDAY]
