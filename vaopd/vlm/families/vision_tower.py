"""Runs the vision towers of Qwen's families over many images at once, on a GPU without waiting for it.

transformers splits the patches at each image in each layer, and derives indices from grids on the device, which it then
waits for. Here one kernel call attends within all images of a layer, and the indices come from grids on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vaopd.vlm.transfer import upload
from vaopd.vlm.varlen_attention import attend_to_images, choose_kernel

ATTENTION = "vaopd_flash_images"
"""transformers hands the whole row, with the images' places, to an attention whose name holds "flash"."""


def adapt(tower: Any) -> None:
    """Makes the tower attend by `attend`, and embed its patches by `embed_patches`, in place; may be repeated."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    tower.config._attn_implementation = ATTENTION
    own = tower.patch_embed.forward
    if getattr(own, "by_product", False):
        return
    convolution = tower.patch_embed.proj

    def embed(patches: Tensor) -> Tensor:
        embedded: Tensor = embed_patches(convolution, patches) if patches.device.type == "cuda" else own(patches)
        return embedded

    embed.by_product = True  # type: ignore[attr-defined]
    tower.patch_embed.forward = embed


def embed_patches(convolution: torch.nn.Conv3d, patches: Tensor) -> Tensor:
    """Embeds patches (n, channels·t·h·w) as the convolution does, whose kernel is a patch: -> (n, D).

    cuDNN's convolutions of bfloat16 in three dimensions are many times slower than the product that they amount to.
    """
    weight = convolution.weight
    return F.linear(patches.view(-1, weight[0].numel()).to(weight.dtype), weight.flatten(1), convolution.bias)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention within each image; the signature is transformers' flash attention's.

    query, key, value: (1, heads, patches, d). cu_seq_lens_q: where each image (or window of it) starts, and the end.
    Returns (1, patches, heads, d), and None for the attention weights.
    """
    if (kernel := choose_kernel(query, key, value, dropout)) is not None:
        return attend_to_images(kernel, query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    done = [
        sdpa_attention_forward(module, q, k, v, None, dropout=dropout, scaling=scaling, is_causal=False)[0]
        for q, k, v in parts
    ]
    return torch.cat(done, dim=1), None


def compute_sequences(tower: Any, grids: Tensor) -> dict[str, Any]:
    """Returns the tower's arguments that say where each image lies: grids (images, 3) on the host."""
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

    starts = get_vision_cu_seqlens(grids)
    return {
        "cu_seqlens": upload(starts, tower.device),
        "max_seqlen": int(starts.diff().max()),
        "position_ids": upload(get_vision_position_ids(grids, tower.spatial_merge_size), tower.device),
    }


def compute_interpolation(tower: Any, grids: Tensor) -> dict[str, Any]:
    """Returns Qwen3-VL's arguments that resample its learned positions to each image's grid."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    indices, weights = get_vision_interpolation_indices_and_weights(
        grids,
        num_grid_per_side=tower.num_grid_per_side,
        mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners,
        spatial_merge_size=tower.config.spatial_merge_size,
    )
    return {"interp_indices": upload(indices, tower.device), "interp_weights": upload(weights, tower.device)}


def compute_windows(tower: Any, grids: Tensor) -> dict[str, Any]:
    """Returns Qwen2.5-VL's arguments that order the patches by the windows that most of its layers attend within."""
    from transformers.vision_utils import get_vision_window_index

    order, starts = get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    return {
        "window_index": upload(order, tower.device),
        "cu_window_seqlens": upload(starts, tower.device),
        "max_window_seqlen": int(starts.diff().max()),
    }
