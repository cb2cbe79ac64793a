"""One error hierarchy. Foreign exceptions are translated into it once, at the adapter, with the cause chained.

Every error has a stable `code`, which is what a client sees in a problem document (RFC 9457), and a
`retryable` flag, which is what settlement asks: a retryable failure is tried again, any other is refused.
"""

from __future__ import annotations


class PigeonError(Exception):
    """Something the system can name. `code` never changes once published."""

    code = "internal"
    retryable = False


# What a caller did wrong -------------------------------------------------------------------------


class Rejected(PigeonError):
    """The request or event can never succeed as it is; nothing was changed."""

    code = "rejected"


class Malformed(Rejected):
    """Bytes or fields that are not what the schema says."""

    code = "malformed"


class MalformedEvent(Malformed):
    """A message that is no event of ours; `raw` keeps its bytes for the dead letters."""

    code = "malformed_event"

    def __init__(self, reason: str, raw: bytes = b"") -> None:
        super().__init__(reason)
        self.raw = raw


class TooLarge(Rejected):
    """A value beyond its limit; the message names the limit."""

    code = "too_large"


class Unauthenticated(Rejected):
    """No token, or one that does not verify."""

    code = "unauthenticated"


class Forbidden(Rejected):
    """A verified caller who may not use this at all (rollout, origin)."""

    code = "forbidden"


class UnknownSession(Rejected):
    """No such session for this caller; somebody else's session looks the same."""

    code = "unknown_session"


class SessionEnded(Rejected):
    """The session has ended, or is ending, and takes no more input."""

    code = "session_ended"


class LimitReached(Rejected):
    """A limit that will free up by itself or by the caller's doing; `retry_after` is in seconds."""

    code = "limit_reached"

    def __init__(self, reason: str, retry_after: int = 30) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class IllegalStep(PigeonError):
    """A state change that the lifecycle table does not have; nothing was changed."""

    code = "illegal_step"


# What the world did ------------------------------------------------------------------------------


class Unavailable(PigeonError):
    """A service that should answer did not; the same call may succeed later."""

    code = "unavailable"
    retryable = True


class StoreUnavailable(Unavailable):
    """The document store did not commit: out of reach, overloaded or out of disk. Nothing was written."""

    code = "store_unavailable"


class BusUnavailable(Unavailable):
    """The message was not accepted by the bus."""

    code = "bus_unavailable"


class AlreadyExists(PigeonError):
    """A create-only write found a document of that name."""

    code = "already_exists"


class NotFound(PigeonError):
    """An update or delete of a document or sandbox that is not there."""

    code = "not_found"


class Conflict(PigeonError):
    """A precondition did not hold: somebody else wrote first."""

    code = "conflict"
    retryable = True


class NoCapacity(Unavailable):
    """No room for one more sandbox now; the session goes back to its place in the queue."""

    code = "no_capacity"


class SandboxGone(PigeonError):
    """The sandbox is not there any more; what lived in it is lost. The message says why, in plain words."""

    code = "sandbox_gone"


class SandboxFailed(PigeonError):
    """The sandbox could not be started and trying again will not help (bad image, no isolation here)."""

    code = "sandbox_failed"


class AgentUnreachable(Unavailable):
    """The sandbox is there but its agent cannot be talked to now."""

    code = "agent_unreachable"


class AgentRefused(PigeonError):
    """The agent answered a request with a refusal; `code` is the agent's own."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Superseded(PigeonError):
    """A newer epoch took this session over; the older holder stops and settles nothing."""

    code = "superseded"


class Diverged(PigeonError):
    """Two writers saw different bytes at one offset: a defect, never papered over."""

    code = "diverged"
