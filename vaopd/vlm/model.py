"""A vision-language model with its tokenizer and processor: the one way in which teacher and trainer read a prompt.

What arrives: prompt groups, each a prompt with the responses after it. What leaves: hidden states of the response
tokens, over which `vaopd.divergence` applies the LM head in chunks. A prompt is computed once for all of its responses
(`vaopd.vlm.shared_attention`), its images once per forward. What is specific to a family is in `families/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vaopd.vlm import shared_attention
from vaopd.vlm.families import ImageFeatures, PreparedImage
from vaopd.vlm.prompts import PreparedPrompt, PromptReader
from vaopd.vlm.shared_attention import Layout

Encode = Callable[[Sequence[PreparedImage]], list[ImageFeatures]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """A prompt and the responses (T_k,) after it: one view of a prompt group, or a part of its siblings."""

    prompt: PreparedPrompt
    responses: tuple[np.ndarray, ...]

    @property
    def tokens(self) -> int:
        """What a forward computes; a response's last token is only predicted, never read."""
        return len(self.prompt.token_ids) + sum(len(ids) - 1 for ids in self.responses)


@dataclass(frozen=True, kw_only=True)
class Vlm(PromptReader):
    """A loaded model. `load` makes it; the attributes are read-only."""

    path: Path
    model: Any

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "float32",
        device: str | None = None,
        device_map: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        tensor_parallel: bool = False,
    ) -> Vlm:
        """Loads a folder or hub id; `device_map` (accelerate) spreads the weights over several devices.

        `tensor_parallel` spreads each text layer over all ranks of the process group, which then have to make the same
        calls.
        """
        reader = PromptReader.open(path, min_pixels=min_pixels, max_pixels=max_pixels)
        from transformers import AutoModelForImageTextToText

        shared_attention.register()
        options: dict[str, Any] = {"device_map": device_map}
        if tensor_parallel:
            from transformers.distributed import DistributedConfig

            options = {"distributed_config": DistributedConfig(tp_plan=reader.family.tp_plan)}
        model: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation={"text_config": shared_attention.ATTENTION, "vision_config": "sdpa", "": "sdpa"},
            **options,
        )
        if device is not None and device_map is None:
            model = model.to(device)
        return cls(
            path=Path(path),
            model=model.eval(),
            processor=reader.processor,
            config=model.config,
            family=reader.family,
            eos_ids=reader.eos_ids,
        )

    @property
    def head(self) -> torch.Tensor:
        """(V, D): the LM head's rows for the logical vocabulary; a view of the parameter."""
        return self.model.get_output_embeddings().weight[: self.vocab_size]

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.model.get_input_embeddings().weight.device

    def encode_images(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """The vision tower's output for each image; it runs once, over the distinct objects among them."""
        distinct = list({id(image): image for image in images}.values())
        features = self.family.encode_images(self.model, distinct) if distinct else []
        by_id = dict(zip(map(id, distinct), features, strict=True))
        return [by_id[id(image)] for image in images]

    def response_hidden(self, segments: Sequence[Segment], *, encode: Encode | None = None) -> torch.Tensor:
        """(M, D) hidden states that predict the response tokens, segment after segment, in one forward.

        `encode`: where images' features come from, if not from `encode_images`.
        """
        images = [image for segment in segments for image in segment.prompt.images]
        features = (encode or self.encode_images)(images)
        layout = Layout([(len(s.prompt.token_ids), [len(ids) - 1 for ids in s.responses]) for s in segments])
        ids, positions, rows = [], [], []
        at = 0
        for segment in segments:
            prompt = torch.from_numpy(segment.prompt.token_ids)
            places = self.family.prompt_positions(self.model, prompt, segment.prompt.images)
            ids.append(prompt)
            positions.append(places)
            last, after = at + len(prompt) - 1, int(places.max()) + 1
            at += len(prompt)
            for response in segment.responses:
                read = len(response) - 1
                ids.append(torch.from_numpy(np.asarray(response[:-1], dtype=np.int64)))
                positions.append(torch.arange(after, after + read).expand(len(places), -1))
                # The prompt's last token predicts the first of every response, then each token the next.
                rows += [last, *range(at, at + read)]
                at += read
        device = self.device
        hidden = self.family.hidden(
            self.model, torch.cat(ids).to(device), torch.cat(positions, dim=1).to(device), features, layout
        )
        return hidden[torch.tensor(rows, device=hidden.device)]
