"""A vision-language model with its tokenizer and processor: the one way in which teacher and trainer read a prompt.

What arrives: messages or token ids, decoded images, response ids. What leaves: hidden states of the response tokens,
over which `vaopd.divergence` applies the LM head in chunks. Nothing here is specific to a family: see `vaopd.families`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from vaopd.errors import ConfigError, InvalidInput, Mismatch
from vaopd.families import Family, PreparedImage, family_for
from vaopd.torchvision_compat import ensure_torchvision
from vaopd.types import ImagePart, Message

# Qwen's tokenizers have it, the model configuration doesn't name it.
_VISION_PAD = "<|vision_pad|>"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedPrompt:
    """A prompt as a model reads it: token_ids (P,) int64, placeholders expanded, and one image per placeholder run."""

    token_ids: np.ndarray
    images: tuple[PreparedImage, ...]


@dataclass(frozen=True, kw_only=True)
class Vlm:
    """A loaded model. `load` makes it; the attributes are read-only."""

    path: Path
    model: Any
    processor: Any
    family: Family

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "float32",
        device: str | None = None,
        device_map: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Vlm:
        """Loads a folder or hub id; `device_map` (accelerate) spreads the weights over several devices."""
        processor = load_processor(path, min_pixels=min_pixels, max_pixels=max_pixels)
        from transformers import AutoModelForImageTextToText

        model: Any = AutoModelForImageTextToText.from_pretrained(
            path, dtype=getattr(torch, dtype), device_map=device_map, attn_implementation="sdpa"
        )
        if device is not None and device_map is None:
            model = model.to(device)
        return cls(path=Path(path), model=model.eval(), processor=processor, family=family_for(model.config.model_type))

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """V, logical: the tokenizer's ids. The LM head may be padded to more rows."""
        return len(self.tokenizer)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def head(self) -> torch.Tensor:
        """(V, D): the LM head's rows for the logical vocabulary; a view of the parameter."""
        return self.model.get_output_embeddings().weight[: self.vocab_size]

    @cached_property
    def max_tokens(self) -> int:
        """Prompt and response together."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @cached_property
    def vision_token_ids(self) -> frozenset[int]:
        pad = self.tokenizer.convert_tokens_to_ids(_VISION_PAD)
        extra = () if pad in (None, self.tokenizer.unk_token_id) else (pad,)
        return self.family.vision_token_ids(self.model.config) | frozenset(extra)

    @cached_property
    def fingerprint(self) -> str:
        return tokenizer_fingerprint(self.tokenizer)

    def prepare_image(self, image: PIL.Image.Image) -> PreparedImage:
        return self.family.prepare_image(self.processor, image)

    def render(self, messages: Sequence[Message], images: Mapping[str, PreparedImage]) -> PreparedPrompt:
        """The prompt of `messages` in the chat template; `images` by SHA-256, each used as often as it is named."""
        named = [part.sha256 for m in messages for part in m.content if isinstance(part, ImagePart)]
        if missing := [sha for sha in named if sha not in images]:
            raise InvalidInput(f"the messages name image {missing[0][:12]}…, which was not sent along")
        text = self.processor.apply_chat_template(chat(messages), tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        prepared = tuple(images[sha] for sha in named)
        return PreparedPrompt(token_ids=self._expand(ids, prepared), images=prepared)

    def _expand(self, ids: Sequence[int], images: Sequence[PreparedImage]) -> np.ndarray:
        """Repeats each placeholder as often as its image has tokens."""
        placeholder = self.family.image_token_id(self.model.config)
        if (found := sum(i == placeholder for i in ids)) != len(images):
            raise InvalidInput(
                f"the rendered prompt holds {found} image placeholders for {len(images)} images; "
                "a text must not contain the placeholder itself"
            )
        counts = iter(image.num_tokens for image in images)
        return np.array([i for i in ids for _ in range(next(counts) if i == placeholder else 1)], dtype=np.int64)

    def from_token_ids(self, token_ids: np.ndarray, images: Sequence[PreparedImage]) -> PreparedPrompt:
        """A prompt that somebody else rendered; every placeholder run must fit its image's grid."""
        ids = np.asarray(token_ids, dtype=np.int64)
        if ids.size == 0:
            raise InvalidInput("the prompt is empty; it needs at least one token")
        self._check_ids(ids, "prompt")
        is_image = np.concatenate(([False], ids == self.family.image_token_id(self.model.config), [False]))
        edges = np.flatnonzero(is_image[1:] != is_image[:-1])
        runs = [int(end - start) for start, end in zip(edges[::2], edges[1::2], strict=True)]
        wanted = [image.num_tokens for image in images]
        if runs != wanted:
            grids = [image.grid for image in images]
            raise InvalidInput(
                f"the prompt holds placeholder runs of {runs} tokens, the images' grids {grids} need {wanted}; "
                "student and teacher must use the same image processor settings"
            )
        return PreparedPrompt(token_ids=ids, images=tuple(images))

    def _check_ids(self, ids: np.ndarray, name: str) -> None:
        if (bad := ids[(ids < 0) | (ids >= self.vocab_size)]).size:
            raise InvalidInput(f"{name} token id {bad[0]} is outside the vocabulary [0, {self.vocab_size})")

    def check_response(self, response_ids: np.ndarray, prompt: PreparedPrompt, *, max_tokens: int) -> None:
        """Raises InvalidInput for a response that can't be scored after `prompt`."""
        ids = np.asarray(response_ids)
        if ids.size == 0:
            raise InvalidInput("the response is empty; it needs at least one token (the EOS counts)")
        self._check_ids(ids, "response")
        if (vision := ids[np.isin(ids, list(self.vision_token_ids))]).size:
            raise InvalidInput(f"response token id {vision[0]} is a vision placeholder; ban it when sampling")
        if (total := len(prompt.token_ids) + ids.size) > max_tokens:
            raise InvalidInput(
                f"prompt ({len(prompt.token_ids)}) and response ({ids.size}) have {total} tokens, "
                f"the limit is {max_tokens}; shorten the response or scale the image down"
            )

    def response_hidden(self, prompts: Sequence[PreparedPrompt], responses: Sequence[np.ndarray]) -> torch.Tensor:
        """(M, D) hidden states that predict the response tokens, row after row, in one forward.

        Row i is prompts[i] followed by responses[i] (T_i,). Rows of one PreparedPrompt share its images' features.
        """
        sequences = [
            np.concatenate((prompt.token_ids, np.asarray(ids[:-1], dtype=np.int64)))
            for prompt, ids in zip(prompts, responses, strict=True)
        ]
        longest = max(len(s) for s in sequences)
        # Right padding: with causal attention and the mask, a padded row equals the same row alone.
        input_ids = torch.zeros((len(sequences), longest), dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, sequence in enumerate(sequences):
            input_ids[row, : len(sequence)] = torch.from_numpy(sequence)
            attention_mask[row, : len(sequence)] = 1
        device = self.model.get_input_embeddings().weight.device
        hidden = self.family.final_hidden(
            self.model, input_ids.to(device), attention_mask.to(device), [prompt.images for prompt in prompts]
        )
        # The token at position P + t is predicted by the hidden state at P + t - 1.
        return torch.cat(
            [
                hidden[row, len(prompt.token_ids) - 1 : len(sequence)]
                for row, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True))
            ]
        )


def load_processor(path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """The processor of a folder or hub id. Pixel bounds override its own; all processes of a job must use the same."""
    ensure_torchvision()
    from transformers import AutoProcessor

    bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    try:
        return AutoProcessor.from_pretrained(path, **{k: v for k, v in bounds.items() if v is not None})
    except OSError:
        raise ConfigError(
            f"no model with a processor at {str(path)!r}; give a folder that exists or a hub id that can be reached"
        ) from None


def chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in the form that chat templates read."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
                for part in message.content
            ],
        }
        for message in messages
    ]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex SHA-256 over the logical vocabulary, id by id, added tokens included. Equal means: ids mean the same."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=True).encode()).hexdigest()


def check_same_tokenizer(*, student: str, teacher: str) -> None:
    """Raises Mismatch, naming both fingerprints, when they differ."""
    if student != teacher:
        raise Mismatch(
            f"student's tokenizer {student[:12]}… and teacher's {teacher[:12]}… have different vocabularies; "
            "token ids can't be shared. Use models of one family"
        )
