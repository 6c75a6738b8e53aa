"""The clients of the phase `grpc`, a process of its own: sends all groups twice, and prints a JSON line each time."""

from __future__ import annotations

import io
import json
import sys
import threading
import time

import numpy as np
import PIL.Image

from vaopd.client import SyncTeacherClient
from vaopd.types import EncodedImage, GroupScore, ScoreRequest


def main() -> None:
    address = sys.argv[1]
    prompt, response, rollouts, groups, clients, *marks = map(int, sys.argv[2:])
    requests = [make_request(i, prompt, response, rollouts, marks) for i in range(groups)]
    for _ in range(2):
        answers: list[object] = []

        def ask(part: list[ScoreRequest], answers: list[object] = answers) -> None:
            with SyncTeacherClient(address, job="benchmark", payload="hidden") as client:
                answers.extend(client.score(part))

        start = time.perf_counter()
        threads = [threading.Thread(target=ask, args=(requests[i::clients],)) for i in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        scores = [answer for answer in answers if isinstance(answer, GroupScore)]
        refused = [str(answer)[:120] for answer in answers if not isinstance(answer, GroupScore)]
        size = sum(len(tensor.data) for score in scores for tensor in score.payload.tensors.values())
        line = {"seconds": seconds, "bytes": size, "refused": groups - len(scores), "error": "".join(refused[:1])}
        print(json.dumps(line), flush=True)


def make_request(seed: int, prompt: int, response: int, rollouts: int, marks: list[int]) -> ScoreRequest:
    """Makes a group with an image of noise; marks: ids before, at and after image tokens, and the number of words."""
    start, pad, end, words = marks
    rng = np.random.default_rng(seed)
    height = int((prompt - 50) ** 0.5)
    width = (prompt - 50) // height
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (32 * height, 32 * width, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(buffer, "JPEG")
    text = rng.integers(0, words, prompt - height * width - 2)
    ids = np.concatenate(([start], [pad] * (height * width), [end], text)).astype(np.int32)
    return ScoreRequest(
        group_id=f"c{seed}",
        responses=tuple(rng.integers(0, words, response).astype(np.int32) for _ in range(rollouts)),
        images=(EncodedImage(data=buffer.getvalue()),),
        prompt_token_ids=ids,
    )


if __name__ == "__main__":
    main()
