"""The 8B's vision tower through the cache, against one call; how often the host waits. On a GPU only."""

from __future__ import annotations

import floor
import timing
import torch

from benchmarks.gpu.measure import Check, count_waits, measure_s, profile_s
from benchmarks.gpu.models import make_image
from vaopd_teacher.engines.vision_cache import VisionCache


@torch.inference_mode()
def run(check: Check) -> None:
    if not timing.ON_GPU:
        check.tell("the tower", "needs a GPU")
        return
    vlm = check.models.teacher()
    counted = floor.Model.of(vlm.config)
    for tokens, count in ((256, 16), (1024, 4), (4096, 1)):
        name = f"{count} images of {tokens} tokens"
        if not check.has_time(name, 4):
            continue
        images = [make_image(tokens, i) for i in range(count)]
        cache = VisionCache(vlm, capacity_bytes=0)
        cached_s = measure_s(lambda images=images, cache=cache: cache.features(images))
        together_s = measure_s(lambda images=images: vlm.encode_images(images))
        _, _, calls = profile_s(lambda images=images: vlm.encode_images(images))
        pixels_s = measure_s(lambda images=images: images[0].pixel_values.to("cuda"))
        rate = count * counted.count_vision_cost(tokens)[0] / cached_s / 1e12
        waits = count_waits(calls)
        check.tell(
            name,
            f"{1e3 * cached_s / count:.1f} ms each through the cache ({rate:.0f} TFLOP/s), "
            f"{1e3 * together_s / count:.1f} in one call; the host waits {waits} times in it; "
            f"pixels of one to the device {1e3 * pixels_s:.1f} ms",
            target="≥ 250 TFLOP/s, no wait" if tokens >= 1024 else "",
            ok=rate >= 250 and waits == 0 if tokens >= 1024 else None,
            ms=1e3 * cached_s / count,
            together_ms=1e3 * together_s / count,
            tflops=rate,
            waits=waits,
        )
