"""Measures the cost of the service: the engine alone against gRPC, scheduler and four clients.

`python benchmarks/service_cost.py` prints one table. Both sides score the same prompts in forwards of the same size on
one thread, in turns; the images are uploaded beforehand. Answers must be equal within 1e-4 nats. Processor time of the
engine's and the server's other threads is given too, since it doesn't depend on other work on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import groups
import numpy as np
import tables
import timing
import torch
from serving import encoded, teacher_server, tokens_of

from vaopd.client import TeacherClient
from vaopd.types import Degradation, GroupScore, ScoreRequest, TeacherLimits
from vaopd.vlm.model import Vlm
from vaopd.wire.teacher import score_request_to_pb
from vaopd_teacher.engines.engine import EngineResult, PreparedGroup
from vaopd_teacher.engines.transformers_engine import GroupEngine
from vaopd_teacher.engines.vision_cache import VisionCache
from vaopd_teacher.intake.image_stores import ImageStore, PreparedImages
from vaopd_teacher.intake.prepare import CallSettings, Preparer

CLIENTS = 4


def request(vlm: Vlm, shape: groups.Shape, seed: int) -> ScoreRequest:
    """Makes a request as a trainer sends it; every eighth group has the same image."""
    image = encoded(groups.picture(shape, seed % 8))
    prepared_image = vlm.prepare_image(groups.picture(shape, seed % 8))
    return ScoreRequest(
        group_id=f"g{seed}",
        responses=tuple(ids.astype(np.int32) for ids in groups.response_ids(vlm, shape, seed)),
        images=(image,),
        prompt_token_ids=groups.prompt_ids(vlm, shape, prepared_image).astype(np.int32),
    )


def prepared(vlm: Vlm, requests: Sequence[ScoreRequest]) -> list[PreparedGroup]:
    """Prepares the requests as the server does."""
    store, views = ImageStore(2**30), PreparedImages(2**30)
    preparer = Preparer(vlm, store=store, views=views, limits=TeacherLimits())
    for request in requests:
        for image in request.images:
            preparer.admit_image(image)
    message = score_request_to_pb(requests, job="", payload="hidden")
    settings = CallSettings(payload="hidden", top_k=0, degradation=Degradation())
    return [preparer.prepare(group, settings) for group in message.groups]


def forwards(groups: Sequence[PreparedGroup], batch_tokens: int) -> list[list[PreparedGroup]]:
    """Splits groups into forwards as the service does."""
    batches: list[list[PreparedGroup]] = [[]]
    for item in groups:
        if batches[-1] and sum(group.tokens for group in [*batches[-1], item]) > batch_tokens:
            batches.append([])
        batches[-1].append(item)
    return batches


def alone(engine: GroupEngine, batches: Sequence[Sequence[PreparedGroup]]) -> tuple[float, dict[str, np.ndarray]]:
    started, logprobs = time.monotonic(), {}
    for batch in batches:
        for item, result in zip(batch, engine.score(batch), strict=True):
            assert isinstance(result, EngineResult), result
            logprobs[item.group_id] = result.columns["teacher_logprobs"]
    return time.monotonic() - started, logprobs


async def through_grpc(
    clients: Sequence[TeacherClient], requests: Sequence[ScoreRequest]
) -> tuple[float, dict[str, np.ndarray]]:
    logprobs: dict[str, np.ndarray] = {}

    async def score(client: TeacherClient, part: Sequence[ScoreRequest]) -> None:
        async for result in client.score(part):
            assert isinstance(result, GroupScore), result
            logprobs[result.group_id] = np.concatenate(result.teacher_logprobs)

    started = time.monotonic()
    await asyncio.gather(*(score(client, requests[n :: len(clients)]) for n, client in enumerate(clients)))
    return time.monotonic() - started, logprobs


async def measure(options: argparse.Namespace, model: Path) -> None:
    vlm = groups.load(model)
    shape = groups.Shape(prompt=options.prompt, response=options.response, rollouts=options.rollouts)
    requests = [request(vlm, shape, seed) for seed in range(options.groups)]
    batch_tokens = options.groups_per_forward * tokens_of(requests[0])
    engine = GroupEngine(vlm, batch_tokens=batch_tokens, vision_cache=VisionCache(vlm, capacity_bytes=2**30))
    batches = forwards(prepared(vlm, requests), batch_tokens)
    seconds: dict[str, list[float]] = {"alone": [], "through gRPC": []}
    cpu_s: tuple[list[float], list[float]] = ([], [])
    with teacher_server(model, batch_tokens=batch_tokens) as server:
        clients = [TeacherClient(server.target, job=f"job{n}") for n in range(CLIENTS)]
        alone(engine, batches)
        await through_grpc(clients, requests)
        for _ in range(options.repeats):
            elapsed, expected = alone(engine, batches)
            seconds["alone"].append(elapsed)
            before_s = server.cpu_s()
            elapsed, received = await through_grpc(clients, requests)
            seconds["through gRPC"].append(elapsed)
            for total, before, after in zip(cpu_s, before_s, server.cpu_s(), strict=True):
                total.append(after - before)
            largest = max(float(np.abs(expected[name] - received[name]).max()) for name in expected)
            assert largest < (0.1 if timing.ON_GPU else 1e-4), f"the answers differ by {largest}"
        for client in clients:
            await client.close()
    rates = {side: options.groups / statistics.median(values) for side, values in seconds.items()}
    engine_ms, server_ms = (1000 * statistics.median(values) / options.groups for values in cpu_s)
    ratios = [a / b for a, b in zip(seconds["alone"], seconds["through gRPC"], strict=True)]
    rows = [
        ("engine alone, groups per second", f"{rates['alone']:.3f}", ""),
        (f"through gRPC, {CLIENTS} clients", f"{rates['through gRPC']:.3f}", ""),
        (f"ratio, median of {options.repeats} ({min(ratios):.3f} to {max(ratios):.3f})",
         f"{statistics.median(ratios):.3f}", "≥ 0.95"),
        ("processor time per group, engine's thread / all of the server", f"{engine_ms:.0f} / {server_ms:.0f} ms", ""),
    ]  # fmt: skip
    title = f"Cost of the service: {options.groups} groups of {shape}, {options.groups_per_forward} in a forward"
    tables.table(title, ("", "measured", "target"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", type=int, default=650, choices=sorted(groups.IMAGE_SIDES))
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--groups-per-forward", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with groups.model_folder(32_000) as model:
        asyncio.run(measure(options, model))


if __name__ == "__main__":
    main()
