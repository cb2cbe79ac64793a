"""Which gateway runs on a state folder: a locked file that says where it listens.

The lock is the truth and ends with its process, however that ends; what the file says counts only while it is held. So
nobody sends a token to a port that belonged to a stack of yesterday.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from schemas.errors import PigeonError

FILE = "gateway.json"
LOCK_TRIES = 10  # a reader holds the lock for an instant
LOCK_PAUSE = 0.05  # seconds


class AlreadyRunning(PigeonError):
    """Another gateway runs on this state folder."""

    code = "already_running"


@dataclass(frozen=True, slots=True)
class Presence:
    """A running gateway; `port` is None while it starts."""

    pid: int | None
    port: int | None


class Claim:
    """The right to be the gateway of a state folder."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def announce(self, port: int) -> None:
        """Say that the gateway listens on that port of 127.0.0.1."""
        self._write(json.dumps({"pid": os.getpid(), "port": port}).encode() + b"\n")

    def withdraw(self) -> None:
        """Say that it listens no more."""
        self._write(b"")

    def _write(self, text: bytes) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()


@contextmanager
def claim(state: Path) -> Iterator[Claim]:
    """Be the one gateway of the state folder until the context ends. Raises AlreadyRunning or OSError."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(state / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        if not _lock(file):
            other = _parse(file.read())
            raise AlreadyRunning(
                f"pigeon runs on {state} already (process {other.pid}, port {other.port}): stop it first,"
                " or set PIGEON_STATE to another folder"
            )
        own = Claim(file)
        own.withdraw()
        try:
            yield own
        finally:
            own.withdraw()


def find(state: Path) -> Presence | None:
    """The gateway that runs on the state folder now, or None. Raises OSError if that cannot be told."""
    try:
        file = (state / FILE).open("rb")
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _parse(file.read())
        return None


def _lock(file: BinaryIO) -> bool:
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE)
        else:
            return True
    return False


def _parse(text: bytes) -> Presence:
    try:
        document = json.loads(text)
        return Presence(int(document["pid"]), int(document["port"]))
    except (ValueError, KeyError, TypeError):
        return Presence(None, None)
