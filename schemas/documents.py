"""What is stored, where, and which queries are indexed. Times are aware and in UTC, offsets and sizes in bytes."""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from schemas.events import Usage
from schemas.ids import chunk_id
from schemas.lifecycle import CommandState, SessionState
from schemas.model import Model
from schemas.ports import Fields, Snapshot

INDEXES: dict[str, tuple[tuple[str, ...], ...]] = {
    "sessions": (
        ("userId", "live", "createdAt"),  # reconnect
        ("userId", "createdAt"),  # a user's sessions
        ("state", "queuedAt"),  # the queue
        ("deadline",),  # what the sweep must look at
        ("tendedAt",),  # tenders that went silent
    ),
    "commands": (("state", "number"), ("number",)),
}
"""Equality fields first, then the field of the order; by collection name. Ordering by id needs no index."""


class Stored(Model):
    """A document's fields, and the way between them and the store."""

    @classmethod
    def of(cls, snapshot: Snapshot) -> Self:
        """Read a stored document. Raises ValidationError where it does not hold what this version expects."""
        return cls.model_validate(dict(snapshot.data))

    def fields(self) -> dict[str, Any]:
        """The document to store: camelCase names, native times and bytes, enumerations as plain strings."""
        return plain(self.model_dump(by_alias=True))


def plain(fields: Fields) -> dict[str, Any]:
    """Replace enumerations and models by what a store keeps."""
    return {name: _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, Model):
        return plain(value.model_dump(by_alias=True))
    if isinstance(value, dict):
        return plain(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class Session(Stored):
    """sessions/{id}. `deadline` is the next moment the sweep must look at it: None once it has ended and that is said.

    `position` counts from 1 in the queue. `expires_at` ends its longest life; `expire_at`, fixed at creation, is
    when its documents may be removed. `epoch` counts the tenders that took it over; `tender` is the id of the
    message that the newest of them holds.
    """

    user_id: str
    state: Annotated[SessionState, Field(strict=False)]
    live: bool
    reason: str = ""
    image: str = ""
    rows: int = 24
    cols: int = 80
    created_at: datetime
    queued_at: datetime | None = None
    position: int | None = None
    pod_name: str = ""
    pod_uid: str = ""
    agent_boot_id: str = ""
    ready_at: datetime | None = None
    last_activity_at: datetime
    deadline: datetime | None
    warning: datetime | None = None
    expires_at: datetime
    ended_at: datetime | None = None
    expire_at: datetime
    epoch: int = 0
    tender: str = ""
    tended_at: datetime | None = None
    next_command: int = 1
    final_offset: int | None = None
    usage: Usage = Usage()


class ChangedFile(Model):
    """A path below the workspace that a command changed."""

    path: str
    change: Literal["created", "modified", "deleted"]


class Command(Stored):
    """sessions/{id}/commands/{commandId}. Offsets are of the transcript; `start_offset` is None if it never started.

    `cancelled` is a wish, of a command that the agent has not been given yet: the agent says what became of it.
    """

    number: int
    text: str
    state: Annotated[CommandState, Field(strict=False)]
    cancelled: bool = False
    reason: str = ""
    timeout_seconds: int | None = None
    exit_code: int | None = None
    cwd: str = ""
    start_offset: int | None = None
    end_offset: int | None = None
    seconds: float | None = None
    changed_files: Annotated[tuple[ChangedFile, ...], Field(strict=False)] = ()
    changed_files_truncated: bool = False
    submitted_at: datetime
    ended_at: datetime | None = None
    expire_at: datetime


class Chunk(Stored):
    """sessions/{id}/chunks/{offset}: an immutable piece of a transcript.

    A chunk of kind "gap" stands for `length` bytes that were given up (None: nobody knows how many; only ever last).
    """

    kind: Literal["data", "gap"] = "data"
    offset: int
    data: bytes = b""
    length: int | None = None
    reason: str = ""
    at: datetime
    expire_at: datetime

    @property
    def end(self) -> int:
        """The offset after this chunk; a gap of unknown length ends where it starts."""
        return self.offset + (len(self.data) if self.kind == "data" else self.length or 0)


class TransferState(StrEnum):
    """pending -> done | failed."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class Transfer(Stored):
    """sessions/{id}/transfers/{transferId}: a file read, a listing or a push; contents are its own chunks."""

    state: Annotated[TransferState, Field(strict=False)]
    what: Literal["content", "listing", "push"]
    path: str = ""
    size: int | None = None
    mode: int | None = None
    code: str = ""
    message: str = ""
    created_at: datetime
    expire_at: datetime


class Cursor(Stored):
    """sessions/{id}/cursors/{caller}: where a client without cursors of its own has read to."""

    offset: int
    expire_at: datetime


class User(Stored):
    """users/{id}: how many sessions of the user live now, and their own limit where it differs (None: the default)."""

    live_sessions: int = 0
    max_sessions: int | None = None


class Rollout(Stored):
    """config/rollout: who may use the terminal. Without the document everybody may."""

    enabled: bool = True
    users: Annotated[tuple[str, ...], Field(strict=False)] | None = None


ROLLOUT_PATH = "config/rollout"


def session_path(session: str) -> str:
    """The document of a session."""
    return f"sessions/{session}"


def command_path(session: str, command: str) -> str:
    """The document of a command."""
    return f"sessions/{session}/commands/{command}"


def commands_of(session: str) -> str:
    """The collection of a session's commands."""
    return f"sessions/{session}/commands"


def chunks_of(owner: str) -> str:
    """The collection of chunks of a transcript's owner, which is a session's or a transfer's path."""
    return f"{owner}/chunks"


def chunk_path(owner: str, offset: int) -> str:
    """The chunk that starts at `offset`."""
    return f"{owner}/chunks/{chunk_id(offset)}"


def transfer_path(session: str, transfer: str) -> str:
    """The document of a transfer."""
    return f"sessions/{session}/transfers/{transfer}"


def cursor_path(session: str, user: str) -> str:
    """Where a caller without cursors has read to."""
    return f"sessions/{session}/cursors/{quote_id(user)}"


def user_path(user: str) -> str:
    """The document of a user. The id is quoted: it is the identity provider's, not ours."""
    return f"users/{quote_id(user)}"


def quote_id(text: str) -> str:
    """`text` as one document id: '/', '.', '%' and '_' cannot break out of the path."""
    return "".join(c if re.match(r"[A-Za-z0-9-]", c) else "".join(f"%{byte:02x}" for byte in c.encode()) for c in text)
