"""Counts what a backward pass with checkpointed activations needs on Qwen3-VL's real layers, without their memory.

The text layers run on tensors that have only shapes, and all storages that live are added up.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vaopd.vlm.memory import MODELS, PATCH_PX, Kept, Model
from vaopd.vlm.torchvision_compat import ensure_torchvision


def build(model: Model, *, layers: int, blocks: int) -> Any:
    """Makes so many of the real layers and blocks, with activation checkpointing, and next to no vocabulary."""
    ensure_torchvision()
    from transformers import AttentionInterface, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    AttentionInterface.register("without a mask", attend)
    text = {"vocab_size": 64, "hidden_size": model.hidden, "intermediate_size": model.mlp,
            "num_hidden_layers": layers, "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim}  # fmt: skip
    vision = {"depth": blocks, "hidden_size": model.vision_hidden, "intermediate_size": model.vision_mlp,
              "num_heads": 16, "out_hidden_size": model.hidden, "patch_size": PATCH_PX,
              "deepstack_visual_indexes": [0], "num_position_embeddings": model.vision_positions}  # fmt: skip
    network = Qwen3VLForConditionalGeneration._from_config(
        Qwen3VLConfig(text_config=text, vision_config=vision),
        attn_implementation={"text_config": "without a mask", "vision_config": "sdpa", "": "sdpa"},
    )
    return network.train()


def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, *, scaling: float, **_: Any) -> tuple[Any, None]:
    """Keeps what flash attention keeps; a mask of (T, T), which no GPU path makes, would count."""
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that live, but those given; works on tensors without memory too."""

    def __init__(self, without: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._without = {tensor.untyped_storage()._cdata for tensor in without}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes.keys() | self._without:
                self._sizes[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._forget, storage._cdata)
        return found

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def count_peak(model: Model, *, layers: int, tokens: int) -> int:
    """Counts the peak of the text layers' forward and backward, checkpointed, beside weights and gradients."""
    with FakeTensorMode():  # shapes only
        network = build(model, layers=layers, blocks=1)
        network.gradient_checkpointing_enable({"use_reentrant": False})
        parameters = list(network.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        ids = torch.full((1, tokens), 5)
        with LiveBytes([*parameters, *(parameter.grad for parameter in parameters)]) as live:
            with torch.autocast("cpu", torch.bfloat16):
                hidden = network.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
            hidden.sum().backward()
        return live.peak


def count_peak_per_token(model: Model, *, layers: int) -> float:
    return (count_peak(model, layers=layers, tokens=16_384) - count_peak(model, layers=layers, tokens=8192)) / 8192


def count_saved_for_patches(model: Model, *, blocks: int, patches: int) -> int:
    """Counts the bytes that autograd keeps of the vision tower without checkpointing."""
    network = build(model, layers=1, blocks=blocks)
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    saved: dict[int, torch.Tensor] = {}  # the tensors are held, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    pixels, grid = torch.randn(patches, 3 * 2 * PATCH_PX**2), torch.tensor([[1, patches // 16, 16]])
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        network.model.visual(pixels, grid_thw=grid)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def measure() -> None:
    """Counts `Kept` of each model on its real layers, by differences in layers and tokens."""
    torch.set_num_threads(1)
    for name, model in MODELS.items():
        one, two = (count_peak_per_token(model, layers=layers) for layers in (1, 2))
        saved = {(b, p): count_saved_for_patches(model, blocks=b, patches=p) for b in (1, 2) for p in (64, 128)}
        block = (saved[2, 128] - saved[2, 64] - saved[1, 128] + saved[1, 64]) / 64
        patch = (saved[1, 128] - saved[1, 64]) / 64 - block
        print(name, f"{two - one:.0f} a token and layer, {4 * model.hidden} counted;",
              Kept(text_token=round(2 * one - two), patch_block=round(block), patch=round(patch)))  # fmt: skip
