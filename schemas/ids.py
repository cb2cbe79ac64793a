"""Names. They come from ids, so that a redelivery or a retry finds the same thing."""

from __future__ import annotations

import base64
import hashlib
import re
import uuid
from typing import NewType

SessionId = NewType("SessionId", str)
UserId = NewType("UserId", str)
CommandId = NewType("CommandId", str)
TransferId = NewType("TransferId", str)

SESSION_ID_PATTERN = r"^s[a-z2-7]{25}$"
CLIENT_ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
OFFSET_DIGITS = 16


def session_id(user: UserId, request_id: str) -> SessionId:
    """The session that this user's request creates: 26 characters, a valid DNS label.

    The same user and request id always name the same session, which makes creating idempotent.
    """
    digest = hashlib.sha256(f"{user}\0{request_id}".encode()).digest()
    return SessionId("s" + base64.b32encode(digest).decode().lower()[:25])


def is_session_id(text: str) -> bool:
    """Whether `text` has the shape of a session id; says nothing of whether it exists."""
    return re.fullmatch(SESSION_ID_PATTERN, text) is not None


def new_id() -> str:
    """A random id of 32 hexadecimal characters."""
    return uuid.uuid4().hex


def sandbox_name(session: SessionId) -> str:
    """The name of a session's own sandbox or pod (one claimed from the pool keeps its pool name)."""
    return f"session-{session}"


def chunk_id(offset: int) -> str:
    """The document id of the chunk that starts at `offset` (bytes): ids sort as offsets do."""
    return f"{offset:0{OFFSET_DIGITS}d}"
