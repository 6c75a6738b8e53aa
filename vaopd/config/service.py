"""The service file: settings of the processes, independent of the job, in a section for each process.

A run's configuration (`vaopd.config.run`) says what one job wants; this file belongs to the operator of the
service, and is optional: `vaopd teacher CONFIG --service SERVICE.toml`, and so `rollout`, `api` and `up`. Each process
reads its own section. Importing this module loads nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, PositiveFloat, PositiveInt, ValidationInfo, model_validator

from vaopd.config.toml import Section, default_tag, read_toml, validate


def _from_its_folder(path: Path, info: ValidationInfo) -> Path:
    return Path((info.context or {}).get("folder", "")) / path


ServicePath = Annotated[Path, AfterValidator(_from_its_folder)]
"""A file that is looked for beside the service file, unless its path is absolute."""


class SharingConfig(Section):
    """How the device is shared among jobs."""

    weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Shares of the device by job name, relative to each other; a job that isn't named has weight 1."""
    max_waiting_groups: int = Field(4096, ge=1)
    """Groups of all jobs that are accepted and not yet answered; above it, calls are refused with a retry hint."""
    max_waiting_groups_per_job: int = Field(1024, ge=1)
    """The same for each job."""


class ImagesConfig(Section):
    """Room for images in memory."""

    encoded_bytes: int = Field(2**30, ge=1)
    """Room for images as uploaded, a fair share for each job; clients upload dropped ones again.

    Give it room for a step's images of every job, or they are sent several times.
    """
    prepared_bytes: int = Field(2**30, ge=1)
    """Room for decoded images of both views; a 512 × 512 image takes about 3 MB in each, 6 in float32.

    Give it room for two steps' images. Views that find none are made twice.
    """
    vision_bytes: int = Field(2**31, ge=0)
    """Room in the host's memory for the vision tower's output for each view of an image; 0 keeps nothing.

    In bfloat16 an image token takes 2 × hidden size × (1 + deepstack layers) bytes: 32 KiB in an 8B teacher, 8 MiB for
    a 512 × 512 image. Every epoch after the first finds the share of the data set that fits.
    """


class TlsConfig(Section):
    """Files in PEM; `vaopd certs FOLDER` makes a set for development."""

    cert: ServicePath | None = None
    """The server's certificate, followed by those between it and the root."""
    key: ServicePath | None = None
    """The certificate's private key."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key go together; give both, or neither")
        return self


class TeacherTlsConfig(TlsConfig):
    """Files in PEM; `vaopd certs FOLDER` makes a set. Renewed ones are taken up without a restart."""

    client_ca: ServicePath | None = None
    """Clients must show a certificate that this authority signed (mTLS)."""
    plaintext: bool = False
    """Serves without TLS on other addresses than the loopback too: only for a network without other hosts."""

    @model_validator(mode="after")
    def _fits_the_teacher(self) -> Self:
        if self.client_ca is not None and self.cert is None:
            raise ValueError("client_ca is of no use without TLS; give cert and key too")
        if self.plaintext and self.cert is not None:
            raise ValueError("plaintext = true contradicts cert; leave one of them out")
        return self


class KeysConfig(Section):
    """The API keys that are accepted."""

    file: ServicePath | None = None
    """The API keys, one per job (`vaopd keys add JOB`); without it, every client is served."""


class QuotasConfig(Section):
    """Limits of each job in a minute."""

    groups_per_minute: PositiveInt | None = None
    """Prompt groups of one job that are accepted in a minute; that many at once, refilled evenly. None: no quota."""
    jobs: dict[str, PositiveInt] = Field(default_factory=dict)
    """The same for single jobs, by name."""
    image_bytes_per_minute: PositiveInt | None = None
    """Bytes of images that one job may upload in a minute, and at once. None: no quota."""


class ApiQuotasConfig(Section):
    """Limits of requests per minute."""

    requests_per_minute: PositiveInt | None = None
    """Requests of one key's job, without keys of one address; a batch counts its requests. None: no quota."""


class TransformersBackend(Section):
    """Sends all payloads."""

    backend: Literal["transformers"] = "transformers"
    """The library that holds the weights; vllm is for teachers that only vLLM can hold."""
    processes: int | None = Field(None, ge=1)
    """Overrides the run's teacher.processes."""


class VllmBackend(Section):
    """Sends log-probs and top-k, no hidden states."""

    backend: Literal["vllm"] = "vllm"
    """The library that holds the weights."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of vLLM's own (`vllm.LLM`), e.g. tensor_parallel_size, max_model_len, quantization."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_ranks(cls, values: Any) -> Any:
        if isinstance(values, dict) and "processes" in values:
            raise ValueError("vllm starts its ranks by itself; use options.tensor_parallel_size instead of processes")
        return values


EngineConfig = Annotated[
    TransformersBackend | VllmBackend, Discriminator("backend"), default_tag("backend", "transformers")
]


class TeacherServiceConfig(Section):
    """The teacher server."""

    engine: EngineConfig = TransformersBackend()
    sharing: SharingConfig = SharingConfig()
    images: ImagesConfig = ImagesConfig()
    tls: TeacherTlsConfig = TeacherTlsConfig()
    keys: KeysConfig = KeysConfig()
    quotas: QuotasConfig = QuotasConfig()
    stuck_after_s: PositiveFloat = 300.0
    """Seconds after which a forward counts as a hanging device: the process ends, to be restarted."""
    drain_s: PositiveFloat = 60.0
    """Seconds that accepted calls may take after SIGTERM."""

    @model_validator(mode="after")
    def _check_quotas(self) -> Self:
        if self.keys.file is None and self.quotas != QuotasConfig():
            raise ValueError("quotas need keys.file; without keys a client may give any job's name")
        return self

    def count_ranks(self, processes: int | None) -> int:
        """Returns how many ranks share the teacher of a run with these `teacher.processes`."""
        return 1 if self.engine.backend == "vllm" else self.engine.processes or processes or 1


class RolloutServiceConfig(Section):
    """A rollout worker."""

    stuck_after_s: PositiveFloat = 1800.0
    """Seconds after which a step of the engine counts as hanging: the process ends, and another worker takes over.

    With vLLM a step is a token of each rollout, with transformers a whole group. New weights, fetched and loaded, may
    take as long.
    """
    drain_s: PositiveFloat = 10.0
    """Seconds that the groups in progress may take after SIGTERM; unfinished requests are handed back."""
    weights_folder: Path | None = None
    """Where weights that are fetched from a trainer lie, e.g. /dev/shm; empty: the system's temporary folder."""


class ConnectionsConfig(Section):
    """Limits of open connections."""

    total: int = Field(512, ge=1)
    """Open connections; a further one is answered with 503."""
    per_address: int = Field(64, ge=1)
    """The same from one address that isn't a proxy."""
    proxies: list[str] = Field(default_factory=list)
    """Addresses of reverse proxies: X-Forwarded-For and -Proto are read from these alone."""


class ApiServiceConfig(Section):
    """The scoring API."""

    hosts: list[str] = Field(default_factory=list)
    """Names in a request's Host, beside those of the loopback; "*" allows every one. Others are refused with 421."""
    trusted_network: bool = False
    """Listens on other addresses than the loopback without keys or TLS too: only for a network without other hosts."""
    connections: ConnectionsConfig = ConnectionsConfig()
    tls: TlsConfig = TlsConfig()
    keys: KeysConfig = KeysConfig()
    quotas: ApiQuotasConfig = ApiQuotasConfig()
    stuck_after_s: PositiveFloat = 60.0
    """Seconds without a turn of the event loop after which the process ends, to be restarted."""
    drain_s: PositiveFloat = 10.0
    """Seconds that accepted requests may take after SIGTERM."""


class ServiceConfig(Section):
    """The whole file. The trainer has no settings of this kind."""

    teacher: TeacherServiceConfig = TeacherServiceConfig()
    rollout: RolloutServiceConfig = RolloutServiceConfig()
    api: ApiServiceConfig = ApiServiceConfig()


def load_service_config(path: str | Path | None) -> ServiceConfig:
    """Reads a TOML file; the defaults when there is none. Raises ConfigError with key and remedy."""
    if path is None:
        return ServiceConfig()
    return validate(ServiceConfig, read_toml(path), origin=str(path), folder=Path(path).parent)
