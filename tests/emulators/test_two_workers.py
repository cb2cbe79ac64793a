"""Two workers, two processes: both are given the same messages, and both do what they say."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from infra.adapters.firestore import FirestoreStore, firestore_store
from schemas.documents import INDEXES, Session, session_path
from tests.emulators.load import PATIENCE, stack, work_goes_on
from tests.journeys.conftest import MakeStack, make_stack
from tests.journeys.stack import Stack
from tests.waiting import until

__all__ = ["make_stack"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@contextmanager
def frozen(process: asyncio.subprocess.Process) -> Iterator[None]:
    """It does nothing, and goes on in the middle of what it did as if nothing had been."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


async def epoch(store: FirestoreStore, session: str) -> int:
    """How many tenders the session has had."""
    snapshot = await store.get(session_path(session))
    assert snapshot is not None
    return Session.of(snapshot).epoch


async def hired(whole: Stack, count: int) -> asyncio.subprocess.Process:
    """One more worker, once it serves; it is number `count`."""
    process = await whole.start("worker")

    async def serves() -> bool:
        return whole.log().count("Isolation:") >= count

    await until(serves, "the worker serves", PATIENCE)
    return process


async def test_a_worker_that_slept_past_its_leases_does_no_harm(
    make_stack: MakeStack, project: str, pubsub_host: str, firestore_host: str
) -> None:
    """Frozen while it tends and handles: its messages go to the other, which takes the sessions over. Woken, it goes on
    where it was: the same bytes are written by two, the same commands handed over by two, and nobody can tell."""
    async with (
        stack(make_stack, project, pubsub_host, firestore_host, roles="gateway,ticker") as whole,
        firestore_store(project, indexes=INDEXES, emulator=firestore_host) as store,
        whole.user() as alice,
    ):
        first = await hired(whole, 1)

        async def through(session: str) -> None:
            second = await hired(whole, 2)
            for sleeper, expected in ((first, 2), (second, 3)):
                with frozen(sleeper):

                    async def taken_over(number: int = expected) -> bool:
                        return await epoch(store, session) >= number

                    await until(taken_over, "the other tends the session", PATIENCE)

        await work_goes_on(alice, through)
        assert [process.returncode for process in whole.processes] == [None] * 3
