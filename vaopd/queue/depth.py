"""How full a job's queue is, for whoever watches it; read only, and quick to give up."""

from __future__ import annotations

from dataclasses import dataclass

from vaopd.queue.connection import Connection

WORKER_SEEN_MS = 30_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Depth:
    """Entries: requests that are not answered, groups that are in no durable checkpoint, dead letters."""

    requests: int
    groups: int
    dead_letters: int
    workers: int
    """Rollout workers seen in the last half minute."""


class DepthGauge:
    """A connection of its own: it never waits behind the trainer's."""

    def __init__(self, *, url: str, job: str) -> None:
        self._connection = Connection(url=url, job=job, patience_s=0.0)

    def read(self) -> Depth:
        """Raises Unavailable when Redis doesn't answer."""
        connection = self._connection
        length = {
            name: connection.call(lambda name=name: connection.redis.xlen(connection.key[name]))  # type: ignore[misc]
            for name in ("requests", "groups", "dead")
        }
        return Depth(
            requests=length["requests"],
            groups=length["groups"],
            dead_letters=length["dead"],
            workers=len(connection.run("workers_alive", WORKER_SEEN_MS)),
        )

    def close(self) -> None:
        self._connection.close()
