"""Runs a vision-language model over prompt groups, the same way in teacher and trainer.

In: prompt groups, each a prompt with its responses. Out: hidden states of the response tokens, to which
`vaopd.divergence` applies the LM head in chunks. A prompt is computed once for all of its responses
(`vaopd.vlm.shared_attention`), its images once per forward. Code for a single family is in `families/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from vaopd.files.hub import model_folder
from vaopd.vlm import shared_attention
from vaopd.vlm.families import ImageFeatures, PreparedImage
from vaopd.vlm.fused_norms import use_fused_norms
from vaopd.vlm.placement import check_placement
from vaopd.vlm.prompts import PreparedPrompt, PromptReader
from vaopd.vlm.shared_attention import Layout
from vaopd.vlm.transfer import upload

Encode = Callable[[Sequence[PreparedImage]], list[ImageFeatures]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """A prompt and its responses (T_k,): one view of a prompt group, or some of its siblings."""

    prompt: PreparedPrompt
    responses: tuple[np.ndarray, ...]

    @property
    def tokens(self) -> int:
        """Tokens that a forward computes. A response's last token is only predicted, never read."""
        return len(self.prompt.token_ids) + sum(len(ids) - 1 for ids in self.responses)


@dataclass(frozen=True, kw_only=True)
class Vlm(PromptReader):
    """A loaded model with its processor. Made by `load`; the attributes are read-only."""

    path: Path
    """The model's folder, also of a hub id: the trainer copies its tokenizer and configuration."""
    model: Any

    def __post_init__(self) -> None:
        self.family.adapt(self.model)
        use_fused_norms(self.model)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "float32",
        device: str | None = None,
        device_map: str | dict[str, str] | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        tensor_parallel: bool = False,
    ) -> Vlm:
        """Loads a model, in evaluation mode, from a folder or hub id.

        dtype: torch's name of the weights' type.
        device_map: accelerate's; spreads the weights over several devices, and `device` is then ignored.
        device: "meta" builds the model without its weights, for a trainer that reads each rank's share of them.
        min_pixels, max_pixels: override the processor's bounds on an image's size.
        tensor_parallel: splits each text layer over all ranks of the process group; all ranks must then make the same
        calls.

        Raises ConfigError for a model that isn't found, one that doesn't fit, or a family without an adapter.
        """
        reader = PromptReader.open(path, min_pixels=min_pixels, max_pixels=max_pixels)
        from transformers import AutoModelForImageTextToText

        shared_attention.register()
        options: dict[str, Any] = {"device_map": device_map}
        if tensor_parallel:
            from transformers.distributed import DistributedConfig

            options = {"distributed_config": DistributedConfig(tp_plan=reader.family.tp_plan)}
        folder = model_folder(str(path), role="model")
        attention = {"text_config": shared_attention.ATTENTION, "vision_config": "sdpa", "": "sdpa"}
        model: Any
        if device == "meta":
            model = _build_without_weights(folder, dtype=getattr(torch, dtype), attn_implementation=attention)
        else:
            model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=getattr(torch, dtype), attn_implementation=attention, **options
            )
            check_placement(model, str(path))
        if device not in (None, "meta") and device_map is None:
            model = model.to(device)
        return cls(
            path=folder,
            model=model.eval(),
            processor=reader.processor,
            config=model.config,
            family=reader.family,
            eos_ids=reader.eos_ids,
        )

    @property
    def head(self) -> torch.Tensor:
        """The LM head's rows for the logical vocabulary, (V, D); a view of the parameter."""
        return self.padded_head[: self.vocab_size]

    @property
    def padded_head(self) -> torch.Tensor:
        """The LM head as it is stored, (V_pad, D), for `vaopd.divergence.head`: its rows beyond V mean nothing."""
        return self.model.get_output_embeddings().weight

    @property
    def device(self) -> torch.device:
        """The device of the embeddings, which take the token ids."""
        return self.model.get_input_embeddings().weight.device

    def prepare_image(self, image: PIL.Image.Image) -> PreparedImage:
        """Prepares a picture as `PromptReader` does, in the tower's precision: it would round the pixels anyway."""
        prepared = super().prepare_image(image)
        tower: Any = self.family.vision_tower(self.model)
        return replace(prepared, pixel_values=prepared.pixel_values.to(tower.dtype))

    def encode_images(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """Returns the vision tower's output for each image. The tower runs once, over the distinct objects."""
        distinct = list({id(image): image for image in images}.values())
        features = self.family.encode_images(self.model, distinct) if distinct else []
        by_id = dict(zip(map(id, distinct), features, strict=True))
        return [by_id[id(image)] for image in images]

    def compute_response_hidden(self, segments: Sequence[Segment], *, encode: Encode | None = None) -> torch.Tensor:
        """Computes the hidden states (M, D) that predict the response tokens, in one forward.

        M: all response tokens, segment after segment, response after response.
        encode: returns the images' features in place of `encode_images`, for example from a cache.
        """
        images = [image for segment in segments for image in segment.prompt.images]
        features = (encode or self.encode_images)(images)
        layout = Layout([(len(s.prompt.token_ids), [len(ids) - 1 for ids in s.responses]) for s in segments])
        ids, positions = [], []
        rows: list[np.ndarray | list[int]] = []
        at = 0
        for segment in segments:
            prompt = torch.from_numpy(segment.prompt.token_ids)
            places = self.family.compute_positions(self.model, prompt, segment.prompt.images)
            ids.append(prompt)
            positions.append(places)
            last, after = at + len(prompt) - 1, int(places.max()) + 1
            at += len(prompt)
            for response in segment.responses:
                read = len(response) - 1
                ids.append(torch.from_numpy(np.asarray(response[:-1], dtype=np.int64)))
                positions.append(torch.arange(after, after + read).expand(len(places), -1))
                # The prompt's last token predicts the first of every response, then each token the next.
                rows += [[last], np.arange(at, at + read)]
                at += read
        hidden = self.family.compute_hidden(self.model, torch.cat(ids), torch.cat(positions, dim=1), features, layout)
        return hidden[upload(torch.from_numpy(np.concatenate(rows)), hidden.device)]


def _build_without_weights(folder: Path, **options: Any) -> Any:
    """Builds the model with its parameters on "meta", and its buffers, which no file holds, as they are."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageTextToText

    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), **options)
    model.tie_weights()
    return model


def find_file_names(files: Iterable[str], model: Any, own: Mapping[str, Any]) -> dict[str, str]:
    """Returns module's name -> name in the model's files, which older ones name otherwise; as transformers maps them.

    files: the names there. own: the modules' names; a tensor of the files that is none of these may be mapped all the
    same. The model must not be sharded yet, since transformers knows its modules by their classes.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    # The other kind computes tensors, e.g. joins experts; no family here has any.
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    return {rename_source_key(name, renamings, [], model.base_model_prefix, dict(own))[0]: name for name in files}
