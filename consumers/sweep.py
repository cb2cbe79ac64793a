"""clock.ticked: look at what is due, and put documents and sandboxes right where they disagree."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from consumers import chunks
from consumers.admission import admit, give_sandbox, write_positions
from consumers.commands import settle_all
from consumers.context import Context
from consumers.pool import fill
from consumers.sessions import Held, end, load, readable, say_ended, write
from consumers.settlement import DONE, Settlement
from consumers.tend_session import finish
from schemas.documents import session_path
from schemas.errors import Conflict, NotFound, PigeonError
from schemas.events import CloseReason, SessionClosed, SessionOpened, SessionRequested
from schemas.lifecycle import CommandState, SessionState
from schemas.ports import Query, Sandbox, Where

DUE_PAGE = 100  # sessions looked at in one tick, of each kind
PARALLEL = 8  # at once
CLEANING_SECONDS = 5.0  # after which the queue is not kept waiting: a node that is gone confirms no sandbox's end

log = logging.getLogger(__name__)


async def sweep(context: Context) -> Settlement:
    """One tick. Every part is idempotent and stands alone: what fails is done at the next tick."""
    cleaning = asyncio.create_task(_clean(context))
    try:
        await asyncio.wait({cleaning}, timeout=CLEANING_SECONDS)
        await admit(context)
        await write_positions(context)
        await fill(context)
        await cleaning
    finally:
        cleaning.cancel()
        await asyncio.gather(cleaning, return_exceptions=True)
    return DONE


async def _clean(context: Context) -> None:
    await _each(context, await _due(context, "deadline", timedelta(0)), _look_at)
    await _each(context, await _due(context, "tendedAt", context.limits.tended_stale), _replace_tender)
    await _orphans(context)


async def _due(context: Context, field: str, ago: timedelta) -> list[Held]:
    moment = context.now() - ago
    page = await context.store.query(Query("sessions", (Where(field, "<=", moment),), order_by=field, limit=DUE_PAGE))
    return readable(page)


async def _each(context: Context, sessions: list[Held], work: Callable[[Context, Held], Awaitable[None]]) -> None:
    gate = asyncio.Semaphore(PARALLEL)

    async def one(current: Held) -> None:
        async with gate:
            try:
                await work(context, current)
            except PigeonError as error:
                log.warning("sweep: session %s is looked at again at the next tick: %s", current.id, error)
            except Exception:
                log.exception("sweep: session %s cannot be looked at", current.id)

    await asyncio.gather(*(one(current) for current in sessions))


async def _look_at(context: Context, current: Held) -> None:
    expired = context.now() >= current.session.expires_at
    match current.session.state:
        case SessionState.REQUESTED | SessionState.QUEUED if expired:
            await _expire_unstarted(context, current)
        case SessionState.REQUESTED:
            await _request_again(context, current)
        case SessionState.QUEUED:
            await _write(context, current, deadline=current.session.expires_at)
        case SessionState.STARTING:
            await _start_again_or_fail(context, current)
        case SessionState.READY:
            await _warn_or_close(context, current)
        case SessionState.CLOSING:
            await _force(context, current)
        case _:  # it has ended, and whoever ended it may have died before saying so
            await say_ended(context, current.id, current.session)


async def _write(context: Context, current: Held, **fields: Any) -> bool:
    try:
        await write(context, current, fields)
    except (Conflict, NotFound):
        return False  # it moved meanwhile, and is not due any more
    return True


async def _expire_unstarted(context: Context, current: Held) -> None:
    """It has waited for its whole life; its handler checks again, in order with what its user sends."""
    if await _write(context, current, deadline=context.now() + context.limits.closing_grace):
        await context.publish(SessionClosed(reason=CloseReason.EXPIRED), current.id)


async def _request_again(context: Context, current: Held) -> None:
    """The function recorded the session and could not publish: publish for it."""
    if await _write(context, current, deadline=context.now() + context.limits.request_timeout):
        session = current.session
        request = SessionRequested(user_id=session.user_id, rows=session.rows, cols=session.cols, image=session.image)
        await context.publish(request, current.id)


async def _start_again_or_fail(context: Context, current: Held) -> None:
    """Without a sandbox its starter died: give it one again. With one it has had its whole start time-out."""
    if current.session.pod_uid:
        await _fail_start(context, current)
    elif await _write(context, current, deadline=context.now() + context.limits.request_timeout):
        await give_sandbox(context, current.id, current.session)


async def _fail_start(context: Context, current: Held) -> None:
    """First the step, which a tender that makes it ready at this moment wins or loses whole; then the cleaning."""
    sandbox = await context.sandboxes.get(current.session.pod_name)
    why = f": {sandbox.reason}" if sandbox is not None and sandbox.reason else ""
    words = f"The sandbox was not ready within {context.limits.start_timeout}{why}."
    only = frozenset({SessionState.STARTING})
    if await end(context, current.id, SessionState.FAILED, words, only=only, final_offset=0):
        await finish(context, current, SessionState.FAILED, words, 0)


async def _warn_or_close(context: Context, current: Held) -> None:
    session, now, limits = current.session, context.now(), context.limits
    if now >= session.expires_at:
        await context.publish(SessionClosed(reason=CloseReason.EXPIRED), current.id)
        await _write(context, current, deadline=now + limits.closing_grace)
        return
    closes_at = session.last_activity_at + limits.idle_timeout
    if session.warning is None:
        closes_at = max(closes_at, now + limits.idle_warning)  # a warning is never shorter than promised
        await _write(context, current, warning=closes_at, deadline=min(closes_at, session.expires_at))
    else:
        await context.publish(SessionClosed(reason=CloseReason.IDLE), current.id)
        await _write(context, current, deadline=now + limits.closing_grace)


async def _force(context: Context, current: Held) -> None:
    """The tender did not bring it to its end in time: seal what there is, and say so. Not by what was read a while ago:
    it may have come to its end, or to its final offset, since."""
    if not await _write(context, current, deadline=context.now()):
        return
    session = current.session
    offset = session.final_offset
    if offset is None and not session.agent_boot_id:
        offset = 0
    sealed = offset is None
    if offset is None:
        offset = await chunks.seal(context, session_path(current.id), "Closing took too long.", session.expire_at)
    await finish(context, current, SessionState.CLOSED, session.reason, offset, sealed=sealed)


async def _replace_tender(context: Context, current: Held) -> None:
    """Nobody has signed this session for a while: have it tended anew, once in that while."""
    if await _write(context, current, tended_at=context.now()):
        await context.publish(SessionOpened(epoch=current.session.epoch), current.id)


async def _orphans(context: Context) -> None:
    """Delete sandboxes whose session has ended or is missing, once they are older than a grace."""
    gate = asyncio.Semaphore(PARALLEL)

    async def one(sandbox: Sandbox) -> None:
        async with gate:
            try:
                await _delete_orphan(context, sandbox)
            except PigeonError as error:
                log.warning("sandbox %s is looked at again at the next tick: %s", sandbox.name, error)
            except Exception:
                log.exception("sandbox %s cannot be looked at", sandbox.name)

    oldest = context.now() - context.limits.orphan_grace
    sandboxes = [sandbox for sandbox in await context.sandboxes.list() if sandbox.session]
    await asyncio.gather(*(one(sandbox) for sandbox in sandboxes if sandbox.created_at <= oldest))


async def _delete_orphan(context: Context, sandbox: Sandbox) -> None:
    assert sandbox.session is not None
    current = await load(context, sandbox.session)
    if current is not None and current.session.live and current.session.pod_uid in ("", sandbox.uid):
        return
    log.info("sandbox %s has no live session and is deleted", sandbox.name)
    await context.sandboxes.delete(sandbox.name, sandbox.uid)
    if current is not None and not current.session.live:  # who ended it may have died half way
        await settle_all(context, current.id, CommandState.LOST, current.session.reason)
