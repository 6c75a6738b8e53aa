"""Counts the entries of a job's queue, for monitoring: read only, and without patience."""

from __future__ import annotations

from dataclasses import dataclass

from vaopd.queue import scripts
from vaopd.queue.connection import Connection


@dataclass(frozen=True, kw_only=True, slots=True)
class Depth:
    """Counts requests that are not answered, groups that are in no durable checkpoint, and dead letters."""

    requests: int
    groups: int
    dead_letters: int
    workers: int
    """Rollout workers seen in the last half minute."""


class DepthGauge:
    """Reads the depth over a connection of its own, so that it never waits behind the trainer's."""

    def __init__(self, *, url: str, job: str) -> None:
        """url, job: as for `TrainerQueue`."""
        self._connection = Connection(url=url, job=job, patience_s=0.0)

    def read(self) -> Depth:
        """Returns the present counts. Raises Unavailable when Redis doesn't answer at once."""
        connection = self._connection
        length = {
            name: connection.call(lambda name=name: connection.redis.xlen(connection.key[name]))  # type: ignore[misc]
            for name in ("requests", "groups", "dead")
        }
        return Depth(
            requests=length["requests"],
            groups=length["groups"],
            dead_letters=length["dead"],
            workers=len(scripts.workers_alive(connection.run)),
        )

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()
