"""Real teacher servers for tests, in this process or as a process of its own, and requests for them."""

from __future__ import annotations

import asyncio
import functools
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from tests.support import preloaded
from tests.support.models import model_folder
from tests.support.preloaded import Child
from tests.support.waiting import wait_until
from vaopd.types import EncodedImage, ImagePart, Message, ScoreRequest, TeacherDescription, TextPart
from vaopd.vlm.model import Vlm
from vaopd_teacher.engines.backend import Backend
from vaopd_teacher.server import TeacherServer


@dataclass(frozen=True)
class TeacherInProcess:
    target: str
    description: TeacherDescription
    failed: Callable[[], bool]
    server: TeacherServer
    """For reading its counters; it lives on a thread of its own."""
    begin_stop: Callable[[], Future[None]]
    """Lets it drain, for up to 30 s, as SIGTERM does; the result is there when it is down."""


@contextmanager
def teacher_in_process(
    teacher: Vlm | Backend,
    *,
    model: str = "tiny-teacher",
    batch_tokens: int = 4096,
    address: str = "127.0.0.1:0",
    **options: Any,
) -> Iterator[TeacherInProcess]:
    """A server on a free port of the loopback, on an event loop of its own; `options` are TeacherServer's."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[TeacherServer, str]:
        server = TeacherServer(teacher, model=model, batch_tokens=batch_tokens, **options)
        return server, await server.start(address)

    try:
        server, target = asyncio.run_coroutine_threadsafe(start(), loop).result()

        @functools.cache
        def stop(grace_s: float = 30.0) -> Future[None]:
            return asyncio.run_coroutine_threadsafe(server.stop(grace_s), loop)

        try:
            yield TeacherInProcess(target, server.description, server.failed.is_set, server, stop)
        finally:
            (stop() if stop.cache_info().currsize else stop(5.0)).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@dataclass(frozen=True)
class TeacherProcess:
    target: str
    process: Child

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


def write_config(folder: Path, *, model: Path | None = None, **teacher: Any) -> Path:
    """A run's TOML whose teacher is `model` (default: the tiny one) with the given fields; None leaves one out."""
    fields = {"model": str(model or model_folder("teacher")), "dtype": "float32", "device_map": "cpu", **teacher}
    given = {key: value for key, value in fields.items() if value is not None}
    lines = [f"{key} = {value if isinstance(value, int) else repr(value)}" for key, value in given.items()]
    path = folder / "run.toml"
    others = '[run]\nname = "test"\n[data]\nsource = "unused"\n[student]\nmodel = "unused"\n[trainer]\nsteps = 1\n'
    path.write_text(others + "[teacher]\n" + "\n".join(lines))
    return path


@contextmanager
def teacher_process(
    folder: Path, *, address: str = "127.0.0.1:0", launch: Sequence[str] = ("-m", "vaopd_teacher"), **teacher: Any
) -> Iterator[TeacherProcess]:
    """`python -m vaopd_teacher` with files in `folder`; killed at the end when it still runs."""
    announce = folder / "address"
    announce.unlink(missing_ok=True)
    config = write_config(folder, address=address, **teacher)
    command = [sys.executable, *launch, "--config", str(config), "--announce", str(announce)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = folder / "teacher.log"
    process = preloaded.start(command, log=log, environment=environment)
    try:
        wait_until("the teacher serves", lambda: announce.exists() or process.poll() is not None, timeout_s=600.0)
        assert process.poll() is None, log.read_text()
        yield TeacherProcess(announce.read_text(), process)
    finally:
        process.kill()
        process.wait()


def drawing(seed: int, size: tuple[int, int] = (96, 96)) -> PIL.Image.Image:
    """A picture with coarse and fine detail, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size)
    fine = rng.integers(-40, 40, (size[1], size[0], 3))
    return PIL.Image.fromarray(np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8))


def encoded(image: PIL.Image.Image, format: str = "PNG") -> EncodedImage:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return EncodedImage(data=buffer.getvalue())


def question(text: str, images: Sequence[EncodedImage]) -> tuple[Message, ...]:
    parts = tuple(ImagePart(sha256=image.sha256) for image in images)
    return (Message(role="user", content=(*parts, TextPart(text=text))),)


def token_request(
    vlm: Vlm,
    group_id: str,
    *,
    pictures: Sequence[PIL.Image.Image] = (),
    text: str = "What is the perimeter?",
    responses: Sequence[str] = ("The sides are 3, 4 and 5.", "It is 12."),
) -> ScoreRequest:
    """A group as the trainer sends it: token ids throughout, each response with its EOS."""
    images = [encoded(picture) for picture in pictures]
    prepared = {
        image.sha256: vlm.prepare_image(picture.convert("RGB")) for image, picture in zip(images, pictures, strict=True)
    }
    prompt = vlm.render(question(text, images), prepared)
    ids = [vlm.tokenizer(response, add_special_tokens=False)["input_ids"] for response in responses]
    return ScoreRequest(
        group_id=group_id,
        responses=tuple(np.array([*tokens, vlm.tokenizer.eos_token_id], dtype=np.int32) for tokens in ids),
        images=tuple(images),
        prompt_token_ids=prompt.token_ids.astype(np.int32),
    )
