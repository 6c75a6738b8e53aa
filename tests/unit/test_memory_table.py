"""The memory table's arithmetic: parameters as transformers counts them, and figures worked out by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vaopd.vlm.torchvision_compat import ensure_torchvision

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory_table.py"


@pytest.fixture(scope="module")
def memory() -> Any:
    spec = importlib.util.spec_from_file_location("memory_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_table"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["2B", "4B", "8B", "32B"])
def test_parameters_are_those_of_the_real_class(memory: Any, name: str) -> None:
    ensure_torchvision()
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    model = memory.MODELS[name]
    text = {
        "vocab_size": model.vocabulary,
        "hidden_size": model.hidden,
        "intermediate_size": model.mlp,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
    }
    vision = {
        "depth": model.vision_depth,
        "hidden_size": model.vision_hidden,
        "intermediate_size": model.vision_mlp,
        "num_heads": 16,
        "out_hidden_size": model.hidden,
        "patch_size": 16,
        "deepstack_visual_indexes": [1, 2, 3],
        "num_position_embeddings": model.vision_positions,
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=model.tied)
    with torch.device("meta"):  # shapes without memory
        network = Qwen3VLForConditionalGeneration(config)
    network.tie_weights()
    assert model.parameters == sum(parameter.numel() for parameter in network.parameters())


def test_the_published_sizes(memory: Any) -> None:
    """As the model pages on the hub tell them."""
    assert memory.MODELS["2B"].parameters == 2_127_532_032
    assert memory.MODELS["8B"].parameters == 8_767_123_696


def test_figures_by_hand(memory: Any) -> None:
    """8B: the hidden payload is 37 times smaller than fp16 log-probs; 2 · 36 · 8 · 128 values of 2 bytes per token."""
    model = memory.MODELS["8B"]
    assert 2 * model.vocabulary / (2 * model.hidden) == pytest.approx(37.09, abs=0.01)
    assert model.kv_bytes_per_token == 147_456
    student = memory.MODELS["2B"]  # 28 layers 2048 wide, 24 blocks 1024 wide; their inputs in float32
    assert memory.token_bytes(student) == 28 * 8192 + 133_288 + 17_420
    assert memory.image_bytes(student, 262_144) == 1024 * (24 * 4096 + 38_992 + 17_978)


@pytest.mark.parametrize(("gpus", "teacher", "roles"), [
    (2, "8B", ((0,), (0,), (1,))),
    (2, "32B", ((0,), (1,), (1,))),
    (4, "8B", ((0,), (1,), (2, 3))),
    (8, "32B", ((0,), (1, 2, 3), (4, 5, 6, 7))),
])  # fmt: skip
def test_placements(memory: Any, gpus: int, teacher: str, roles: tuple[tuple[int, ...], ...]) -> None:
    """On two cards the workers go where more room is left: beside an 8B teacher, but not beside one of 32B."""
    chosen = memory.placement(gpus, memory.MODELS[teacher], memory.MODELS["2B"])
    assert (chosen.teacher, chosen.rollout, chosen.trainer) == roles
    assert memory.PROMPTS_PER_STEP % len(chosen.trainer) == 0
