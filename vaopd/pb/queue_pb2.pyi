from vaopd.pb import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SamplingSettings(_message.Message):
    __slots__ = ("temperature", "top_p", "max_new_tokens", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., max_new_tokens: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class RolloutRequest(_message.Message):
    __slots__ = ("group_id", "messages", "images", "num_rollouts", "sampling", "policy_version")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    messages: _containers.RepeatedCompositeFieldContainer[_common_pb2.ChatMessage]
    images: _containers.RepeatedCompositeFieldContainer[_common_pb2.EncodedImage]
    num_rollouts: int
    sampling: SamplingSettings
    policy_version: int
    def __init__(self, group_id: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[_common_pb2.ChatMessage, _Mapping]]] = ..., images: _Optional[_Iterable[_Union[_common_pb2.EncodedImage, _Mapping]]] = ..., num_rollouts: _Optional[int] = ..., sampling: _Optional[_Union[SamplingSettings, _Mapping]] = ..., policy_version: _Optional[int] = ...) -> None: ...

class Rollout(_message.Message):
    __slots__ = ("rollout_id", "response_ids", "rollout_logprobs", "finish_reason")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_IDS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    response_ids: _common_pb2.Tensor
    rollout_logprobs: _common_pb2.Tensor
    finish_reason: str
    def __init__(self, rollout_id: _Optional[str] = ..., response_ids: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., rollout_logprobs: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., finish_reason: _Optional[str] = ...) -> None: ...

class RolloutGroup(_message.Message):
    __slots__ = ("group_id", "policy_version", "policy_sha256", "prompt_token_ids", "rollouts", "worker", "generation_s")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    POLICY_SHA256_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    GENERATION_S_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    policy_version: int
    policy_sha256: str
    prompt_token_ids: _common_pb2.Tensor
    rollouts: _containers.RepeatedCompositeFieldContainer[Rollout]
    worker: str
    generation_s: float
    def __init__(self, group_id: _Optional[str] = ..., policy_version: _Optional[int] = ..., policy_sha256: _Optional[str] = ..., prompt_token_ids: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., rollouts: _Optional[_Iterable[_Union[Rollout, _Mapping]]] = ..., worker: _Optional[str] = ..., generation_s: _Optional[float] = ...) -> None: ...

class PolicyVersion(_message.Message):
    __slots__ = ("version", "path", "sha256")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    version: int
    path: str
    sha256: str
    def __init__(self, version: _Optional[int] = ..., path: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...

class DeadLetter(_message.Message):
    __slots__ = ("stream", "reason", "deliveries", "body")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DELIVERIES_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    stream: str
    reason: str
    deliveries: int
    body: bytes
    def __init__(self, stream: _Optional[str] = ..., reason: _Optional[str] = ..., deliveries: _Optional[int] = ..., body: _Optional[bytes] = ...) -> None: ...
