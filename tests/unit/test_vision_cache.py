"""The vision tower's output by image and view: when the tower runs, what is kept, and what it changes (nothing)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.families import FAMILIES, ask, family_vlm
from tests.support.teacher import drawing
from vaopd.degradation import pixelate
from vaopd.vlm.families import PreparedImage
from vaopd.vlm.model import Vlm
from vaopd_teacher.engines import vision_cache
from vaopd_teacher.engines.engine import EngineResult, PreparedGroup
from vaopd_teacher.engines.transformers_engine import GroupEngine
from vaopd_teacher.engines.vision_cache import VisionCache

PLENTY = 2**30


def prepared(vlm: Vlm, seed: int, *, view: str = "original", key: bool = True) -> PreparedImage:
    picture = drawing(seed) if view == "original" else pixelate(drawing(seed), 0.1)
    return replace(vlm.prepare_image(picture), key=f"{seed}:{view}" if key else None)


@contextmanager
def counted_tower(vlm: Vlm) -> Iterator[list[int]]:
    """The number of patches or tiles of each run of the vision tower meanwhile."""
    runs: list[int] = []
    tower = vlm.family.vision_tower(vlm.model)
    hook = tower.register_forward_pre_hook(
        lambda _, args, kwargs: runs.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    try:
        yield runs
    finally:
        hook.remove()


def bytes_of_one(vlm: Vlm) -> int:
    cache = VisionCache(vlm, capacity_bytes=PLENTY)
    cache.features([prepared(vlm, 0)])
    return cache.size_bytes


@pytest.fixture(autouse=True)
def _as_the_engine_does() -> Iterator[None]:
    with torch.inference_mode():
        yield


def group(vlm: Vlm, seed: int) -> PreparedGroup:
    """A group over image `seed`, as the teacher's preparation makes it: new objects for every request."""
    prompt = ask(vlm, [drawing(seed)])
    return PreparedGroup(
        group_id=str(seed),
        original=replace(prompt, images=(prepared(vlm, seed),)),
        degraded=replace(prompt, images=(prepared(vlm, seed, view="pixelate:0.1"),)),
        responses=(np.array([5, 6, 7]), np.array([8, 9])),
        payload="none",
        top_k=0,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_five_epochs_run_the_tower_once_per_image_and_view(family: str) -> None:
    vlm = family_vlm(family)
    cache = VisionCache(vlm, capacity_bytes=PLENTY)
    engine = GroupEngine(vlm, batch_tokens=512, vision_cache=cache)
    epochs = []
    with counted_tower(vlm) as runs:
        for _ in range(5):
            epochs.append(list(engine.score([group(vlm, seed) for seed in range(3)])))
    assert len(runs) == 3 * 2
    assert (cache.misses, cache.hits) == (6, 4 * 6)
    for results in zip(*epochs, strict=True):
        first = results[0]
        assert isinstance(first, EngineResult)
        for later in results[1:]:
            assert isinstance(later, EngineResult)
            for name in ("teacher_logprobs", "degraded_logprobs"):
                assert np.array_equal(first.columns[name], later.columns[name])


def test_the_views_of_an_image_are_kept_apart() -> None:
    vlm = family_vlm("qwen3_vl")
    cache = VisionCache(vlm, capacity_bytes=PLENTY)
    original, degraded = prepared(vlm, 1), prepared(vlm, 1, view="pixelate:0.1")
    first = cache.features([original, degraded])
    again = cache.features([degraded, original])
    assert not torch.equal(first[0][0], first[1][0])
    for kept, fresh in ((again[1], first[0]), (again[0], first[1])):
        assert len(kept) == 2  # embeddings and one deepstack layer
        assert all(torch.equal(a, b) for a, b in zip(kept, fresh, strict=True))


def test_an_image_without_a_key_is_never_kept_but_encoded_once_per_forward() -> None:
    vlm = family_vlm("qwen3_vl")
    cache = VisionCache(vlm, capacity_bytes=PLENTY)
    nameless = prepared(vlm, 1, key=False)
    with counted_tower(vlm) as runs:
        cache.features([nameless, nameless])
        cache.features([nameless])
    assert len(runs) == 2
    assert cache.size_bytes == 0


def test_an_image_that_was_used_makes_room_for_a_new_one() -> None:
    vlm = family_vlm("qwen3_vl")
    cache = VisionCache(vlm, capacity_bytes=2 * bytes_of_one(vlm))
    for seed in (1, 2, 1, 3):  # 2 still waits for its epoch when 3 comes
        cache.features([prepared(vlm, seed)])
    with counted_tower(vlm) as runs:
        cache.features([prepared(vlm, 2), prepared(vlm, 3)])
        assert not runs
        cache.features([prepared(vlm, 1)])
        assert len(runs) == 1
    assert cache.size_bytes == 2 * bytes_of_one(vlm)


def test_epochs_over_more_images_than_fit_hit_those_that_do() -> None:
    """Three of five fit: the least recently used first would hit none of them."""
    vlm = family_vlm("qwen3_vl")
    cache = VisionCache(vlm, capacity_bytes=3 * bytes_of_one(vlm))
    for _ in range(3):
        for seed in range(5):
            cache.features([prepared(vlm, seed)])
    assert (cache.hits, cache.misses) == (2 * 3, 3 * 5 - 2 * 3)


class Tower:
    """A GPU's, as the cache sees it; notes the images of each of its runs."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        self.runs: list[list[PreparedImage]] = []

    def encode_images(self, images: list[PreparedImage]) -> list[tuple[torch.Tensor]]:
        self.runs.append(images)
        return [(torch.zeros(image.num_tokens, 1),) for image in images]


def test_a_gpu_s_tower_runs_over_several_images_up_to_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [prepared(family_vlm("qwen3_vl"), seed) for seed in range(5)]
    for room, runs in ((2 * images[0].num_tokens, [images[:2], images[2:4], images[4:]]), (1, [[i] for i in images])):
        monkeypatch.setattr(vision_cache, "TOWER_TOKENS", room)
        tower: Any = Tower()
        VisionCache(tower, capacity_bytes=0).features(images)
        assert tower.runs == runs


def test_an_entry_takes_the_bytes_of_embeddings_and_deepstack_features() -> None:
    vlm = family_vlm("qwen3_vl")
    image = prepared(vlm, 1)
    layers = 1 + len(vlm.config.vision_config.deepstack_visual_indexes)
    assert bytes_of_one(vlm) == image.num_tokens * vlm.hidden_size * layers * 4


def test_pinned_memory_counts_in_powers_of_two() -> None:
    rows: Any = SimpleNamespace(nbytes=5, is_pinned=lambda: True)
    assert vision_cache._Entry(rows, 1, None).nbytes == 8


def test_what_never_fits_is_not_kept() -> None:
    vlm = family_vlm("qwen3_vl")
    cache = VisionCache(vlm, capacity_bytes=bytes_of_one(vlm) - 1)
    cache.features([prepared(vlm, 1)])
    assert (cache.size_bytes, cache.dropped) == (0, 0)
