"""Builds an untrained tiny model of the real Qwen3-VL classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vaopd.data.handwritten_geometry import SIZE_PX
from vaopd.tiny.config import HEAD_DIM, MAX_POSITIONS, MERGE, PATCH_PX, TinySize
from vaopd.vlm.torchvision_compat import ensure_torchvision

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration

INITIALIZER_RANGE = 0.06
"""Three times the usual: at this width, 0.02 starts too flat, and training takes hundreds of steps more."""


def build_model(size: TinySize, tokenizer: Qwen2Tokenizer) -> Qwen3VLForConditionalGeneration:
    """Builds a model with random fp32 weights from torch's global generator."""
    ensure_torchvision()
    from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    ids = tokenizer.get_vocab()
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": size.padded_vocab,
            "hidden_size": size.hidden,
            "intermediate_size": 2 * size.hidden,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.hidden // HEAD_DIM,
            "num_key_value_heads": size.kv_heads,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": MAX_POSITIONS,
            "initializer_range": INITIALIZER_RANGE,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                # Shares of time, height and width; they add up to half of HEAD_DIM.
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": size.tied,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "depth": size.vision_depth,
            "hidden_size": size.vision_hidden,
            "intermediate_size": 2 * size.vision_hidden,
            "num_heads": size.vision_hidden // HEAD_DIM,
            "out_hidden_size": size.hidden,
            "patch_size": PATCH_PX,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "num_position_embeddings": (SIZE_PX // PATCH_PX) ** 2,
            "deepstack_visual_indexes": list(size.deepstack),
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=size.tied,
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model
