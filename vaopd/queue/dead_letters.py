"""Entries that were given up: corrupt, or delivered too often. They stay until somebody decides."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vaopd.errors import NotFound
from vaopd.pb import queue_pb2
from vaopd.queue.connection import Connection

ENTRY_ID = re.compile(r"\d{1,20}-\d{1,20}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    """`key` is "GROUP_ID@POLICY_VERSION", known even when the body is corrupt; `stream` is "requests" or "groups".

    An entry that somebody else put there may have any key; its policy_version is None then.
    """

    entry_id: str
    key: str
    stream: str
    reason: str
    deliveries: int
    body: bytes

    @property
    def group_id(self) -> str:
        return self.key.rpartition("@")[0] if self.policy_version is not None else self.key

    @property
    def policy_version(self) -> int | None:
        version = self.key.rpartition("@")[2]
        return int(version) if version.isdecimal() else None


def letter_bytes(*, stream: str, reason: str, deliveries: int, body: bytes) -> bytes:
    return queue_pb2.DeadLetter(stream=stream, reason=reason, deliveries=deliveries, body=body).SerializeToString()


def read_letters(connection: Connection, *, after: str, limit: int) -> list[DeadLetter]:
    start = f"({after}" if after else "-"
    return _letters(connection, start, "+", limit)


def _letters(connection: Connection, start: str, end: str, limit: int) -> list[DeadLetter]:
    found = connection.call(lambda: connection.redis.xrange(connection.key["dead"], start, end, count=limit))
    letters = []
    for entry_id, fields in found:
        letter = queue_pb2.DeadLetter.FromString(fields[b"letter"])
        letters.append(
            DeadLetter(
                entry_id=entry_id.decode(),
                key=fields[b"key"].decode(errors="replace"),
                stream=letter.stream,
                reason=letter.reason,
                deliveries=letter.deliveries,
                body=letter.body,
            )
        )
    return letters


class DeadLetters:
    """For people: look at a job's dead letters, send one on its way again, or drop it."""

    def __init__(self, *, url: str, job: str, patience_s: float = 30.0) -> None:
        self._connection = Connection(url=url, job=job, patience_s=patience_s)

    def list(self, *, after: str = "", limit: int = 100) -> list[DeadLetter]:
        """The oldest first; `after` is the entry_id of the last one already seen."""
        return read_letters(self._connection, after=after, limit=limit)

    def retry(self, entry_id: str) -> None:
        """Publishes it again, as a new entry that nobody has taken yet."""
        letter = self._find(entry_id)
        self._connection.join()
        # Not there any more: this very call did it, and its reply was lost, or somebody else did.
        self._connection.run("retry_dead", entry_id, letter.stream, letter.body)

    def drop(self, entry_id: str) -> None:
        self._find(entry_id)
        self._connection.call(lambda: self._connection.redis.xdel(self._connection.key["dead"], entry_id))

    def _find(self, entry_id: str) -> DeadLetter:
        found = _letters(self._connection, entry_id, entry_id, 1) if ENTRY_ID.fullmatch(entry_id) else []
        if not found:
            raise NotFound(
                f"job {self._connection.job!r} has no dead letter {entry_id!r}; `vaopd queue dead` shows those it has"
            )
        return found[0]

    def close(self) -> None:
        self._connection.close()
