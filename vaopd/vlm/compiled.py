"""Compiles a model's layers for a GPU, where what lies between the products takes as long as the products.

torch.compile fuses norms, rotations, activations, casts and sums into few kernels. Attention stays as it is, since its
places change with each forward. One graph serves all layers of a stack and all lengths, so the first forward pays for
the compilation, about half a minute, and no later one. Inference has kernels of its own (`fused_layers`), which are as
fast: on an H100, 283 ms a group against 288.
"""

from __future__ import annotations

from vaopd.vlm.model import Vlm


def compile_layers(vlm: Vlm) -> None:
    """Compiles the text model's layers and the vision tower's blocks, in place, at their first call."""
    tower = vlm.family.vision_tower(vlm.model)
    for layer in (*vlm.family.language_model(vlm.model).layers, *getattr(tower, "blocks", ())):  # type: ignore[misc]
        layer.compile(dynamic=True)
