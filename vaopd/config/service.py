"""The configuration of a shared teacher service: who may use it, and how it is shared among the jobs.

A run's configuration (`vaopd.config`) says what one job wants; this file belongs to whoever runs the service, and is
optional: `vaopd teacher CONFIG --service SERVICE.toml`. Importing this module loads nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from vaopd.config.toml import Section, read_toml, validate


class SharingConfig(Section):
    weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Shares of the device by job name, relative to each other; a job that isn't named has weight 1."""
    max_waiting_groups: int = Field(4096, ge=1)
    """Groups of all jobs that are accepted and not yet answered; beyond, calls are refused with a retry hint."""
    max_waiting_groups_per_job: int = Field(1024, ge=1)
    """The same, of one job."""


class ImagesConfig(Section):
    encoded_bytes: int = Field(2**30, ge=1)
    """Room for images as they were uploaded; the least recently used go first, and clients upload them again."""
    prepared_bytes: int = Field(2**30, ge=1)
    """Room for decoded images of both views; a 512 × 512 image takes about 6 MB in each."""
    vision_bytes: int = Field(2**31, ge=0)
    """Room in the host's memory for what the vision tower made of an image's view; 0 keeps nothing.

    In bfloat16 an image token takes 2 × hidden size × (1 + deepstack layers) bytes: 32 KiB in an 8B teacher, 8 MiB for
    a 512 × 512 image. Room for a whole data set saves the tower from the second epoch on.
    """


class TlsConfig(Section):
    """Files in PEM; `vaopd certs FOLDER` makes a set for development. Renewed files are taken up without a restart."""

    cert: Path | None = None
    """The server's certificate, followed by those between it and the root."""
    key: Path | None = None
    """The certificate's private key."""
    client_ca: Path | None = None
    """Asks every client for a certificate that this authority signed (mTLS)."""
    plaintext: bool = False
    """Serves without TLS on other addresses than the loopback too: only for a network that nobody else is on."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key go together; give both, or neither")
        if self.client_ca is not None and self.cert is None:
            raise ValueError("client_ca is of no use without TLS; give cert and key too")
        if self.plaintext and self.cert is not None:
            raise ValueError("plaintext = true contradicts cert; leave one of them out")
        return self


class KeysConfig(Section):
    file: Path | None = None
    """The API keys, one per job (`vaopd keys add JOB`); without it, whoever reaches the port may use the teacher."""


class QuotasConfig(Section):
    groups_per_minute: PositiveInt | None = None
    """Prompt groups of one job that are accepted in a minute; that many at once, refilled evenly. None: no quota."""
    jobs: dict[str, PositiveInt] = Field(default_factory=dict)
    """The same for single jobs, by name."""


class EngineConfig(Section):
    backend: Literal["transformers", "vllm"] = "transformers"
    """Who holds the weights. vllm: for teachers that only vLLM can hold; it sends no hidden states."""
    processes: int = Field(1, ge=1)
    """Ranks that share every text layer among them (tensor parallelism), one device each; transformers only."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of vLLM's own (`vllm.LLM`), e.g. tensor_parallel_size, max_model_len, quantization; vllm only."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.backend == "vllm" and self.processes > 1:
            raise ValueError("vllm starts its ranks by itself; use options.tensor_parallel_size instead of processes")
        if self.backend != "vllm" and self.options:
            raise ValueError('options are vLLM\'s; leave them out, or set backend = "vllm"')
        return self


class ServiceConfig(Section):
    engine: EngineConfig = EngineConfig()
    sharing: SharingConfig = SharingConfig()
    images: ImagesConfig = ImagesConfig()
    tls: TlsConfig = TlsConfig()
    keys: KeysConfig = KeysConfig()
    quotas: QuotasConfig = QuotasConfig()
    stuck_after_s: PositiveFloat = 300.0
    """A forward that takes longer than this is taken for a hanging device: the process ends, to be restarted."""

    @model_validator(mode="after")
    def _quotas_need_keys(self) -> Self:
        if self.keys.file is None and (self.quotas.groups_per_minute or self.quotas.jobs):
            raise ValueError("quotas need keys.file; without keys a job's name is whatever the client says")
        return self


def load_service_config(path: str | Path | None) -> ServiceConfig:
    """Reads a TOML file; the defaults when there is none. Raises ConfigError with key and remedy.

    Files named in it are looked for beside it, unless their paths are absolute.
    """
    if path is None:
        return ServiceConfig()
    config = validate(ServiceConfig, read_toml(path), origin=str(path))
    folder = Path(path).parent
    tls = {name: folder / file for name in ("cert", "key", "client_ca") if (file := getattr(config.tls, name))}
    keys = {"file": folder / config.keys.file} if config.keys.file else {}
    return config.model_copy(
        update={"tls": config.tls.model_copy(update=tls), "keys": config.keys.model_copy(update=keys)}
    )
