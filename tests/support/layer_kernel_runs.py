"""Runs the kernels of layers and log-probs in Triton's interpreter: python -m tests.support.layer_kernel_runs FOLDER.

Reads inputs.safetensors there and writes outputs.safetensors; then runs a whole tiny model with and without them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.support.families import ask, family_vlm
from tests.support.teacher import drawing
from vaopd.divergence.kernels import compute_log_sums
from vaopd.vlm import fused_layers, kernels
from vaopd.vlm.families import vision_tower
from vaopd.vlm.kernels import multiply_by_silu, rotate
from vaopd.vlm.model import Segment


class Calls:
    """Counts the calls of `rotate`."""

    count = 0

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        self.count += 1
        return rotate(*args, **options)


@torch.inference_mode()
def run_model(family: str, *, fused: bool) -> torch.Tensor:
    """Hidden states (M, D) of two pictures and three siblings."""
    vlm = family_vlm(family)
    prompt = ask(vlm, [drawing(1), drawing(2, (96, 64))])
    segment = Segment(prompt=prompt, responses=tuple(np.arange(5, 5 + n) for n in (4, 1, 7)))
    allowed = (fused_layers, vision_tower)
    own = fused_layers.can_fuse
    if fused:
        grids = torch.tensor([image.grid for image in prompt.images])
        tower = vlm.family.vision_tower(vlm.model)
        features = vlm.model.model.get_image_features
        precomputed = vlm.family._precompute(tower, grids)  # type: ignore[attr-defined]
        vlm.model.model.get_image_features = lambda *args, **kwargs: features(*args, **kwargs | precomputed)
        for module in allowed:
            module.can_fuse = lambda _: True  # type: ignore[attr-defined]
    try:
        return vlm.compute_response_hidden([segment])
    finally:
        if fused:
            del vlm.model.model.get_image_features
            for module in allowed:
                module.can_fuse = own  # type: ignore[attr-defined]


def main(folder: Path) -> None:
    given = load_file(folder / "inputs.safetensors")
    rows, cos, sin, weight = (given[name] for name in ("rows", "cos", "sin", "weight"))
    of_three = given["of_three"]
    found = {
        "rotated": rotate(rows, cos, sin),
        "normed": rotate(rows, cos, sin, norm_weight=weight, epsilon=1e-6),
        "of_a_part": rotate(of_three[:, 1], cos, sin),
        "product": multiply_by_silu(given["gate"], given["up"]),
    }
    for name in ("one_block", "several_blocks", "whole_blocks"):
        found[f"log_sum.{name}"] = compute_log_sums(given[f"logits.{name}"][:, : int(given[f"vocabulary.{name}"])])
    for family in ("qwen3_vl", "qwen2_5_vl"):
        calls = Calls()
        kernels.rotate = calls  # type: ignore[assignment]
        found[f"{family}.plain"], found[f"{family}.fused"] = (run_model(family, fused=fused) for fused in (False, True))
        found[f"{family}.calls"] = torch.tensor(calls.count)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "outputs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
