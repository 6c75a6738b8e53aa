"""Compiles a model's layers for a GPU, where what lies between the products takes as long as the products.

torch.compile fuses norms, rotations, activations, casts and sums into few kernels. Attention stays as it is, since its
places change with each forward. One graph serves all layers of a stack and all lengths, so the first forward pays for
the compilation, about a minute, and no later one.
"""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch

from vaopd.types import EncodedImage, user_turn
from vaopd.vlm.model import Segment, Vlm


def compile_layers(vlm: Vlm) -> None:
    """Compiles the text model's layers and the vision tower's blocks, in place, at their first call."""
    tower = vlm.family.vision_tower(vlm.model)
    for layer in (*vlm.family.language_model(vlm.model).layers, *getattr(tower, "blocks", ())):  # type: ignore[misc]
        layer.compile(dynamic=True)


@torch.inference_mode()
def warm_up(vlm: Vlm) -> None:
    """Runs a small forward with an image, so that no caller waits for the compilation."""
    name = EncodedImage(data=b"")
    image = vlm.prepare_image(vlm.scale_image(PIL.Image.new("RGB", (256, 256))))
    prompt = vlm.render(user_turn("?", [name]), {name.sha256: image})
    response = np.full(8, prompt.token_ids[-1])
    vlm.compute_response_hidden([Segment(prompt=prompt, responses=(response, response[:5]))])
