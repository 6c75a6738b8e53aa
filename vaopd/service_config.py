"""The configuration of a shared teacher service: who may use it, and how it is shared among the jobs.

A run's configuration (`vaopd.config`) says what one job wants; this file belongs to whoever runs the service, and is
optional: `vaopd teacher CONFIG --service SERVICE.toml`. Importing this module loads nothing heavy.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, PositiveFloat

from vaopd.config import Section, read_toml, validate


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
    prepared_bytes: int = Field(2**31, ge=1)
    """Room for decoded images of both views; a 512 × 512 image takes about 6 MB in each."""


class ServiceConfig(Section):
    sharing: SharingConfig = SharingConfig()
    images: ImagesConfig = ImagesConfig()
    stuck_after_s: PositiveFloat = 300.0
    """A forward that takes longer than this is taken for a hanging device: the process ends, to be restarted."""


def load_service_config(path: str | Path | None) -> ServiceConfig:
    """Reads a TOML file; the defaults when there is none. Raises ConfigError with key and remedy."""
    return ServiceConfig() if path is None else validate(ServiceConfig, read_toml(path), origin=str(path))
