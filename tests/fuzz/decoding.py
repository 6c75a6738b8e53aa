"""A fuzzer led by coverage (atheris, libFuzzer) over what decodes bytes from outside: `make fuzz` runs it for a minute.

    python tests/fuzz/decoding.py image|message|key [libFuzzer's options]

It ends with a finding when a decoder raises anything that isn't of the error tree or names an address, or when memory
grows past -rss_limit_mb.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import PIL.Image
from google.protobuf.message import DecodeError

from vaopd.pb import teacher_pb2

with atheris.instrument_imports(include=["vaopd"]):
    from vaopd import images
    from vaopd.access import keys
    from vaopd.errors import InvalidInput, LimitExceeded, Unauthenticated, VaopdError
    from vaopd.types import EncodedImage, ImagePart, Message, PolicyVersion, RolloutRequest, SamplingSettings, TextPart
    from vaopd.wire import errors as wire_errors
    from vaopd.wire.common import messages_from_pb
    from vaopd.wire.queue import (
        policy_version_from_bytes,
        policy_version_to_bytes,
        rollout_group_from_bytes,
        rollout_request_from_bytes,
        rollout_request_to_bytes,
    )


def image(data: bytes) -> None:
    try:
        decoded = images.decode(EncodedImage(data=data), max_bytes=2**20, max_pixels=100_000)
    except (InvalidInput, LimitExceeded) as error:
        check_words(error)
        return
    assert decoded.mode == "RGB"
    assert decoded.width * decoded.height <= 100_000


def message(data: bytes) -> None:
    """What the queue and the teacher read, and the details that a client reads from a server."""
    for read in (rollout_request_from_bytes, rollout_group_from_bytes, policy_version_from_bytes):
        try:
            read(data)
        except InvalidInput as error:
            check_words(error)
    wire_errors.unpack([(wire_errors.KEY, data)], message="refused", default=InvalidInput)
    with contextlib.suppress(DecodeError):
        for group in teacher_pb2.ScoreGroupsRequest.FromString(data).groups:
            with contextlib.suppress(InvalidInput):
                messages_from_pb(group.messages.messages)


def key(data: bytes) -> None:
    try:
        STORE.find_job(keys.read_bearer(data.decode("latin-1")))
    except Unauthenticated:
        return
    raise AssertionError("a key that nobody made was accepted")


def check_words(error: VaopdError) -> None:
    assert "0x" not in str(error), error


def seeds(target: Callable[[bytes], None]) -> list[bytes]:
    """Sound inputs, from which libFuzzer begins."""
    if target is image:
        return [_picture(kind, mode) for kind in ("PNG", "JPEG", "WEBP") for mode in ("RGB", "L")]
    if target is message:
        data = _picture("PNG", "L")
        image_ = EncodedImage(data=data)
        request = RolloutRequest(
            group_id="g",
            messages=(Message(role="user", content=(ImagePart(sha256=image_.sha256), TextPart(text="?"))),),
            images=(image_,),
            num_rollouts=2,
            sampling=SamplingSettings(),
            policy_version=1,
        )
        policy = PolicyVersion(version=1, path="/runs/x", sha256="a" * 64)
        return [rollout_request_to_bytes(request), policy_version_to_bytes(policy)]
    return [b"Bearer vaopd_0123456789ab_" + b"A" * 43]


def _picture(kind: str, mode: str) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.linear_gradient("L").resize((24, 16)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


TARGETS = {target.__name__: target for target in (image, message, key)}
FOLDER = tempfile.TemporaryDirectory(prefix="vaopd-fuzz-")
STORE_FILE = Path(FOLDER.name) / "keys.json"
keys.add_key(STORE_FILE, "fuzzed")
STORE = keys.KeyStore(STORE_FILE)


def main() -> None:
    target = TARGETS[sys.argv[1]]
    corpus = Path(FOLDER.name) / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds(target)):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([sys.argv[0], str(corpus), *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
