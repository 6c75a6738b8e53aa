"""The errors of vaopd, one tree. A message names the value, the bound and the remedy.

    VaopdError
    ├── InvalidInput            the request itself is wrong; sending it again is pointless
    │   └── ImageRefused        the image can't be read, is of another format, or is over a cap
    ├── LimitExceeded           too large, or too many
    │   └── Busy                a quota is used up; says when to ask again
    │       └── QueueFull       the teacher's queue is full; says when to ask again
    ├── Unauthenticated         no key, or one that isn't valid here
    ├── PermissionDenied        a valid key, but not for this job; doesn't say whether the job exists
    ├── Mismatch                two sides disagree: tokenizer, model revision, policy version, image grid, weights
    │   └── TeacherFault        the teacher is to blame: it differs from its replicas, or breaks the protocol
    ├── NotFound                an image, run or snapshot that the other side doesn't have
    ├── LeaseLost               another process owns this queue entry or job now; nothing was committed
    ├── Unavailable             the other side is starting, draining, or can't be reached; try again
    │   └── TlsRefused          it is there, but TLS doesn't fit: trying again changes nothing until that is fixed
    ├── NumericalError          a number that must be finite isn't
    ├── ConfigError             the configuration can't be run as it is
    ├── ChildFailed             a process that `vaopd up` started has ended, or never became ready
    └── Interrupted             a signal asked for the end

`vaopd.wire.errors` maps them to gRPC statuses and back, `vaopd_api.problems` to HTTP and `vaopd.http_client` back.
An exception that a module raises for itself to catch isn't in the tree.
"""

import signal


class VaopdError(Exception):
    """Any error that this project raises on purpose."""

    request_id: str | None = None
    """Id of the call that a server refused, which is in its log; shown behind the message."""

    @property
    def message(self) -> str:
        """The message alone."""
        return super().__str__()

    def __str__(self) -> str:
        return self.message if self.request_id is None else f"{self.message} (request {self.request_id})"


class InvalidInput(VaopdError):
    """The request is wrong in itself."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        """`field`: the path of the wrong field in the request, if it is a single one, e.g. "groups[1].group_id"."""
        super().__init__(message)
        self.field = field


class ImageRefused(InvalidInput):
    """An image was not decoded: unreadable, of another format than PNG, JPEG or WEBP, or over a cap."""


class LimitExceeded(VaopdError):
    """The request is over a stated limit."""


class Busy(LimitExceeded):
    """A quota is used up, or a queue is full; the same request may be sent again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unauthenticated(VaopdError):
    """The key is missing or not valid here: malformed, unknown, expired or revoked."""


class PermissionDenied(VaopdError):
    """The key is valid, but not for this job."""


class Mismatch(VaopdError):
    """Two sides that must agree do not; the message names both."""


class NotFound(VaopdError):
    """The request refers to something that does not exist here."""


class LeaseLost(VaopdError):
    """Another process holds the lease on an entry or a job; the late commit was refused."""


class Unavailable(VaopdError):
    """The other side can't answer now."""


class NumericalError(VaopdError):
    """A number that must be finite is missing or not finite."""


class ConfigError(VaopdError):
    """The configuration can't be run; the message names the key."""


class QueueFull(Busy):
    """The teacher's queue is full; the same request may be sent again after `retry_after_s`."""


class TeacherFault(Mismatch):
    """A fault of the teacher, not of the request: it differs from its replicas, or breaks the protocol."""


class TlsRefused(Unavailable):
    """Client and server don't agree on TLS: an expired or foreign certificate, or plain text on one side."""


class ChildFailed(VaopdError):
    """A child process ended or never became ready, and can't be restarted; the message ends with its log's end."""


class Interrupted(VaopdError):
    """SIGINT, SIGTERM or SIGHUP asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number
