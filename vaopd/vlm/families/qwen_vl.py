"""Qwen2.5-VL and Qwen3-VL: patches and grids, multimodal RoPE; Qwen3-VL adds deepstack features to the first layers."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, ClassVar

import PIL.Image
import torch

from vaopd.vlm.families import vision_tower
from vaopd.vlm.families.base import Family, ImageFeatures, PreparedImage, TpPlan
from vaopd.vlm.fused_layers import fuse_text_layers
from vaopd.vlm.transfer import upload, upload_rows

_SPLIT = {f"self_attn.{name}_proj": "rowwise" if name == "o" else "colwise" for name in "qkvo"}
_SPLIT |= {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}


class Qwen25VL(Family):
    """Adapter for Qwen2.5-VL. `PreparedImage.grid` is (t, h, w) in patches, before merging."""

    tower = "visual"

    def prepare_image(self, processor: Any, image: PIL.Image.Image) -> PreparedImage:
        """Cuts the image into patches; `merge_size`² of them become one token."""
        features = processor.image_processor(images=[image], return_tensors="pt")
        grid = tuple(int(n) for n in features["image_grid_thw"][0])
        merge = processor.image_processor.merge_size
        return PreparedImage(
            pixel_values=features["pixel_values"],
            grid=grid,  # type: ignore[arg-type]
            num_tokens=grid[0] * grid[1] * grid[2] // merge**2,
        )

    def pixel_bounds(self, processor: Any) -> tuple[int, int] | None:
        """Returns areas, which Qwen's processors call edges."""
        size = processor.image_processor.size
        return int(size["shortest_edge"]), int(size["longest_edge"])

    def make_image_tokens(self, processor: Any, config: Any, image: PreparedImage) -> list[int]:
        """Returns the placeholders; the chat template has the marks around them."""
        return [self.image_token_id(config)] * image.num_tokens

    def vision_token_ids(self, processor: Any, config: Any) -> frozenset[int]:
        """Returns the ids of image, video, their marks and `<|vision_pad|>`."""
        # <|vision_pad|> is in the tokenizer only, the configuration has no field for it.
        pad = processor.tokenizer.get_vocab().get("<|vision_pad|>")
        ids = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
        return frozenset(ids) | (frozenset() if pad is None else {pad})

    def adapt(self, model: Any) -> None:
        """Lets the tower attend within all images by one kernel call, and embed patches by one product, on a GPU."""
        vision_tower.adapt(self.vision_tower(model))

    def encode_images(self, model: Any, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """Encodes the patches of all images in one call."""
        return [(embeddings,) for embeddings in self._encode(model, images).pooler_output]

    def _encode(self, model: Any, images: Sequence[PreparedImage]) -> Any:
        tower: Any = self.vision_tower(model)
        grids = _stack_grids(images)
        pixels = upload_rows([image.pixel_values for image in images], tower.device, tower.dtype)
        precomputed = self._precompute(tower, grids) if tower.device.type == "cuda" else {}
        # With the grids on the host, transformers splits the result without waiting for the device.
        return model.model.get_image_features(pixels, grids, return_dict=True, **precomputed)

    def _precompute(self, tower: Any, grids: torch.Tensor) -> dict[str, Any]:
        """Returns what transformers would derive from grids on the device, and wait for."""
        return vision_tower.compute_sequences(tower, grids) | vision_tower.compute_windows(tower, grids)

    def make_generation_inputs(
        self, model: Any, input_ids: torch.Tensor, images: Sequence[PreparedImage]
    ) -> dict[str, Any]:
        """Returns patches, grids and token types, empty without images."""
        if not images:
            return {}
        return {
            "pixel_values": torch.cat([image.pixel_values for image in images]).to(input_ids.device),
            "image_grid_thw": _stack_grids(images).to(input_ids.device),
            "mm_token_type_ids": (input_ids == self.image_token_id(model.config)).int(),
        }

    def compute_positions(self, model: Any, token_ids: torch.Tensor, images: Sequence[PreparedImage]) -> torch.Tensor:
        """Computes the multimodal RoPE index: (3, P), for time, height and width."""
        positions, _ = model.model.get_rope_index(
            token_ids[None],
            mm_token_type_ids=(token_ids == self.image_token_id(model.config)).int()[None],
            image_grid_thw=_stack_grids(images).to(token_ids.device) if images else None,
        )
        return positions[:, 0]

    def shape_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Adds an axis for the prompts: (3, 1, length)."""
        return positions[:, None]


class Qwen3VL(Qwen25VL):
    """Adapter for Qwen3-VL, as Qwen2.5-VL with deepstack features."""

    # transformers 5.19 has no plan for it; this is Qwen2.5-VL's. The norms of queries and keys are within one head.
    tp_plan: ClassVar[TpPlan] = {f"model.language_model.layers.*.{name}": how for name, how in _SPLIT.items()}

    def adapt(self, model: Any) -> None:
        """As Qwen2.5-VL's; the text model adds deepstack features at rows, and its layers compute by fewer kernels."""
        super().adapt(model)
        text_model: Any = self.language_model(model)
        text_model._deepstack_process = MethodType(_add_deepstack, text_model)
        fuse_text_layers(text_model)

    def encode_images(self, model: Any, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """Encodes the patches; the features of deeper layers follow the embeddings."""
        features = self._encode(model, images)
        deeper = [split_by_image(layer, images) for layer in features.deepstack_features]
        return list(zip(features.pooler_output, *deeper, strict=True))

    def _precompute(self, tower: Any, grids: torch.Tensor) -> dict[str, Any]:
        return vision_tower.compute_sequences(tower, grids) | vision_tower.compute_interpolation(tower, grids)

    def make_text_arguments(
        self, model: Any, input_ids: torch.Tensor, features: Sequence[ImageFeatures]
    ) -> dict[str, Any]:
        """Returns the deepstack features and their rows."""
        if not features:
            return {}
        _, *deepstack = zip(*features, strict=True)
        return {
            "visual_pos_masks": upload(self.find_image_rows(model, input_ids), deepstack[0][0].device),
            "deepstack_visual_embeds": [torch.cat(layer) for layer in deepstack],
        }


def split_by_image(layer: torch.Tensor | Sequence[torch.Tensor], images: Sequence[PreparedImage]) -> Sequence[Any]:
    """Returns a deepstack layer's features by image; transformers before 5.18 returns those of all in one tensor."""
    return layer.split([image.num_tokens for image in images]) if isinstance(layer, torch.Tensor) else layer


def _add_deepstack(self: Any, hidden: torch.Tensor, rows: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Adds features (n, D) at rows (n,) of (1, length, D), in place of transformers' `_deepstack_process`.

    That takes a mask, whose rows a GPU would have to count first; a mask, as `generate` passes it, takes its way still.
    """
    if rows.dtype == torch.bool:
        masked: torch.Tensor = type(self)._deepstack_process(self, hidden, rows, features)
        return masked
    rows = rows.to(hidden.device)
    return hidden.index_copy(1, rows, hidden.index_select(1, rows) + features.to(hidden.device, hidden.dtype))


def _stack_grids(images: Sequence[PreparedImage]) -> torch.Tensor:
    return torch.tensor([image.grid for image in images])
