"""The arithmetic of memory and placement: parameters as transformers counts them, and figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.kept_bytes import count_peak_per_token
from vaopd.vlm.memory import (
    KEPT,
    MODELS,
    count_image_bytes,
    count_teacher_bytes,
    count_token_bytes,
    count_trainer_fixed_bytes,
    find_kept,
)
from vaopd.vlm.torchvision_compat import ensure_torchvision


@pytest.mark.parametrize("name", ["2B", "4B", "8B", "32B"])
def test_parameters_are_those_of_the_real_class(name: str) -> None:
    ensure_torchvision()
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    model = MODELS[name]
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
    for adapted, vision_tower in ((network.model, True), (network.model.language_model, False)):
        widths = [m.in_features + m.out_features for m in adapted.modules() if isinstance(m, torch.nn.Linear)]
        assert model.count_adapter_parameters(3, vision_tower=vision_tower) == 3 * sum(widths)


def test_the_published_sizes() -> None:
    """As the model pages on the hub tell them."""
    published = {"2B": 2_127_532_032, "4B": 4_437_815_808, "8B": 8_767_123_696, "32B": 33_357_390_064}
    assert {name: model.parameters for name, model in MODELS.items()} == published


def test_a_teacher_over_two_cards_by_hand() -> None:
    """32B: of 33.4e9 weights, 64 layers of 487 587 840 are split; of a forward, what lies within heads and MLP."""
    model, tokens = MODELS["32B"], 16_384
    split = 64 * (5120 * 128 * (2 * 64 + 2 * 8) + 3 * 5120 * 25_600)
    assert model.split_parameters == split == 64 * 487_587_840
    within = (4 * 5120 + (3 * 25_600 + 80 * 128) // 2) * 2 * tokens
    assert count_teacher_bytes(model, ranks=2) == 2 * model.parameters - split + within + 1024 * 151_936 * 10
    assert model.ranks == (1, 2, 4, 8)


def test_figures_by_hand() -> None:
    """8B: the hidden payload is 37 times smaller than fp16 log-probs; 2 · 36 · 8 · 128 values of 2 bytes per token."""
    model = MODELS["8B"]
    assert 2 * model.vocabulary / (2 * model.hidden) == pytest.approx(37.09, abs=0.01)
    assert model.kv_bytes_per_token == 147_456
    student = MODELS["2B"]  # 28 layers 2048 wide, 24 blocks 1024 wide; their inputs in float32
    assert count_token_bytes(student) == 28 * 8192 + 167_088
    assert count_image_bytes(student, 262_144) == 1024 * (24 * 4096 + 38_992 + 17_978)


def test_layers_that_were_not_counted_are_estimated_from_their_widths() -> None:
    """The estimates for models that were counted too are off by less than a tenth."""
    for name in ("4B", "8B"):
        estimate, counted = find_kept(replace(MODELS[name], name="other")), KEPT[name]
        assert estimate.text_token == pytest.approx(counted.text_token, rel=0.1)
        assert estimate.patch_block == pytest.approx(counted.patch_block, rel=0.1)


def test_the_backward_pass_of_the_real_layers_takes_what_is_counted() -> None:
    """With checkpointing, a layer keeps its input, 2048 float32 values a token; one at a time is computed again."""
    one, three = (count_peak_per_token(MODELS["2B"], layers=layers) for layers in (1, 3))
    assert three - one == 2 * 4 * 2048
    counted = count_token_bytes(replace(MODELS["2B"], layers=1))
    assert 0.9 * counted < one <= counted  # another torch may free a little sooner


def test_a_sharded_rank_by_hand() -> None:
    """8B over eight ranks: an eighth of 16 bytes a weight; both matrices of 622 329 856 weights at 8 bytes and two
    layers of 192 946 545 at 10, gathered and with gradients; the head's gradient and one chunk, as of a whole one.
    """
    share, ends, layers = 17_534_247_392, 8 * 2 * 622_329_856, 10 * 192_946_545
    counted = count_trainer_fixed_bytes(MODELS["8B"], 0, ranks=8, shards=8)
    assert counted == share + ends + layers + 4 * 622_329_856 + 1024 * 151_936 * 16


def test_adapters_and_8_bit_moments_by_hand() -> None:
    """2B: 2 bytes a weight and 18 an adapter; or 12 a weight in place of 18. No gradient of the head with adapters."""
    model = MODELS["2B"]
    whole = count_trainer_fixed_bytes(model, 0, ranks=1)
    adapters = model.count_adapter_parameters(32, vision_tower=True)
    lora = count_trainer_fixed_bytes(model, 0, ranks=1, adapters=adapters)
    assert whole - lora == 16 * model.parameters + 4 * model.head_parameters - 18 * adapters
    assert whole - count_trainer_fixed_bytes(model, 0, ranks=1, moment_bytes=2) == 6 * model.parameters
