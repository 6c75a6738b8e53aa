"""Caches the frozen vision tower's output by image and view, for later epochs.

An entry holds everything that the text model takes of an image, deepstack features included, in the host's memory
(pinned beside a GPU), within a byte budget; `ReuseCache` says which entries make room. Only for weights that never
change: the student trains its tower.

On a GPU the tower runs once over all images of a forward that aren't cached, `TOWER_TOKENS` at a time, and nothing here
waits for the device. Other images beside it may change an image's features by rounding. On a CPU each image is encoded
by itself, so that its features are the same bits in every forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vaopd.vlm.families import ImageFeatures, PreparedImage
from vaopd.vlm.model import Vlm
from vaopd_teacher.engines.reuse_cache import ReuseCache

TOWER_TOKENS = 8192
"""Image tokens of a run of the tower on a GPU: about 3 GiB of an 8B teacher's tower. A larger image runs by itself."""


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """Features on the host, (parts · tokens, D), and the event of their copy down, which another stream waits for."""

    rows: Tensor
    parts: int
    event: torch.cuda.Event | None

    @property
    def nbytes(self) -> int:
        """The bytes that are taken: torch gives pinned memory out in powers of two."""
        needed = self.rows.nbytes
        return 1 << (needed - 1).bit_length() if self.rows.is_pinned() else needed


class VisionCache(ReuseCache[_Entry]):
    """Used by the engine's thread; the counters may be read from others.

    `hits`: features taken from the cache; an image that occurs twice in one forward counts once. `misses`: images that
    the vision tower encoded, among them all without a key.
    """

    def __init__(self, vlm: Vlm, *, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes, size_of=lambda entry: entry.nbytes)
        self._vlm = vlm

    def features(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """Returns the features of each image, in order, on the model's device."""
        found: dict[str | int, ImageFeatures] = {}
        missing: dict[str | int, PreparedImage] = {}
        for name, image in {_name(image): image for image in images}.items():
            if image.key is not None and (kept := self._find(image.key)) is not None:
                self.hits += 1
                found[name] = _load(kept, self._vlm.device)
            else:
                self.misses += 1
                missing[name] = image
        limit = TOWER_TOKENS if self._vlm.device.type == "cuda" else 0
        for batch in _make_batches(list(missing.values()), limit):
            for image, features in zip(batch, self._vlm.encode_images(batch), strict=True):
                found[_name(image)] = features
                if image.key is not None and self.capacity_bytes:
                    self._keep(image.key, _store(features))
        return [found[_name(image)] for image in images]


def _make_batches(images: Sequence[PreparedImage], limit: int) -> Iterator[list[PreparedImage]]:
    """Yields the images in order, as many at a time as have `limit` tokens together; at least one."""
    batch: list[PreparedImage] = []
    for image in images:
        if batch and sum(other.num_tokens for other in batch) + image.num_tokens > limit:
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch


def _store(features: ImageFeatures) -> _Entry:
    """Copies features to the host, by one copy that nothing waits for; a view would keep alive what it is a view of."""
    rows = torch.cat(features)
    if not rows.is_cuda:
        return _Entry(rows.to("cpu"), len(features), None)
    pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(rows.device))
    return _Entry(pinned, len(features), event)


def _load(entry: _Entry, device: torch.device) -> ImageFeatures:
    if entry.event is not None:
        torch.cuda.current_stream(device).wait_event(entry.event)
    return entry.rows.to(device, non_blocking=True).chunk(entry.parts)


def _name(image: PreparedImage) -> str | int:
    return id(image) if image.key is None else image.key
