"""Types and functions that the adapters of all families share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from vaopd.vlm.shared_attention import Layout, make_empty_mask
from vaopd.vlm.transfer import upload

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


class TextModelOf(Protocol):
    """The part of a family that `compute_packed_hidden` needs."""

    def image_token_id(self, config: Any) -> int:
        """See `Family`."""
        ...

    def language_model(self, model: Any) -> torch.nn.Module:
        """See `Family`."""
        ...


def compute_packed_hidden(
    family: TextModelOf,
    model: Any,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    images: Sequence[torch.Tensor],
    layout: Layout,
    **kwargs: Any,
) -> torch.Tensor:
    """Computes the text model's last hidden states (length, D) of a packed row, with images at the placeholders.

    input_ids: (length,), on the host.
    positions: in the text model's form, on the host.
    images: embeddings (tokens, D) in the order of the placeholders.
    """
    table = model.get_input_embeddings()
    device = table.weight.device
    embeddings = table(upload(input_ids, device)[None])
    if images:
        features = torch.cat(list(images)).to(embeddings.device, embeddings.dtype)
        rows = upload(find_image_rows(family, model, input_ids), embeddings.device)
        embeddings = embeddings.index_copy(1, rows, features[None])
    outputs = family.language_model(model)(
        inputs_embeds=embeddings,
        position_ids=upload(positions, embeddings.device),
        attention_mask=make_empty_mask(embeddings.device),
        use_cache=False,
        layout=layout,
        **kwargs,
    )
    return outputs.last_hidden_state[0]


def find_image_rows(family: TextModelOf, model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Returns the places of the image tokens in a row (length,): on the host, since a GPU would have to wait."""
    return (input_ids == family.image_token_id(model.config)).nonzero()[:, 0]
