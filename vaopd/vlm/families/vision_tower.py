"""Runs the vision towers of Qwen's families over many images at once, on a GPU without waiting for it.

transformers splits the patches at each image in each layer, and derives indices from grids on the device, which it then
waits for. Here one kernel call attends within all images of a layer, and the indices come from grids on the host.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vaopd.vlm.fused_layers import can_fuse
from vaopd.vlm.transfer import upload, upload_rows
from vaopd.vlm.varlen_attention import attend_to_images, choose_kernel

ATTENTION = "vaopd_flash_images"
"""transformers hands the whole row, with the images' places, to an attention whose name holds "flash"."""


def adapt(tower: Any) -> None:
    """Makes the tower attend by `attend`, and embed its patches by `embed_patches`, in place; may be repeated."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    tower.config._attn_implementation = ATTENTION
    tower.patch_embed.forward = MethodType(_embed, tower.patch_embed)
    for block in tower.blocks:
        block.attn.forward = MethodType(_attend_in_block, block.attn)


def _embed(self: Any, patches: Tensor) -> Tensor:
    if patches.is_cuda:
        return embed_patches(self.proj, patches)
    own: Tensor = type(self).forward(self, patches)
    return own


def embed_patches(convolution: torch.nn.Conv3d, patches: Tensor) -> Tensor:
    """Embeds patches (n, channels·t·h·w) as the convolution does, whose kernel is a patch: -> (n, D).

    cuDNN's convolutions of bfloat16 in three dimensions are many times slower than the product that they amount to.
    """
    weight = convolution.weight
    return F.linear(patches.view(-1, weight[0].numel()).to(weight.dtype), weight.flatten(1), convolution.bias)


def _attend_in_block(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """As Qwen…VLVisionAttention.forward, with rotary positions by one kernel where it can be used."""
    if max_seqlen is None or not can_fuse(hidden_states):
        own: Tensor = type(self).forward(
            self,
            hidden_states,
            cu_seqlens=cu_seqlens,
            position_embeddings=position_embeddings,
            max_seqlen=max_seqlen,
            **kwargs,
        )
        return own
    from vaopd.vlm.kernels import rotate

    cos, sin = (part.contiguous() for part in position_embeddings)
    query, key, value = self.qkv(hidden_states).view(len(hidden_states), 3, self.num_heads, -1).unbind(1)
    parts = (rotate(query, cos, sin), rotate(key, cos, sin), value)
    q, k, v = (part.transpose(0, 1)[None] for part in parts)
    out, _ = attend(self, q, k, v, None, cu_seq_lens_q=cu_seqlens, max_length_q=max_seqlen, scaling=self.scaling)
    attended: Tensor = self.proj(out.reshape(len(hidden_states), -1))
    return attended


@torch.compiler.disable  # the blocks around it may be compiled (vaopd.vlm.compiled)
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
    """Returns Qwen3-VL's arguments that resample its learned positions to each image's grid.

    transformers decodes each patch's place by divisions, some hundred times slower on a host than outer products.
    """
    if tower.interpolation_mode != "bilinear":
        return {}  # the tower computes them
    side, merge = tower.num_grid_per_side, tower.config.spatial_merge_size
    indices, weights = [], []
    for t, h, w in grids.tolist():
        row_taps, row_weights = _interpolate_axis(h, side, tower.interpolation_align_corners)
        column_taps, column_weights = _interpolate_axis(w, side, tower.interpolation_align_corners)
        # Rows, columns: (blocks down, 1, within, 1, tap, 1) and (1, blocks across, 1, within, 1, tap).
        down, across = (h // merge, 1, merge, 1, -1, 1), (1, w // merge, 1, merge, 1, -1)
        indices.append((row_taps.view(down) * side + column_taps.view(across)).reshape(h * w, -1).repeat(t, 1))
        weights.append((row_weights.view(down) * column_weights.view(across)).reshape(h * w, -1).repeat(t, 1))
    return {"interp_indices": upload_rows(indices, tower.device), "interp_weights": upload_rows(weights, tower.device)}


def _interpolate_axis(size: int, side: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Returns the two neighbours (size, 2) among `side` learned positions of each place on an axis, and their weights.

    The operations are transformers', in their order, so that the weights are the same bits.
    """
    places = torch.arange(size, dtype=torch.float32)
    source = places * (side - 1) / max(1, size - 1) if align_corners else (places + 0.5) * side / size - 0.5
    floor = torch.floor(source)
    offsets = torch.arange(2)
    taps = (floor.long()[:, None] + offsets).clamp(0, side - 1)
    return taps, (1 - (source[:, None] - floor[:, None] - offsets).abs()).clamp(min=0)


def compute_windows(tower: Any, grids: Tensor) -> dict[str, Any]:
    """Returns Qwen2.5-VL's arguments that order the patches by the windows that most of its layers attend within."""
    from transformers.vision_utils import get_vision_window_index

    order, starts = get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    return {
        "window_index": upload(order, tower.device),
        "cu_window_seqlens": upload(starts, tower.device),
        "max_window_seqlen": int(starts.diff().max()),
    }
