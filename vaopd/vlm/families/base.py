"""What a family of vision-language models is to `vaopd.vlm`, with the answers that most families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import PIL.Image
import torch

from vaopd.vlm.shared_attention import Layout, make_empty_mask
from vaopd.vlm.transfer import upload, upload_rows

TpPlan = dict[str, str] | Literal["auto"]
"""How tensor parallelism splits the text layers, in transformers' terms; "auto": by transformers' own plan."""

ImageFeatures = tuple[torch.Tensor, ...]
"""One image's embeddings (num_tokens, D), then those that a family adds in deeper layers, each of the same shape."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedImage:
    """One image as the vision tower reads it. Compared by identity: an object used twice is encoded once."""

    pixel_values: torch.Tensor
    """The vision tower's input; rows are patches or tiles."""
    grid: tuple[int, int, int]
    """(t, h, w) in patches, or the family's equivalent."""
    num_tokens: int
    """Placeholder tokens in the prompt."""
    key: str | None = None
    """Names content and view, for caches; None if unknown."""


class Family(ABC):
    """The methods that `vaopd.vlm` needs; those that aren't abstract suit most families.

    `processor`, `config` and `model` (a …ForConditionalGeneration) are transformers' own.
    """

    tp_plan: ClassVar[TpPlan] = "auto"
    tower: ClassVar[str]
    """The vision tower's name in `model.model`."""
    text_model: ClassVar[str] = "language_model"
    """The name of the text model without its LM head; it takes `inputs_embeds`, `position_ids` and `layout`."""

    @abstractmethod
    def prepare_image(self, processor: Any, image: PIL.Image.Image) -> PreparedImage:
        """Computes the pixel values, grid and number of placeholder tokens of one RGB image."""

    def pixel_bounds(self, processor: Any) -> tuple[int, int] | None:
        """Returns the fewest and the most pixels that the processor scales an image to; None if tiles have one size."""
        return None

    def image_token_id(self, config: Any) -> int:
        """Returns the placeholder's id: one per image in a rendered prompt, one per image token after expansion."""
        return int(config.image_token_id)

    @abstractmethod
    def make_image_tokens(self, processor: Any, config: Any, image: PreparedImage) -> list[int]:
        """Returns the ids that replace an image's placeholder: its image tokens and any marks around them."""

    def runs(self, image: PreparedImage) -> list[int]:
        """Returns the lengths of the image's runs of placeholders, in order: one run, or one for each tile."""
        return [image.num_tokens]

    @abstractmethod
    def vision_token_ids(self, processor: Any, config: Any) -> frozenset[int]:
        """Returns every id that announces vision input; a response must not contain any."""

    def vision_tower(self, model: Any) -> torch.nn.Module:
        """Returns the module that `student.train_vision_tower = false` freezes."""
        tower: torch.nn.Module = getattr(model.model, self.tower)
        return tower

    def language_model(self, model: Any) -> torch.nn.Module:
        """Returns the text model."""
        text_model: torch.nn.Module = getattr(model.model, self.text_model)
        return text_model

    def adapt(self, model: Any) -> None:  # noqa: B027  most families have nothing to replace
        """Replaces parts of transformers' model, in place, by equal ones that are faster on GPUs; may be repeated."""

    @abstractmethod
    def encode_images(self, model: Any, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """Runs the vision tower over the images, distinct and at least one; returns each one's features."""

    @abstractmethod
    def make_generation_inputs(
        self, model: Any, input_ids: torch.Tensor, images: Sequence[PreparedImage]
    ) -> dict[str, Any]:
        """Returns the arguments of `model.generate` besides the prompt's input_ids (1, P), none without images."""

    def compute_positions(self, model: Any, token_ids: torch.Tensor, images: Sequence[PreparedImage]) -> torch.Tensor:
        """Computes the position ids (A, P) of a prompt (P,) on A axes; here on one, from 0.

        A response continues with the largest plus 1, on every axis.
        """
        return torch.arange(len(token_ids))[None]

    def compute_hidden(
        self,
        model: Any,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        features: Sequence[ImageFeatures],
        layout: Layout,
    ) -> torch.Tensor:
        """Computes the LM head's input (length, D) for a packed row (length,) with positions (A, length).

        input_ids, positions: on the host. The images' features are put in the order of the placeholders.
        """
        table = model.get_input_embeddings()
        embeddings = table(upload(input_ids, table.weight.device)[None])
        device = embeddings.device
        if features:
            images = torch.cat([embedded for embedded, *_ in features]).to(device, embeddings.dtype)
            rows = upload(self.find_image_rows(model, input_ids), device)
            embeddings = embeddings.index_copy(1, rows, images[None])
        outputs = self.language_model(model)(
            inputs_embeds=embeddings,
            position_ids=upload(self.shape_positions(positions), device),
            attention_mask=make_empty_mask(device),
            use_cache=False,
            layout=layout,
            **self.make_text_arguments(model, input_ids, features),
        )
        hidden: torch.Tensor = outputs.last_hidden_state[0]
        return hidden

    def shape_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Returns positions (A, length) in the text model's form."""
        return positions

    def make_text_arguments(
        self, model: Any, input_ids: torch.Tensor, features: Sequence[ImageFeatures]
    ) -> dict[str, Any]:
        """Returns further arguments of the text model."""
        return {}

    def find_image_rows(self, model: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the places of the image tokens in a row (length,): on the host, since a GPU would have to wait."""
        return (input_ids == self.image_token_id(model.config)).nonzero()[:, 0]


class TiledFamily(Family):
    """A family whose processor cuts an image into tiles of one size; `PreparedImage.grid` begins with their number."""

    def pack_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        """Returns the tiles (tiles, 3, H, W) of all images in the model's form."""
        return tiles

    def encode_images(self, model: Any, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """Encodes the tiles of all images in one call."""
        tower: Any = self.vision_tower(model)
        pixels = self.pack_tiles(upload_rows([image.pixel_values for image in images], tower.device, tower.dtype))
        tiles = model.model.get_image_features(pixels, return_dict=True).pooler_output
        return [(part.flatten(0, 1),) for part in tiles.split([image.grid[0] for image in images])]

    def make_generation_inputs(
        self, model: Any, input_ids: torch.Tensor, images: Sequence[PreparedImage]
    ) -> dict[str, Any]:
        """Returns all tiles."""
        if not images:
            return {}
        tiles = torch.cat([image.pixel_values for image in images])
        return {"pixel_values": self.pack_tiles(tiles).to(input_ids.device)}
