"""The orderly end of a whole stack: its sessions are closed, and no sandbox stays behind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import timedelta

from infra.wiring import Backends
from schemas.documents import Session
from schemas.envelope import encode, wrap
from schemas.errors import PigeonError
from schemas.events import CloseReason, SessionClosed
from schemas.ports import Query, Sandboxes, Snapshot, Where

SOURCE = "/pigeon/shutdown"
CLOSE_SECONDS = 15.0  # how long sessions may take to end in good order
DELETE_SECONDS = 10.0
POLL_SECONDS = 0.05
FAR = timedelta(days=3650)

logger = logging.getLogger(__name__)


async def close_sessions(opened: Backends, say: Callable[[str], None]) -> None:
    """Close every live session and return when all have ended, or after CLOSE_SECONDS. Never raises PigeonError."""
    told: set[str] = set()
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            while live := await _live_sessions(opened):
                if not told:
                    say(f"\nClosing {len(live)} session{'s' if len(live) > 1 else ''}; Ctrl-C once more: at once.")
                for snapshot in live:
                    if snapshot.id not in told:
                        await _close(opened, snapshot.id)
                        told.add(snapshot.id)
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        logger.warning("some sessions did not end within %g s; their sandboxes are removed", CLOSE_SECONDS)
    except PigeonError as error:
        logger.warning("the sessions could not be closed: %s", error)


async def _live_sessions(opened: Backends) -> list[Snapshot]:
    """Every session that has not ended: those have a deadline, and some that ended a moment ago."""
    query = Query(
        "sessions", (Where("deadline", "<=", opened.ports.clock.now() + FAR),), order_by="deadline", limit=1_000
    )
    return [snapshot for snapshot in await opened.ports.store.query(query) if Session.of(snapshot).live]


async def _close(opened: Backends, session: str) -> None:
    event = SessionClosed(reason=CloseReason.ADMIN)
    message = encode(wrap(event, subject=session, source=SOURCE, time=opened.ports.clock.now()))
    await opened.ports.bus.publish(event.topic, message)


async def delete_sandboxes(sandboxes: Sandboxes) -> None:
    """Remove every sandbox, warm ones included, within DELETE_SECONDS. Never raises PigeonError."""
    try:
        async with asyncio.timeout(DELETE_SECONDS):
            found = await sandboxes.list()
            await asyncio.gather(*(sandboxes.delete(sandbox.name, sandbox.uid) for sandbox in found))
    except (PigeonError, TimeoutError) as error:
        logger.warning("a sandbox may be left behind: %s", error or "removing took too long")
