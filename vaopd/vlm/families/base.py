"""What the adapters of all families hand to `vaopd.vlm.model`, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from vaopd.vlm.shared_attention import Layout, no_mask

TpPlan = dict[str, str] | Literal["auto"]
"""How tensor parallelism splits the text layers, in transformers' terms; "auto": transformers has a plan itself."""

ImageFeatures = tuple[torch.Tensor, ...]
"""Of one image: its embeddings (num_tokens, D), then what a family adds in deeper layers, of the same shape each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedImage:
    """One image as the vision tower reads it; compared by identity, so that sharing an object means sharing the work.

    pixel_values: whatever the family's vision tower takes, rows being patches or tiles; grid: (t, h, w) in patches, or
    what takes its place; num_tokens: placeholder tokens that the prompt holds for it; key: content and view by name,
    for caches, if known.
    """

    pixel_values: torch.Tensor
    grid: tuple[int, int, int]
    num_tokens: int
    key: str | None = None


class TextModelOf(Protocol):
    """The part of a family that `packed_hidden` needs."""

    def image_token_id(self, config: Any) -> int: ...
    def language_model(self, model: Any) -> torch.nn.Module: ...


def packed_hidden(
    family: TextModelOf,
    model: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    images: Sequence[torch.Tensor],
    layout: Layout,
    **kwargs: Any,
) -> torch.Tensor:
    """(length, D): the text model's last hidden states of a packed row, images embedded at the placeholders.

    input_ids: (1, length); position_ids: as the text model takes them; images: embeddings (tokens, D) in order.
    """
    embeddings = model.get_input_embeddings()(input_ids)
    if images:
        features = torch.cat(list(images)).to(embeddings.device, embeddings.dtype)
        embeddings = embeddings.masked_scatter((input_ids == family.image_token_id(model.config))[..., None], features)
    outputs = family.language_model(model)(
        inputs_embeds=embeddings,
        position_ids=position_ids,
        attention_mask=no_mask(embeddings.device),
        use_cache=False,
        layout=layout,
        **kwargs,
    )
    return outputs.last_hidden_state[0]
