"""What the subcommands share: finding the stack, finding a session, and printing."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import typer

from infra.cli.printable import printable
from infra.client import Client, local, remote
from infra.local.keys import token_secret
from infra.settings import Settings
from producers.identity import sign_local_token
from schemas.errors import Malformed, Unauthenticated, UnknownSession
from schemas.http import CleanupSessionResponse, SessionStatus
from schemas.ids import is_session_id
from schemas.lifecycle import LIVE


@asynccontextmanager
async def connect(url: str, user: str) -> AsyncIterator[Client]:
    """A client of the stack at `url`, or of this machine's. Raises what `local` raises, or Unauthenticated."""
    if not url:
        async with local(Settings.from_environment().state, user) as client:
            yield client
        return
    token = os.environ.get("PIGEON_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()) or not token:
        raise Unauthenticated("set PIGEON_TOKEN to an access token for that address")
    async with remote(url, token) as client:
        yield client


def local_token(user: str, hours: float) -> str:
    """An access token that this machine's stack accepts. Raises Malformed for a user without a name."""
    if not user:
        raise Malformed("a user has a name")
    return sign_local_token(token_secret(Settings.from_environment().state), user, timedelta(hours=hours))


async def find_session(client: Client, text: str) -> str:
    """The session that `text` names, whole or by its first letters. Raises UnknownSession or Malformed."""
    if is_session_id(text):
        return text
    found = [status.session_id for status in await client.sessions() if text and status.session_id.startswith(text)]
    if not found:
        raise UnknownSession(f"there is no session '{text}': `pigeon sessions --all` lists them")
    if len(found) > 1:
        raise Malformed(f"'{text}' could be {len(found)} sessions: give more letters")
    return found[0]


def print_sessions(sessions: Sequence[SessionStatus], *, ended: bool, as_json: bool) -> int:
    """Print a line for each session (live ones, or all); returns the exit status."""
    shown = [status for status in sessions if ended or status.state in LIVE]
    if as_json:
        typer.echo(json.dumps([status.model_dump(mode="json", by_alias=True) for status in shown], indent=2))
        return 0
    for status in shown:
        typer.echo(
            f"{status.session_id}  {_age(status.created_at):>8}  {status.state:<9}  {printable(status.reason)}".rstrip()
        )
    if not shown:
        typer.echo("no sessions" if ended else "no live sessions", err=True)
    return 0


def print_closed(answer: CleanupSessionResponse, *, as_json: bool) -> int:
    """Say what became of a session that was to be closed; returns the exit status."""
    if as_json:
        typer.echo(answer.model_dump_json(by_alias=True))
    else:
        ended = answer.status not in LIVE
        typer.echo(f"{answer.session_id} " + (f"had ended already ({answer.status})" if ended else "is closing"))
    return 0


def describe(status: SessionStatus) -> str:
    """What became of a session, or what it waits for, in a sentence."""
    return printable(status.reason) or f"The session is {status.state}."


def _age(since: datetime) -> str:
    minutes = int((datetime.now(UTC) - since).total_seconds() // 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // 1440} d"
