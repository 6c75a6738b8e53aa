"""Tensors, messages and images to protobuf (common.proto) and back."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from vaopd import types as t
from vaopd.errors import InvalidInput
from vaopd.pb import common_pb2


def tensor_to_pb(tensor: t.Tensor | np.ndarray) -> common_pb2.Tensor:
    """Encodes an array of any shape."""
    if isinstance(tensor, np.ndarray):
        tensor = t.Tensor.from_numpy(tensor)
    return common_pb2.Tensor(dtype=tensor.dtype, shape=tensor.shape, data=bytes(tensor.data))


def tensor_from_pb(message: common_pb2.Tensor) -> t.Tensor:
    """Decodes an array. Raises InvalidInput when the bytes don't fit the dtype and shape."""
    return check_tensor(message.dtype, tuple(message.shape), message.data)


def check_tensor(dtype: str, shape: tuple[int, ...], data: bytes | memoryview) -> t.Tensor:
    """Makes a tensor of bytes. Raises InvalidInput when they don't fit the dtype and shape."""
    if dtype not in t.ITEMSIZE_BYTES:
        raise InvalidInput(f"tensor dtype {dtype!r} is unknown; use one of {', '.join(t.ITEMSIZE_BYTES)}")
    expected = math.prod(shape) * t.ITEMSIZE_BYTES[dtype]
    if len(data) != expected:
        raise InvalidInput(f"tensor of dtype {dtype} and shape {shape} needs {expected} bytes, got {len(data)}")
    return t.Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]


def array_from_pb(message: common_pb2.Tensor, dtype: str, name: str) -> np.ndarray:
    """Decodes a one-dimensional array; raises InvalidInput, naming `name`, for another shape or dtype."""
    tensor = tensor_from_pb(message)
    if tensor.dtype != dtype or len(tensor.shape) != 1:
        raise InvalidInput(f"{name} must be a 1-d {dtype} tensor, got {tensor.dtype} of shape {tensor.shape}")
    return tensor.numpy()


def messages_to_pb(messages: Iterable[t.Message]) -> list[common_pb2.ChatMessage]:
    """Encodes chat turns."""

    def part(item: t.TextPart | t.ImagePart) -> common_pb2.ContentPart:
        if isinstance(item, t.TextPart):
            return common_pb2.ContentPart(text=item.text)
        return common_pb2.ContentPart(image_sha256=item.sha256)

    return [common_pb2.ChatMessage(role=m.role, content=[part(p) for p in m.content]) for m in messages]


def messages_from_pb(messages: Iterable[common_pb2.ChatMessage]) -> tuple[t.Message, ...]:
    """Decodes chat turns. Raises InvalidInput for an empty part or an unknown role."""

    def part(item: common_pb2.ContentPart) -> t.TextPart | t.ImagePart:
        match item.WhichOneof("part"):
            case "text":
                return t.TextPart(text=item.text)
            case "image_sha256":
                return t.ImagePart(sha256=item.image_sha256)
            case _:
                raise InvalidInput("a content part is empty; give it text or image_sha256")

    def message(item: common_pb2.ChatMessage) -> t.Message:
        if item.role not in ("system", "user", "assistant"):
            raise InvalidInput(f"message role {item.role!r} is unknown; use system, user or assistant")
        return t.Message(role=item.role, content=tuple(part(p) for p in item.content))  # type: ignore[arg-type]

    return tuple(message(m) for m in messages)


def images_from_pb(images: Iterable[common_pb2.EncodedImage]) -> tuple[t.EncodedImage, ...]:
    """Decodes images. Raises InvalidInput for one that doesn't have the declared SHA-256."""
    decoded = []
    for message in images:
        image = t.EncodedImage(data=message.data)
        if message.sha256 and message.sha256 != image.sha256:
            raise InvalidInput(
                f"image declared as {message.sha256[:12]}… has content {image.sha256[:12]}…; upload it again"
            )
        decoded.append(image)
    return tuple(decoded)


def image_to_pb(image: t.EncodedImage, *, job: str = "") -> common_pb2.EncodedImage:
    """Encodes one image with its SHA-256; `job` is charged for an upload."""
    return common_pb2.EncodedImage(sha256=image.sha256, data=image.data, job=job)


def image_from_pb(message: common_pb2.EncodedImage) -> t.EncodedImage:
    """Decodes one image. Raises InvalidInput when it doesn't have the declared SHA-256."""
    return images_from_pb([message])[0]
