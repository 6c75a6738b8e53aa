"""Reads, publishes again and drops entries that were given up: corrupt, or delivered too often."""

from __future__ import annotations

import re

from google.protobuf.message import DecodeError

from vaopd.errors import InvalidInput, NotFound
from vaopd.pb import queue_pb2
from vaopd.queue import scripts
from vaopd.queue.connection import Connection
from vaopd.queue.protocol import DeadLetter

ENTRY_ID = re.compile(r"\d{1,20}-\d{1,20}")


def encode_letter(*, stream: str, reason: str, deliveries: int, body: bytes) -> bytes:
    """Returns a DeadLetter message."""
    return queue_pb2.DeadLetter(stream=stream, reason=reason, deliveries=deliveries, body=body).SerializeToString()


def read_letters(connection: Connection, *, after: str, limit: int) -> list[DeadLetter]:
    """Returns the oldest letters of a job beyond the letter `after`."""
    start = f"({after}" if after else "-"
    return _read_letters(connection, start, "+", limit)


def _read_letters(connection: Connection, start: str, end: str, limit: int) -> list[DeadLetter]:
    found = connection.call(lambda: connection.redis.xrange(connection.key["dead"], start, end, count=limit))
    letters = []
    for entry_id, fields in found:
        try:
            letter = queue_pb2.DeadLetter.FromString(fields.get(b"letter", b""))
        except DecodeError:
            letter = queue_pb2.DeadLetter()
        if letter.stream not in ("requests", "groups"):
            letter = queue_pb2.DeadLetter(reason=f"not a dead letter: {scripts.FOREIGN}")
        letters.append(
            DeadLetter(
                entry_id=entry_id.decode(),
                key=fields.get(b"key", b"").decode(errors="replace"),
                stream=letter.stream,
                reason=letter.reason,
                deliveries=letter.deliveries,
                body=letter.body,
            )
        )
    return letters


class DeadLetters:
    """Lists a job's dead letters for an operator, to publish again or drop. They stay until then."""

    def __init__(self, *, url: str, job: str, patience_s: float = 30.0) -> None:
        """patience_s: how long to wait for a Redis that does not answer."""
        self._connection = Connection(url=url, job=job, patience_s=patience_s)

    def list(self, *, after: str = "", limit: int = 100) -> list[DeadLetter]:
        """Returns up to `limit` letters, the oldest first; `after` is the entry_id of the last one already seen."""
        return read_letters(self._connection, after=after, limit=limit)

    def retry(self, entry_id: str) -> None:
        """Publishes a letter's body again, as a new entry without deliveries. Raises NotFound when it is gone."""
        letter = self._find(entry_id)
        if not letter.stream:
            raise InvalidInput(f"{entry_id} is {letter.reason}; `vaopd queue drop {entry_id}` removes it")
        self._connection.join()
        # A letter that is gone by now was published by this call, with its reply lost, or by another process.
        scripts.retry_dead(self._connection.run, entry_id, letter.stream, letter.body)

    def drop(self, entry_id: str) -> None:
        """Removes a letter for good. Raises NotFound when it is gone."""
        self._find(entry_id)
        self._connection.call(lambda: self._connection.redis.xdel(self._connection.key["dead"], entry_id))

    def _find(self, entry_id: str) -> DeadLetter:
        found = _read_letters(self._connection, entry_id, entry_id, 1) if ENTRY_ID.fullmatch(entry_id) else []
        if not found:
            raise NotFound(
                f"job {self._connection.job!r} has no dead letter {entry_id!r}; `vaopd queue dead` shows those it has"
            )
        return found[0]

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()
