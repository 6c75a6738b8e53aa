from vaopd.pb import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PayloadKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PAYLOAD_KIND_UNSPECIFIED: _ClassVar[PayloadKind]
    PAYLOAD_KIND_NONE: _ClassVar[PayloadKind]
    PAYLOAD_KIND_HIDDEN: _ClassVar[PayloadKind]
    PAYLOAD_KIND_TOP_K: _ClassVar[PayloadKind]
    PAYLOAD_KIND_SAMPLED: _ClassVar[PayloadKind]
    PAYLOAD_KIND_HIDDEN_INT8: _ClassVar[PayloadKind]
    PAYLOAD_KIND_HIDDEN_PAIR: _ClassVar[PayloadKind]

class DegradationKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DEGRADATION_KIND_UNSPECIFIED: _ClassVar[DegradationKind]
    DEGRADATION_KIND_PIXELATE: _ClassVar[DegradationKind]
    DEGRADATION_KIND_BLUR: _ClassVar[DegradationKind]
    DEGRADATION_KIND_MEAN_COLOUR: _ClassVar[DegradationKind]
    DEGRADATION_KIND_BLACK: _ClassVar[DegradationKind]
    DEGRADATION_KIND_NOISE: _ClassVar[DegradationKind]
PAYLOAD_KIND_UNSPECIFIED: PayloadKind
PAYLOAD_KIND_NONE: PayloadKind
PAYLOAD_KIND_HIDDEN: PayloadKind
PAYLOAD_KIND_TOP_K: PayloadKind
PAYLOAD_KIND_SAMPLED: PayloadKind
PAYLOAD_KIND_HIDDEN_INT8: PayloadKind
PAYLOAD_KIND_HIDDEN_PAIR: PayloadKind
DEGRADATION_KIND_UNSPECIFIED: DegradationKind
DEGRADATION_KIND_PIXELATE: DegradationKind
DEGRADATION_KIND_BLUR: DegradationKind
DEGRADATION_KIND_MEAN_COLOUR: DegradationKind
DEGRADATION_KIND_BLACK: DegradationKind
DEGRADATION_KIND_NOISE: DegradationKind

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Degradation(_message.Message):
    __slots__ = ("kind", "strength")
    KIND_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    kind: DegradationKind
    strength: float
    def __init__(self, kind: _Optional[_Union[DegradationKind, str]] = ..., strength: _Optional[float] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_groups_per_request", "max_rollouts_per_group", "max_tokens_per_rollout", "max_image_bytes", "max_image_pixels", "max_message_bytes", "max_tokens_per_request")
    MAX_GROUPS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_ROLLOUTS_PER_GROUP_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    max_groups_per_request: int
    max_rollouts_per_group: int
    max_tokens_per_rollout: int
    max_image_bytes: int
    max_image_pixels: int
    max_message_bytes: int
    max_tokens_per_request: int
    def __init__(self, max_groups_per_request: _Optional[int] = ..., max_rollouts_per_group: _Optional[int] = ..., max_tokens_per_rollout: _Optional[int] = ..., max_image_bytes: _Optional[int] = ..., max_image_pixels: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_tokens_per_request: _Optional[int] = ...) -> None: ...

class PixelBounds(_message.Message):
    __slots__ = ("min_pixels", "max_pixels")
    MIN_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    min_pixels: int
    max_pixels: int
    def __init__(self, min_pixels: _Optional[int] = ..., max_pixels: _Optional[int] = ...) -> None: ...

class TeacherDescription(_message.Message):
    __slots__ = ("model", "revision", "tokenizer_fingerprint", "vocab_size", "hidden_size", "dtype", "limits", "payloads", "degradations", "columns", "pixel_bounds")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    PAYLOADS_FIELD_NUMBER: _ClassVar[int]
    DEGRADATIONS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    PIXEL_BOUNDS_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    tokenizer_fingerprint: str
    vocab_size: int
    hidden_size: int
    dtype: str
    limits: Limits
    payloads: _containers.RepeatedScalarFieldContainer[PayloadKind]
    degradations: _containers.RepeatedScalarFieldContainer[DegradationKind]
    columns: _containers.RepeatedScalarFieldContainer[str]
    pixel_bounds: PixelBounds
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., tokenizer_fingerprint: _Optional[str] = ..., vocab_size: _Optional[int] = ..., hidden_size: _Optional[int] = ..., dtype: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., payloads: _Optional[_Iterable[_Union[PayloadKind, str]]] = ..., degradations: _Optional[_Iterable[_Union[DegradationKind, str]]] = ..., columns: _Optional[_Iterable[str]] = ..., pixel_bounds: _Optional[_Union[PixelBounds, _Mapping]] = ...) -> None: ...

class PutImagesResponse(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sha256: _Optional[_Iterable[str]] = ...) -> None: ...

class MissingImagesRequest(_message.Message):
    __slots__ = ("sha256", "job")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    sha256: _containers.RepeatedScalarFieldContainer[str]
    job: str
    def __init__(self, sha256: _Optional[_Iterable[str]] = ..., job: _Optional[str] = ...) -> None: ...

class MissingImagesResponse(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sha256: _Optional[_Iterable[str]] = ...) -> None: ...

class TokenPrompt(_message.Message):
    __slots__ = ("token_ids", "image_sha256")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SHA256_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    image_sha256: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., image_sha256: _Optional[_Iterable[str]] = ...) -> None: ...

class MessagePrompt(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[_common_pb2.ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[_common_pb2.ChatMessage, _Mapping]]] = ...) -> None: ...

class RolloutTokens(_message.Message):
    __slots__ = ("rollout_id", "response_ids", "response_text")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_IDS_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_TEXT_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    response_ids: _containers.RepeatedScalarFieldContainer[int]
    response_text: str
    def __init__(self, rollout_id: _Optional[str] = ..., response_ids: _Optional[_Iterable[int]] = ..., response_text: _Optional[str] = ...) -> None: ...

class PromptGroup(_message.Message):
    __slots__ = ("group_id", "tokens", "messages", "rollouts")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    tokens: TokenPrompt
    messages: MessagePrompt
    rollouts: _containers.RepeatedCompositeFieldContainer[RolloutTokens]
    def __init__(self, group_id: _Optional[str] = ..., tokens: _Optional[_Union[TokenPrompt, _Mapping]] = ..., messages: _Optional[_Union[MessagePrompt, _Mapping]] = ..., rollouts: _Optional[_Iterable[_Union[RolloutTokens, _Mapping]]] = ...) -> None: ...

class ScoreGroupsRequest(_message.Message):
    __slots__ = ("job", "groups", "payload", "top_k", "degradation", "tokenizer_fingerprint", "revision", "with_token_texts", "columns")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    DEGRADATION_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    WITH_TOKEN_TEXTS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    job: str
    groups: _containers.RepeatedCompositeFieldContainer[PromptGroup]
    payload: PayloadKind
    top_k: int
    degradation: Degradation
    tokenizer_fingerprint: str
    revision: str
    with_token_texts: bool
    columns: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[PromptGroup, _Mapping]]] = ..., payload: _Optional[_Union[PayloadKind, str]] = ..., top_k: _Optional[int] = ..., degradation: _Optional[_Union[Degradation, _Mapping]] = ..., tokenizer_fingerprint: _Optional[str] = ..., revision: _Optional[str] = ..., with_token_texts: _Optional[bool] = ..., columns: _Optional[_Iterable[str]] = ...) -> None: ...

class ScoreGroupsResponse(_message.Message):
    __slots__ = ("score", "payload", "error")
    SCORE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    score: GroupScore
    payload: TensorChunk
    error: GroupError
    def __init__(self, score: _Optional[_Union[GroupScore, _Mapping]] = ..., payload: _Optional[_Union[TensorChunk, _Mapping]] = ..., error: _Optional[_Union[GroupError, _Mapping]] = ...) -> None: ...

class GroupScore(_message.Message):
    __slots__ = ("group_id", "lengths", "teacher_logprobs", "degraded_logprobs", "visual_advantage", "prompt_tokens", "payload", "response_ids", "token_texts", "payload_texts", "columns")
    class PayloadTextsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    class ColumnsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _common_pb2.Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ...) -> None: ...
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    TEACHER_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    VISUAL_ADVANTAGE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_TEXTS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_TEXTS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    lengths: _containers.RepeatedScalarFieldContainer[int]
    teacher_logprobs: _common_pb2.Tensor
    degraded_logprobs: _common_pb2.Tensor
    visual_advantage: _common_pb2.Tensor
    prompt_tokens: int
    payload: _containers.RepeatedCompositeFieldContainer[PayloadTensor]
    response_ids: _containers.RepeatedScalarFieldContainer[int]
    token_texts: _containers.RepeatedScalarFieldContainer[str]
    payload_texts: _containers.ScalarMap[int, str]
    columns: _containers.MessageMap[str, _common_pb2.Tensor]
    def __init__(self, group_id: _Optional[str] = ..., lengths: _Optional[_Iterable[int]] = ..., teacher_logprobs: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., degraded_logprobs: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., visual_advantage: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., prompt_tokens: _Optional[int] = ..., payload: _Optional[_Iterable[_Union[PayloadTensor, _Mapping]]] = ..., response_ids: _Optional[_Iterable[int]] = ..., token_texts: _Optional[_Iterable[str]] = ..., payload_texts: _Optional[_Mapping[int, str]] = ..., columns: _Optional[_Mapping[str, _common_pb2.Tensor]] = ...) -> None: ...

class PayloadTensor(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class TensorChunk(_message.Message):
    __slots__ = ("group_id", "name", "offset_bytes", "data", "tensor")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    name: str
    offset_bytes: int
    data: bytes
    tensor: PayloadTensor
    def __init__(self, group_id: _Optional[str] = ..., name: _Optional[str] = ..., offset_bytes: _Optional[int] = ..., data: _Optional[bytes] = ..., tensor: _Optional[_Union[PayloadTensor, _Mapping]] = ...) -> None: ...

class GroupError(_message.Message):
    __slots__ = ("group_id", "code", "message", "status_details")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STATUS_DETAILS_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    code: int
    message: str
    status_details: bytes
    def __init__(self, group_id: _Optional[str] = ..., code: _Optional[int] = ..., message: _Optional[str] = ..., status_details: _Optional[bytes] = ...) -> None: ...

class GetHeadRequest(_message.Message):
    __slots__ = ("revision",)
    REVISION_FIELD_NUMBER: _ClassVar[int]
    revision: str
    def __init__(self, revision: _Optional[str] = ...) -> None: ...
