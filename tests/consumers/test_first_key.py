"""What a person waits for in a new session is got ready before they ask for it."""

from __future__ import annotations

from tests.consumers.house import House, working
from tests.waiting import until


async def test_a_ready_session_can_be_typed_into_at_once(empty_house: House) -> None:
    """Its tender connects for input by itself: in a pod the first key would wait for an exec."""
    worker = empty_house.fellow()
    async with working(worker):
        session = await empty_house.ready()

        async def connected() -> bool:
            return worker.controls.peek(session) is not None

        await until(connected, "there is a control connection")
    await worker.controls.close()
