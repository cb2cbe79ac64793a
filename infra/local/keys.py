"""What proves who is who on one machine: secrets that are files, and one-time tickets."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from datetime import datetime, timedelta
from pathlib import Path

from schemas.errors import PigeonError
from schemas.ports import Clock

SECRET_BYTES = 32
TICKET_LIFETIME = timedelta(minutes=10)
MAX_TICKETS = 1_000  # the oldest are forgotten beyond it


class InsecureSecret(PigeonError):
    """A secret's file or folder that others can read or replace, or a file that holds no secret of ours."""

    code = "insecure_secret"


def token_secret(state: Path) -> bytes:
    """The key that signs and verifies access tokens (HS256). Made at first use; see `read_secret` for errors."""
    return read_secret(state, "token.secret")


def worker_secret(state: Path) -> bytes:
    """The key from which each session's agent key is derived. Made at first use; see `read_secret` for errors."""
    return read_secret(state, "worker.secret")


def read_secret(state: Path, name: str) -> bytes:
    """The secret kept in `state`/`name` as hexadecimal text, made if it is not there.

    Processes that start together get the same one, and a crash leaves a whole file or none. Raises InsecureSecret
    where others can read or replace the file or it holds something else, OSError where it cannot be read or made.
    """
    path = state / name
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    if state.stat().st_mode & stat.S_IWOTH:
        raise InsecureSecret(f"{state} can be written by everybody: chmod o-w it")
    if not path.exists():
        _make(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        _check_private(path, os.fstat(file.fileno()))
        return _parse(path, file.read(4 * SECRET_BYTES))


def _make(path: Path) -> None:
    """Write a new secret beside `path` and link it there: a link is atomic and never replaces another's."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(SECRET_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    except FileExistsError:
        pass  # another process was first; its secret is the one
    finally:
        draft.unlink()


def _check_private(path: Path, status: os.stat_result) -> None:
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InsecureSecret(f"{path} can be read by others: chmod 600 it, or delete it to have a new one made")
    if status.st_uid not in (os.geteuid(), 0):
        raise InsecureSecret(f"{path} belongs to another user (uid {status.st_uid}): use a state folder of your own")


def _parse(path: Path, text: bytes) -> bytes:
    try:
        secret = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise InsecureSecret(f"{path} does not hold a secret: delete it to have a new one made")
    return secret


class Tickets:
    """One-time tickets, each good for one user and ten minutes. In memory only: a restart forgets them all."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: dict[bytes, tuple[str, datetime]] = {}

    def issue(self, user: str) -> str:
        """A new ticket of 128 random bits, to be put into an address."""
        ticket = secrets.token_urlsafe(16)
        while len(self._open) >= MAX_TICKETS:
            del self._open[next(iter(self._open))]
        self._open[_digest(ticket)] = (user, self._clock.now() + TICKET_LIFETIME)
        return ticket

    def redeem(self, ticket: str) -> str | None:
        """The user the ticket is good for, once; None if it is unknown, used or too old.

        It is looked up by its digest: how long that takes tells nothing about tickets that are open.
        """
        user, expiry = self._open.pop(_digest(ticket), ("", None))
        return user if expiry is not None and self._clock.now() < expiry else None


def _digest(ticket: str) -> bytes:
    return hashlib.sha256(ticket.encode(errors="surrogatepass")).digest()
