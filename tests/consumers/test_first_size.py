"""A window that takes its size while its session starts: the shell gets it, whatever the start was just doing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from consumers.controls import Controls
from consumers.settlement import DONE, Later
from consumers.tend_session import Tender
from infra.local.sandboxes import LocalSandboxes
from infra.local.store import LocalStore
from schemas.events import SessionRequested, TerminalResized
from schemas.lifecycle import SessionState
from schemas.limits import Limits
from schemas.ports import ByteStream, Fields
from tests.consumers.house import SECRET, House, working


class ResizedMeanwhile(LocalSandboxes):
    """The window changes once in the moment before the tender's first connection, and once before its second."""

    house: House
    session = ""
    sizes: list[tuple[int, int]]

    async def connect(self, name: str, uid: str) -> ByteStream:
        if self.sizes:
            rows, cols = self.sizes.pop(0)
            assert await self.house.handle(TerminalResized(rows=rows, cols=cols), self.session) == DONE
        return await super().connect(name, uid)


@pytest.mark.parametrize("sizes", [[(33, 101)], [(33, 101), (44, 111)]])
async def test_a_window_resized_while_its_tender_connects_is_not_forgotten(
    tmp_path: Path, empty_house: House, python: Path, sizes: list[tuple[int, int]]
) -> None:
    """In a pod connecting takes as long as a page needs to fit its terminal into its window."""
    rival = ResizedMeanwhile(tmp_path / "state" / "sandboxes", limits=Limits(), python=python)
    session = await empty_house.record()
    rival.house, rival.session, rival.sizes = empty_house, session, list(sizes)
    async with working(replace(empty_house.fellow(), sandboxes=rival, controls=Controls(rival, SECRET))):
        await empty_house.publish(SessionRequested(user_id="alice"), session)
        await empty_house.until_state(session, SessionState.READY)
        rows, cols = sizes[-1]
        assert (await empty_house.run(session, "stty size"))[1] == f"{rows} {cols}\r\n".encode()


class DiedOnceOpened(Exception):
    """kill -9, as far as this process goes."""


async def test_a_size_that_was_never_told_to_the_shell_is_told_by_the_next_tender(
    empty_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one opened the shell and died; opening it again changes nothing."""
    session = await empty_house.record()
    await empty_house.handle(SessionRequested(user_id="alice"), session)

    async def die(tender: Tender, boot_id: str) -> None:
        raise DiedOnceOpened

    with monkeypatch.context() as dying:
        dying.setattr(Tender, "_become_ready", die)
        current = await empty_house.session(session)
        with pytest.raises(DiedOnceOpened):
            await Tender(empty_house.context, session, current).run()
    await empty_house.handle(TerminalResized(rows=33, cols=101), session)
    async with working(empty_house.fellow()):
        await empty_house.until_state(session, SessionState.READY)
        assert (await empty_house.run(session, "stty size"))[1] == b"33 101\r\n"


class ReadyMeanwhile(LocalStore):
    """Steps the session to ready between a handler's look at it and its write."""

    async def update(self, path: str, fields: Fields, *, expect: str | None = None) -> str:
        if "rows" in fields:
            await super().update(path, {"state": "ready"})
        return await super().update(path, fields, expect=expect)


async def test_a_resize_that_meets_the_step_to_ready_comes_again(empty_house: House) -> None:
    """Nobody reads the size in the document any more: it goes to the agent instead."""
    session = await empty_house.record(state=SessionState.STARTING)
    own: Any = empty_house.context.store
    store = ReadyMeanwhile(own._database, indexes=own._indexes)
    met = House(replace(empty_house.context, store=store), empty_house.clock, empty_house.hired)
    assert isinstance(await met.handle(TerminalResized(rows=30, cols=90), session), Later)
