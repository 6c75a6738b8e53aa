"""Turns prompts into what models read: chat template, placeholders, vision ids, checks. Needs no weights.

In: messages or token ids, decoded images. Out: token ids with every image's placeholders. Teacher, trainer and rollout
worker all read prompts through `PromptReader`. Code for a single family is in `vaopd.vlm.families`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from vaopd.errors import ConfigError, InvalidInput, Mismatch
from vaopd.images import scale_to_bounds
from vaopd.types import ImagePart, Message, TextPart
from vaopd.vlm.families import Family, PreparedImage, find_family
from vaopd.vlm.torchvision_compat import ensure_torchvision


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedPrompt:
    """A prompt as a model reads it: token_ids (P,) int64 with placeholders expanded, and the images in their order."""

    token_ids: np.ndarray
    images: tuple[PreparedImage, ...]


@dataclass(frozen=True, kw_only=True)
class PromptReader:
    """Reads prompts for one model: its processor, configuration and family."""

    processor: Any
    config: Any
    family: Family
    eos_ids: tuple[int, ...] = ()
    """Each of them ends a response: generation_config.json's, then the tokenizer's own."""

    @classmethod
    def open(cls, path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> PromptReader:
        """Makes the reader of a model folder or hub id. Raises ConfigError as `load_processor` and `find_family` do."""
        processor = load_processor(path, min_pixels=min_pixels, max_pixels=max_pixels)
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path)
        eos_ids = _read_eos_ids(path, processor.tokenizer)
        return cls(processor=processor, config=config, family=find_family(config.model_type), eos_ids=eos_ids)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """V, logical: the number of the tokenizer's ids. The LM head may be padded to more rows."""
        return len(self.tokenizer)

    @property
    def hidden_size(self) -> int:
        """D, of the text model."""
        return int(self.config.get_text_config().hidden_size)

    @cached_property
    def max_tokens(self) -> int:
        """The longest prompt and response together that the model can read."""
        return int(self.config.get_text_config().max_position_embeddings)

    @cached_property
    def vision_token_ids(self) -> frozenset[int]:
        """Ids that are never sampled and never scored: in a response, the model would put image features there."""
        return self.family.vision_token_ids(self.processor, self.config)

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        """Special tokens as texts, which the tokenizer would read as ids wherever they stand."""
        added = self.tokenizer.added_tokens_decoder.values()
        names = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        names |= set(self.tokenizer.convert_ids_to_tokens(sorted(self.vision_token_ids)))
        return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))

    @cached_property
    def fingerprint(self) -> str:
        """The tokenizer's fingerprint, see `tokenizer_fingerprint`."""
        return tokenizer_fingerprint(self.tokenizer)

    @property
    def pixel_bounds(self) -> tuple[int, int] | None:
        """The fewest and the most pixels of a scaled picture; None for a family whose tiles have one size."""
        return self.family.pixel_bounds(self.processor)

    def scale_image(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """Scales a decoded picture to the processor's pixel bounds, before any view is made of it.

        The processor would do so itself, but only after the degradation, and a small picture then has coarser cells.
        """
        bounds = self.pixel_bounds
        return image if bounds is None else scale_to_bounds(image, min_pixels=bounds[0], max_pixels=bounds[1])

    def prepare_image(self, image: PIL.Image.Image) -> PreparedImage:
        """Prepares a picture that `scale_image` returned, or a degraded view of it, for the vision tower."""
        return self.family.prepare_image(self.processor, image)

    def render(self, messages: Sequence[Message], images: Mapping[str, PreparedImage]) -> PreparedPrompt:
        """Renders messages in the chat template, with placeholders expanded.

        images: by SHA-256; an image is used as often as the messages name it.

        Raises InvalidInput for an image that is missing, and for a text with a control token: it would end a
        turn, forge one or stand for an image.
        """
        named = [part.sha256 for m in messages for part in m.content if isinstance(part, ImagePart)]
        if missing := [sha for sha in named if sha not in images]:
            raise InvalidInput(f"the messages name image {missing[0][:12]}…, which was not sent")
        prepared = tuple(images[sha] for sha in named)
        return PreparedPrompt(token_ids=self.expand(self.render_ids(messages), prepared), images=prepared)

    def render_ids(self, messages: Sequence[Message]) -> list[int]:
        """Renders messages with one placeholder per image, as inference engines want it. Raises as `render` does."""
        for message in messages:
            # Templates join the texts of a message; some trim them or put the images in front.
            joined = "".join(part.text.strip() for part in message.content if isinstance(part, TextPart))
            if found := self._control_tokens.search(joined):
                raise InvalidInput(
                    f"a text holds {found[0]!r}, a control token or placeholder of the model; take it out"
                )
        text = self.processor.apply_chat_template(chat(messages), tokenize=False, add_generation_prompt=True)
        ids = self.encode_text(text)
        images = sum(isinstance(part, ImagePart) for m in messages for part in m.content)
        if (count := ids.count(self.family.image_token_id(self.config))) != images:
            raise InvalidInput(f"the rendered prompt holds {count} image placeholders for {images} images")
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Tokenises a text without adding anything. Threads may do so at the same time.

        Calling the tokenizer itself would change its settings, which fails beside another call, and would hold the
        interpreter's lock.
        """
        (encoded,) = self.tokenizer.backend_tokenizer.encode_batch([text], add_special_tokens=False)
        return list(encoded.ids)

    def expand(self, ids: Sequence[int], images: Sequence[PreparedImage]) -> np.ndarray:
        """Replaces each image's one placeholder by the image's tokens: (P,) int64."""
        placeholder = self.family.image_token_id(self.config)
        tokens = (self.family.make_image_tokens(self.processor, self.config, image) for image in images)
        return np.array([t for i in ids for t in (next(tokens) if i == placeholder else (i,))], dtype=np.int64)

    def read_token_ids(self, token_ids: np.ndarray, images: Sequence[PreparedImage]) -> PreparedPrompt:
        """Checks a prompt that another process rendered, and joins it with its images.

        Raises InvalidInput for an empty prompt, an unknown id, and a run of placeholders that doesn't fit its image.
        """
        ids = np.asarray(token_ids, dtype=np.int64)
        if ids.size == 0:
            raise InvalidInput("the prompt is empty; it needs at least one token")
        self._check_ids(ids, "prompt")
        is_image = np.concatenate(([False], ids == self.family.image_token_id(self.config), [False]))
        edges = np.flatnonzero(is_image[1:] != is_image[:-1])
        runs = [int(end - start) for start, end in zip(edges[::2], edges[1::2], strict=True)]
        wanted = [run for image in images for run in self.family.runs(image)]
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
        ends = np.flatnonzero(np.isin(ids[:-1], self.eos_ids))
        if ends.size:
            raise InvalidInput(
                f"the response has {ids.size - 1 - ends[0]} tokens after its first EOS (id {ids[ends[0]]}); cut it"
            )
        if (vision := ids[np.isin(ids, list(self.vision_token_ids))]).size:
            raise InvalidInput(f"response token id {vision[0]} is a vision placeholder; ban it when sampling")
        if (total := len(prompt.token_ids) + ids.size) > max_tokens:
            raise InvalidInput(
                f"prompt ({len(prompt.token_ids)}) and response ({ids.size}) have {total} tokens, "
                f"the limit is {max_tokens}; shorten the response or scale the image down"
            )


def load_processor(path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """Loads the processor of a folder or hub id.

    min_pixels, max_pixels: override the processor's own bounds; all processes of a job must use the same.

    Raises ConfigError for a model that isn't found, and for a processor that lacks a package.
    """
    ensure_torchvision()
    from transformers import AutoProcessor

    bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    try:
        processor: Any = AutoProcessor.from_pretrained(path, **{k: v for k, v in bounds.items() if v is not None})
    except OSError:
        raise ConfigError(
            f"no model with a processor at {str(path)!r}; give a folder that exists or a hub id that can be reached"
        ) from None
    except ImportError as error:  # SmolVLM's needs num2words
        raise ConfigError(f"the processor of {str(path)!r} can't be loaded: {error}") from None
    size = getattr(processor.image_processor, "size", {})
    # Qwen's: areas in pixels. Of a bound that isn't given the processor has its own.
    if set(map(bool, bounds.values())) == {True, False} and size["shortest_edge"] > size["longest_edge"]:
        raise ConfigError(
            f"data.min_pixels and data.max_pixels: with the processor's own bound they are {size['shortest_edge']} and "
            f"{size['longest_edge']}, which no image can satisfy; set both"
        )
    return processor


def chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Converts messages to the form that chat templates read."""
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
    """Returns a hex SHA-256 over the vocabulary, id by id, added tokens included.

    Two tokenizers with the same fingerprint use the same ids for the same tokens.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=True).encode()).hexdigest()


def check_same_tokenizer(*, student: str, teacher: str) -> None:
    """Raises Mismatch, naming both fingerprints, if they differ."""
    if student != teacher:
        raise Mismatch(
            f"student's tokenizer {student[:12]}… and teacher's {teacher[:12]}… have different vocabularies; "
            "token ids can't be shared. Use models of one family"
        )


def _read_eos_ids(path: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """Returns generation_config.json's EOS ids and the tokenizer's.

    Both, since a checkpoint that was tuned on chats may name the chat's EOS in its tokenizer only.
    """
    from transformers import GenerationConfig

    try:
        declared = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the file is optional
        declared = None
    ids = [declared] if isinstance(declared, int) else list(declared or ())
    return tuple(dict.fromkeys(id for id in (*ids, tokenizer.eos_token_id) if id is not None))
