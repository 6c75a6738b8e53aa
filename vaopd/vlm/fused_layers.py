"""Lets transformers' layers compute between their products by `kernels`, in inference on a GPU; elsewhere as they do.

Each function here replaces a module's forward in place and calls the module's own where the kernels can't be used: with
gradients, on a CPU, in float32, without Triton.
"""

from __future__ import annotations

import functools
import importlib.util
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from vaopd.vlm import shared_attention

_HALVES = (torch.bfloat16, torch.float16)


def fuse_text_layers(text_model: Any) -> None:
    """Replaces attention and MLP of each layer of Qwen3-VL's text model, in place; may be repeated."""
    for layer in text_model.layers:
        layer.self_attn.forward = MethodType(_attend, layer.self_attn)
        layer.mlp.forward = MethodType(_multiply, layer.mlp)


def can_fuse(values: Tensor) -> bool:
    """Whether the kernels can compute with this tensor."""
    if torch.compiler.is_compiling():  # makes kernels of the plain formulas by itself
        return False
    return torch.is_inference_mode_enabled() and values.is_cuda and values.dtype in _HALVES and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _attend(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As Qwen3VLTextAttention.forward, for a packed row."""
    if kwargs.get("layout") is None or past_key_values is not None or not can_fuse(hidden_states):
        own: tuple[Tensor, Tensor | None] = type(self).forward(
            self,
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        return own
    from vaopd.vlm.kernels import rotate

    cos, sin = (part[0].contiguous() for part in position_embeddings)

    def split(projected: Tensor) -> Tensor:
        return projected[0].view(projected.shape[1], -1, self.head_dim)

    rotated = [
        rotate(split(projection(hidden_states)), cos, sin, norm_weight=norm.weight, epsilon=norm.variance_epsilon)
        for projection, norm in ((self.q_proj, self.q_norm), (self.k_proj, self.k_norm))
    ]
    query, key, value = (part.transpose(0, 1)[None] for part in (*rotated, split(self.v_proj(hidden_states))))
    out, _ = shared_attention.attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


def _multiply(self: Any, hidden_states: Tensor) -> Tensor:
    """As Qwen3VLTextMLP.forward, whose activation is silu."""
    if not can_fuse(hidden_states) or self.config.hidden_act != "silu":
        own: Tensor = type(self).forward(self, hidden_states)
        return own
    from vaopd.vlm.kernels import multiply_by_silu

    inner = multiply_by_silu(self.gate_proj(hidden_states), self.up_proj(hidden_states))
    down: Tensor = self.down_proj(inner)
    return down
