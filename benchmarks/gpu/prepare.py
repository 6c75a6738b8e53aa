"""Both views of an image on the four CPU threads that the teacher has: images per second."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import timing
import torch

from benchmarks.gpu.measure import Check, measure_s
from vaopd.degradation import degrade
from vaopd.types import Degradation

SIDES_PX, COUNT = ((512, 1024, 2048), 16) if timing.ON_GPU else ((256,), 2)


def run(check: Check) -> None:
    processor = check.models._get_processor().image_processor
    rng = np.random.default_rng(0)
    threads = torch.get_num_threads()
    for side in SIDES_PX:
        buffer = io.BytesIO()
        PIL.Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=90)
        data = buffer.getvalue()

        def prepare(_: int, data: bytes = data) -> None:
            image = PIL.Image.open(io.BytesIO(data)).convert("RGB")
            for view in (image, degrade(image, Degradation(), seed=0)):
                processor(images=[view], return_tensors="pt")

        for inner in {threads, 1}:
            if not check.has_time(f"{side} px", 4):
                return
            torch.set_num_threads(inner)
            with ThreadPoolExecutor(4) as pool:
                seconds = measure_s(lambda pool=pool, one=prepare: list(pool.map(one, range(COUNT))), repeats=1)
            rate = COUNT / seconds
            check.tell(
                f"{side} px, torch with {inner} threads",
                f"{rate:.1f} images a second, both views",
                target="a step's 16 images in 1 s" if timing.ON_GPU else "",
                ok=rate >= 16 if timing.ON_GPU else None,
                images_s=rate,
            )
    torch.set_num_threads(threads)
