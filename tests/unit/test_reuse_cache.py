"""The cache of computed images: a data set that is larger than it is hit as often as it fits."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from vaopd_teacher.engines.reuse_cache import ReuseCache


class Cache(ReuseCache[str]):
    def read(self, keys: Iterable[str]) -> int:
        """Looks the keys up, keeps those that are missing; returns the hits."""
        hits = 0
        for key in keys:
            if (value := self._find(key)) is None:
                self._keep(key, key)
            else:
                assert value == key
                hits += 1
        assert self.size_bytes <= self.capacity_bytes
        return hits


def cache_of(values: int) -> Cache:
    """A cache with room for so many values of ten bytes."""
    return Cache(10 * values, size_of=lambda _: 10)


def data_set(name: str, size: int) -> list[str]:
    return [f"{name}{index}" for index in range(size)]


def test_a_cyclic_reader_hits_the_share_that_fits() -> None:
    """The least recently used first would hit nothing, ever."""
    cache = cache_of(25)
    assert cache.read(data_set("a", 100)) == 0
    for _ in range(6):
        assert cache.read(data_set("a", 100)) == 25


def test_a_shuffled_reader_hits_that_share_too() -> None:
    cache, rng = cache_of(25), random.Random(0)
    for epoch in range(10):
        hits = cache.read(rng.sample(data_set("a", 100), 100))
        assert hits == (25 if epoch else 0)


def test_what_fits_is_always_hit() -> None:
    cache, rng = cache_of(100), random.Random(0)
    cache.read(data_set("a", 100))
    for _ in range(3):
        assert cache.read(rng.sample(data_set("a", 100), 100)) == 100
    assert (cache.dropped, cache.refused) == (0, 0)


def test_another_data_set_takes_the_room_at_once() -> None:
    cache = cache_of(25)
    for _ in range(3):
        cache.read(data_set("a", 100))
    cache.read(data_set("b", 20))
    assert cache.read(data_set("b", 20)) == 20


def test_values_that_were_read_once_give_way_to_those_that_are_read_again_and_again() -> None:
    cache = cache_of(10)
    cache.read(data_set("once", 10))
    found = [cache.read(data_set("b", 20)) for _ in range(40)]
    assert found[0] == 0
    assert found[-1] == 10  # after 640 look-ups, 64 for each value, which are 32 epochs


def test_a_small_data_set_gives_way_at_once() -> None:
    cache = cache_of(25)
    for _ in range(2):
        cache.read(data_set("a", 25))
    cache.read(data_set("b", 25))
    assert cache.read(data_set("b", 25)) == 25


def test_each_step_s_images_are_found_when_they_are_scored() -> None:
    """As the service reads them: all of a step at their upload, then all at their scoring, and never again."""
    enough, scarce = cache_of(40), cache_of(10)
    for step in range(5):
        images: Sequence[str] = data_set(f"step {step} ", 32)
        assert (enough.read(images), enough.read(images)) == (0, 32)
        assert (scarce.read(images), scarce.read(images)) == (0, 10)


def test_uploads_that_are_never_scored_give_way() -> None:
    cache = cache_of(10)
    cache.read(data_set("abandoned", 10))
    found = []
    for step in range(60):
        images = data_set(f"step {step} ", 16)
        cache.read(images)
        found.append(cache.read(images))
    assert found[-1] == 10


def test_a_value_that_never_fits_is_refused_and_drops_nothing() -> None:
    cache = cache_of(2)
    cache.read(data_set("a", 2))
    cache._size_of = lambda _: 21
    cache.read(["large"])
    assert (cache.dropped, cache.refused, cache.size_bytes) == (0, 1, 20)
