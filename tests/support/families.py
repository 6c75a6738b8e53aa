"""Tiny untrained models of every family that has an adapter, with real processors, and plain forwards to compare with.

The tokenizer is the tiny models' own, with each family's own special tokens; nothing is downloaded.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from tests.support.models import save_untrained
from tests.support.teacher import encoded, question
from vaopd.tiny.tokenizer import SPECIAL_TOKENS, build_processor, build_tokenizer
from vaopd.types import Message
from vaopd.vlm.model import Vlm
from vaopd.vlm.prompts import PreparedPrompt, chat
from vaopd.vlm.torchvision_compat import ensure_torchvision

FAMILIES = ("qwen3_vl", "qwen2_5_vl", "internvl", "smolvlm")
_FOLDERS = tempfile.TemporaryDirectory(prefix="vaopd-families-")  # emptied when the interpreter ends
_INTERNVL_SPECIAL = {
    "<|vision_start|>": ("start_image_token", "<img>"),
    "<|vision_end|>": ("end_image_token", "</img>"),
    "<|image_pad|>": ("context_image_token", "<IMG_CONTEXT>"),
    "<|video_pad|>": ("video_token", "<video>"),
}
_SMOLVLM_SPECIAL = {
    "<|vision_start|>": "<fake_token_around_image>",
    "<|vision_end|>": "<global-img>",
    "<|image_pad|>": "<image>",
    "<|video_pad|>": "<video>",
}


@functools.cache
def family_folder(family: str, *, sliding_window: int | None = None) -> Path:
    """A folder with a tiny model of the family; with a window, its second text layer looks back no further."""
    folder = Path(_FOLDERS.name) / f"{family}-{sliding_window}"
    if family == "qwen3_vl":
        return save_untrained(folder)
    processor, model = {"qwen2_5_vl": _qwen25vl, "internvl": _internvl, "smolvlm": _smolvlm}[family](sliding_window)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@functools.cache
def family_vlm(family: str, *, sliding_window: int | None = None, dtype: str = "float32") -> Vlm:
    """The loaded model; shared by the tests of a process, so leave its weights alone."""
    return Vlm.load(family_folder(family, sliding_window=sliding_window), dtype=dtype)


@functools.cache
def plain_model(family: str, *, sliding_window: int | None = None, dtype: str = "float32") -> Any:
    """The same folder as transformers loads it by itself."""
    from transformers import AutoModelForImageTextToText

    folder = family_folder(family, sliding_window=sliding_window)
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def ask(vlm: Vlm, pictures: Sequence[PIL.Image.Image], text: str = "How long is it?") -> PreparedPrompt:
    images = [encoded(picture) for picture in pictures]
    prepared = {i.sha256: vlm.prepare_image(p) for i, p in zip(images, pictures, strict=True)}
    return vlm.render(question(text, images), prepared)


def plain_inputs(vlm: Vlm, messages: Sequence[Message], pictures: Sequence[PIL.Image.Image]) -> Mapping[str, Any]:
    """The processor's own reading of a prompt."""
    rendered = vlm.processor.apply_chat_template(chat(messages), tokenize=False, add_generation_prompt=True)
    return vlm.processor(text=[rendered], images=list(pictures) or None, return_tensors="pt")


def plain_logprobs(
    model: Any, vlm: Vlm, pictures: Sequence[PIL.Image.Image], response: np.ndarray, text: str = "How long is it?"
) -> torch.Tensor:
    """(T,) of one rollout: the processor's own inputs, the model's own forward, full logits; differentiable."""
    inputs = dict(plain_inputs(vlm, question(text, [encoded(picture) for picture in pictures]), pictures))
    prompt_tokens = inputs["input_ids"].shape[1]
    ids = torch.from_numpy(response.astype(np.int64))[None]
    inputs["input_ids"] = torch.cat((inputs["input_ids"], ids), dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        kinds = torch.as_tensor(inputs["mm_token_type_ids"])
        inputs["mm_token_type_ids"] = torch.cat((kinds, torch.zeros_like(ids)), dim=1)
    logits = model(**inputs).logits[0, prompt_tokens - 1 : -1, : vlm.vocab_size]
    return logits.log_softmax(-1).gather(-1, ids[0, :, None]).squeeze(-1)


def _qwen25vl(sliding_window: int | None) -> tuple[Any, Any]:
    ensure_torchvision()
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    shape = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 32 * 32, "longest_edge": 384 * 384}
    own = build_processor()
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shape, size=size),
        tokenizer=own.tokenizer,
        video_processor=Qwen2VLVideoProcessor(**shape, size=size),
        chat_template=own.chat_template,
    )
    ids = own.tokenizer.get_vocab()
    config = Qwen2_5_VLConfig(
        text_config=_text_config(sliding_window)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [6, 5, 5]}},
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 64,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.06,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return processor, _random(Qwen2_5_VLForConditionalGeneration, config)


_TILE_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "initializer_range": 0.06,
}


def _internvl(sliding_window: int | None) -> tuple[Any, Any]:
    ensure_torchvision()
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    tokenizer = _tokenizer(
        {token: name for token, (_, name) in _INTERNVL_SPECIAL.items()}, dict(_INTERNVL_SPECIAL.values())
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size={"height": 64, "width": 64}, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(),
        image_seq_length=4,  # (64 px / 16 px per patch)² · 0.5²
        chat_template=_template(r"<IMG_CONTEXT>\n"),
    )
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **_text_config(sliding_window)},
        vision_config=_TILE_VISION,
        image_token_id=tokenizer.get_vocab()["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return processor, _random(InternVLForConditionalGeneration, config)


def _smolvlm(sliding_window: int | None) -> tuple[Any, Any]:
    ensure_torchvision()
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    assert sliding_window is None, "its text model, Llama, has none"
    marks = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
    tokenizer = _tokenizer(_SMOLVLM_SPECIAL, {"image_token": "<image>"}, further=marks)
    size = {"longest_edge": 128}
    tile = {"longest_edge": 64}
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size=size, max_image_size=tile),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(size=size, max_image_size=tile),
        image_seq_len=4,  # (64 px / 16 px per patch)² / 2²
        chat_template=_template("<image>"),
    )
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **_text_config(None)},
        vision_config=_TILE_VISION,
        image_token_id=tokenizer.get_vocab()["<image>"],
        pad_token_id=0,
    )
    return processor, _random(SmolVLMForConditionalGeneration, config)


def _tokenizer(renamed: Mapping[str, str], extra: dict[str, str], further: Sequence[str] = ()) -> Any:
    """The tiny models' own tokenizer with another family's special tokens: some renamed, further ones at the end."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    learned = json.loads(build_tokenizer().backend_tokenizer.to_str())["model"]
    special = [*(renamed.get(token, token) for token in SPECIAL_TOKENS), *further]
    first = len(learned["vocab"])
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],  # type: ignore[misc]
        added_tokens_decoder={first + i: AddedToken(t, normalized=False, special=True) for i, t in enumerate(special)},
        unk_token=None,  # type: ignore[arg-type]
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=extra,
    )


def _template(image: str) -> str:
    template = build_processor().chat_template
    assert template is not None
    return template.replace("<|vision_start|><|image_pad|><|vision_end|>", image)


def _text_config(sliding_window: int | None) -> dict[str, Any]:
    window = {"use_sliding_window": True, "sliding_window": sliding_window, "max_window_layers": 1}
    return {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.06,
        "bos_token_id": None,
        "eos_token_id": 0,
    } | (window if sliding_window else {})


def _random(model_class: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config)
