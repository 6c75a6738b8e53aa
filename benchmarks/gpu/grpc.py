"""The whole teacher service with four clients in another process, hidden payload, against the engine alone."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import groups
import timing
import torch

from benchmarks.gpu.measure import Check, measure_s
from benchmarks.gpu.models import BATCH_TOKENS, count_words, make_engine, make_group
from vaopd.vlm.model import Vlm
from vaopd_teacher.server import TeacherServer

PROMPT, RESPONSE, ROLLOUTS, GROUPS = (650, 1000, 4, 16) if timing.ON_GPU else (100, 8, 4, 4)
CLIENTS = 4
TURNS = ("new images", "known images")


def run(check: Check) -> None:
    vlm = check.models.teacher()
    alone_s = {}
    for turn, key in zip(TURNS, (None, "known"), strict=True):
        engine = make_engine(vlm)
        pair = [make_group(vlm, PROMPT, [RESPONSE] * ROLLOUTS, seed=i, key=key and f"{key}{i}") for i in range(2)]
        with torch.inference_mode():
            alone_s[turn] = measure_s(lambda engine=engine, pair=pair: groups.score(engine, pair)) / 2
    lines, busy_s = asyncio.run(serve(vlm, timeout_s=max(30.0, check.left_s)))
    for turn, line in zip(TURNS, lines, strict=True):
        found = json.loads(line)
        each_s = found["seconds"] / GROUPS
        share = alone_s[turn] / each_s
        check.tell(
            f"{turn}: {GROUPS} groups, P {PROMPT}, R {RESPONSE}, K {ROLLOUTS}",
            f"{1e3 * each_s:.0f} ms a group, the engine alone {1e3 * alone_s[turn]:.0f}: {share:.2f}; payload "
            f"{found['bytes'] / found['seconds'] / 1e6:.0f} MB/s; {found['refused']} refused {found['error']}",
            target="≥ 0.95 of the engine alone" if timing.ON_GPU else "none refused",
            ok=not found["refused"] and (share >= 0.95 or not timing.ON_GPU),
            ms=1e3 * each_s,
            share=share,
        )
    check.tell("seconds in the engine", f"{busy_s:.1f}", seconds=busy_s)


async def serve(vlm: Vlm, *, timeout_s: float) -> tuple[list[str], float]:
    """Serves until the clients' process has ended; returns its lines and the engine's seconds."""
    server = TeacherServer(vlm, model="benchmark", batch_tokens=BATCH_TOKENS)
    address = await server.start("127.0.0.1:0")
    try:
        config = vlm.config
        marks = (config.vision_start_token_id, config.image_token_id, config.vision_end_token_id, count_words(vlm))
        arguments = (address, PROMPT, RESPONSE, ROLLOUTS, GROUPS, CLIENTS, *marks)
        clients = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.gpu.clients", *map(str, arguments), stdout=subprocess.PIPE
        )
        try:
            output, _ = await asyncio.wait_for(clients.communicate(), timeout_s)
        except TimeoutError:
            clients.kill()
            await clients.wait()
            raise
        return output.decode().splitlines(), server.scheduler.busy_seconds
    finally:
        await server.stop(5.0)
