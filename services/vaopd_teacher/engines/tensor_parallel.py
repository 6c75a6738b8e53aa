"""Tensor parallelism: ranks hold a part of every text layer each, and compute the teacher's forwards together.

Rank 0 is the server. Its `LeadingVlm` sends each forward to the others, which `follow`: they receive it, compute the
same, and drop the result. The vision tower isn't split: rank 0 runs it, or has its output in the cache, and sends the
output along. Messages are safetensors over gloo, never pickles; an empty one ends a follower.

A forward that fails on one rank, out of memory included, leaves the others waiting inside it. So it ends the process,
as a broken device does, and the launcher of the ranks ends the others.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from vaopd.config import Config
from vaopd.errors import ConfigError
from vaopd.files.hub import model_folder
from vaopd.process import entry
from vaopd.process.ranks import check_devices, end_with_the_launcher
from vaopd.vlm.families import ImageFeatures, PreparedImage
from vaopd.vlm.model import Encode, Segment, Vlm
from vaopd.vlm.prompts import PreparedPrompt
from vaopd.vlm.revision import compute_revision

log = logging.getLogger(__name__)

LEADER = 0
# A teacher may have nothing to do for weeks; a dead peer ends the wait at once, since its connection closes.
_PATIENCE = timedelta(days=3650)


class Link:
    """Messages from rank 0 to all others. All ranks of the process group create one at the same time."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def send(self, data: bytes) -> None:
        """Sends a message, which may be empty, to all followers; called by rank 0."""
        dist.broadcast(torch.tensor([len(data)]), src=LEADER, group=self._group)
        if data:
            dist.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8), src=LEADER, group=self._group)

    def receive(self) -> bytes:
        """Waits for the next message. Raises RuntimeError when rank 0 has gone."""
        length = torch.zeros(1, dtype=torch.long)
        dist.broadcast(length, src=LEADER, group=self._group)
        data = torch.empty(int(length), dtype=torch.uint8)
        if len(data):
            dist.broadcast(data, src=LEADER, group=self._group)
        return data.numpy().tobytes()


@dataclass(frozen=True, kw_only=True)
class LeadingVlm(Vlm):
    """Rank 0's share of the model; its hidden states are the whole model's, computed with the followers."""

    link: Link

    def compute_response_hidden(self, segments: Sequence[Segment], *, encode: Encode | None = None) -> torch.Tensor:
        """Computes the hidden states (M, D) together with the followers; see `Vlm.compute_response_hidden`.

        Raises RuntimeError, which ends the process, when the memory is exhausted.
        """
        images = list({id(image): image for segment in segments for image in segment.prompt.images}.values())
        features = (encode or self.encode_images)(images)
        by_id = dict(zip(map(id, images), features, strict=True))
        self.link.send(pack_forward(segments, images, features))
        try:
            return super().compute_response_hidden(
                segments, encode=lambda images: [by_id[id(image)] for image in images]
            )
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"out of memory in a forward of {sum(segment.tokens for segment in segments)} tokens, which several "
                "ranks share; lower teacher.batch_tokens"
            ) from error

    def end_followers(self) -> None:
        """Ends the other ranks; call it when no forward is in progress."""
        self.link.send(b"")
        dist.destroy_process_group()


def lead(config: Config, *, processes: int) -> LeadingVlm:
    """Loads rank 0's model; blocks until all ranks have loaded theirs."""
    vlm = _load(config, processes)
    return LeadingVlm(
        path=vlm.path,
        model=vlm.model,
        processor=vlm.processor,
        config=vlm.config,
        family=vlm.family,
        eos_ids=vlm.eos_ids,
        link=Link(),
    )


def follow(config: Config, *, processes: int) -> int:
    """Runs a rank other than 0 until rank 0 ends it; returns its exit status."""
    with entry.loading():
        vlm = _load(config, processes)
    link = Link()
    compute_revision(vlm.model)  # rank 0 needs it, and all ranks have to take part
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the launcher sends them to all ranks, but rank 0 still drains
    while True:
        try:
            data = link.receive()
        except RuntimeError:
            log.error("rank 0 is gone; this rank ends too")
            return 1
        if not data:
            dist.destroy_process_group()
            return 0
        compute(vlm, data)


@torch.inference_mode()
def compute(vlm: Vlm, message: bytes) -> torch.Tensor:
    """Computes a rank's part of the forward that the message describes: -> (M, D)."""
    segments, features = unpack_forward(message, vlm.device)
    return vlm.compute_response_hidden(segments, encode=lambda images: [features[id(image)] for image in images])


def pack_forward(
    segments: Sequence[Segment], images: Sequence[PreparedImage], features: Sequence[ImageFeatures]
) -> bytes:
    """Encodes everything that a forward needs; `images`: the distinct ones of the segments, with their features."""
    place = {id(image): index for index, image in enumerate(images)}
    tensors = {
        "grids": torch.tensor([image.grid for image in images], dtype=torch.long).reshape(-1, 3),
        "num_tokens": torch.tensor([image.num_tokens for image in images], dtype=torch.long),
    }
    for index, parts in enumerate(features):
        for depth, part in enumerate(parts):
            # A copy of its own: safetensors refuses tensors that share their memory.
            tensors[f"image {index} {depth}"] = part.to("cpu", copy=True).contiguous()
    for index, segment in enumerate(segments):
        prompt, responses = segment.prompt, [np.asarray(ids, dtype=np.int64) for ids in segment.responses]
        tensors[f"segment {index} prompt"] = torch.tensor(prompt.token_ids, dtype=torch.long)
        tensors[f"segment {index} images"] = torch.tensor([place[id(i)] for i in prompt.images], dtype=torch.long)
        tensors[f"segment {index} lengths"] = torch.tensor([len(ids) for ids in responses], dtype=torch.long)
        tensors[f"segment {index} responses"] = torch.from_numpy(np.concatenate(responses))
    return to_safetensors(tensors)


def unpack_forward(message: bytes, device: torch.device) -> tuple[list[Segment], dict[int, ImageFeatures]]:
    """Decodes the segments, and each image's features by `id(image)`; the images' pixels stay with rank 0."""
    tensors = from_safetensors(message)
    nothing = torch.empty(0)
    images: list[PreparedImage] = []
    features: dict[int, ImageFeatures] = {}
    for index, (grid, num_tokens) in enumerate(
        zip(tensors["grids"].tolist(), tensors["num_tokens"].tolist(), strict=True)
    ):
        image = PreparedImage(pixel_values=nothing, grid=tuple(grid), num_tokens=num_tokens)
        depths = sum(name.startswith(f"image {index} ") for name in tensors)
        features[id(image)] = tuple(tensors[f"image {index} {depth}"].to(device) for depth in range(depths))
        images.append(image)
    segments = []
    for index in range(sum(name.endswith(" prompt") for name in tensors)):
        shown, lengths = (tensors[f"segment {index} {name}"].tolist() for name in ("images", "lengths"))
        prompt = PreparedPrompt(
            token_ids=tensors[f"segment {index} prompt"].numpy(), images=tuple(images[i] for i in shown)
        )
        responses = tensors[f"segment {index} responses"].split(lengths)
        segments.append(Segment(prompt=prompt, responses=tuple(ids.numpy() for ids in responses)))
    return segments, features


def check_heads(model: str, processes: int) -> None:
    """Raises ConfigError unless `processes` divides the key and value heads; reads the configuration only."""
    heads = AutoConfig.from_pretrained(model_folder(model, role="model")).get_text_config().num_key_value_heads
    if heads % processes:
        raise ConfigError(
            f"teacher.processes = {processes} doesn't divide the {heads} key and value heads of {model}; set one of "
            f"{', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}"
        )


def _load(config: Config, processes: int) -> Vlm:
    if (world := int(os.environ["WORLD_SIZE"])) != processes:
        raise ConfigError(f"teacher.processes = {processes}, but {world} ranks were started; start as many")
    check_devices("teacher", processes, there=torch.cuda.device_count())
    end_with_the_launcher()
    check_heads(config.teacher.model, processes)
    vlm = Vlm.load(
        config.teacher.model,
        dtype=config.teacher.dtype,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        tensor_parallel=True,
    )
    for name, weights in (("head", [vlm.head]), ("vision tower", vlm.family.vision_tower(vlm.model).parameters())):
        if any(isinstance(weight, DTensor) for weight in weights):
            raise ConfigError(f"transformers would split the {name} of {config.teacher.model}, which rank 0 uses alone")
    return vlm
