"""Warm sandboxes: started, not opened, without a session."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from itertools import count, islice

from consumers.admission import spec, stale
from consumers.context import Context
from schemas.errors import NoCapacity, SandboxFailed, Unavailable
from schemas.lifecycle import SessionState
from schemas.ports import Phase, Query, Sandbox, Where

DISCARD_SECONDS = 5.0  # for the deletion of spent sandboxes before others are made beside them

log = logging.getLogger(__name__)


async def fill(context: Context) -> None:
    """Keep `limits.pool_size` sandboxes warm. Lack of room is no error: users come first."""
    await context.filling.run(lambda: _fill(context))


async def _fill(context: Context) -> None:
    there = await context.sandboxes.list()
    warm = [sandbox for sandbox in there if sandbox.session is None]
    spent = [sandbox for sandbox in warm if sandbox.phase is Phase.ENDED or stale(context, sandbox)]
    await _discard(context, spent)
    missing = context.limits.pool_size - (len(warm) - len(spent))
    if missing > 0 and await _somebody_waits(context):
        return
    for name in islice(_free_names({sandbox.name for sandbox in there}), max(0, missing)):
        if not await _add(context, name):
            return


async def _discard(context: Context, spent: list[Sandbox]) -> None:
    """A node that is gone confirms no end: what is not deleted in time is asked for again at the next tick."""
    deleting = [asyncio.create_task(context.sandboxes.delete(each.name, each.uid)) for each in spent]
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            results = await asyncio.gather(*deleting, return_exceptions=True)
    except TimeoutError:
        log.info("warm sandboxes are still being deleted: %s", [each.name for each in spent])
        return
    for error in filter(None, results):
        log.warning("a warm sandbox is deleted at the next tick: %s", error)


def _free_names(taken: set[str]) -> Iterator[str]:
    """Numbers, the lowest first: workers that fill at the same moment choose the same name, and make one sandbox."""
    return (name for number in count() if (name := f"pool-{number}") not in taken)


async def _somebody_waits(context: Context) -> bool:
    query = Query("sessions", (Where("state", "==", SessionState.QUEUED.value),), order_by="queuedAt", limit=1)
    return bool(await context.store.query(query))


async def _add(context: Context, name: str) -> bool:
    try:
        await context.sandboxes.create(spec(context, None, None, name=name))
    except (NoCapacity, Unavailable, SandboxFailed) as error:
        log.warning("no warm sandbox: %s", error)
        return False
    return True
