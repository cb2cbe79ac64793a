"""Sessions end at awkward moments: every command has an end, and nothing waits for a forced close."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from consumers.commands import record
from consumers.sessions import load
from consumers.tend_session import finish
from infra.local.sandboxes import LocalSandboxes
from infra.local.store import LocalStore
from schemas.errors import SandboxFailed
from schemas.events import CommandSubmitted, SessionRequested
from schemas.lifecycle import UNSETTLED, CommandState, SessionState
from schemas.limits import Limits
from schemas.ports import Query, Sandbox, SandboxSpec, Snapshot
from tests.consumers.house import House

LIMITS = Limits()


class NoIsolation(LocalSandboxes):
    """A machine on which no sandbox can be started."""

    async def create(self, spec: SandboxSpec) -> Sandbox:
        raise SandboxFailed(f"{spec.name} cannot be isolated here")


async def test_commands_of_a_session_that_fails_to_start_have_an_end(
    tmp_path: Path, empty_house: House, python: Path
) -> None:
    """Submitted before the sandbox was to be made: their sender does not wait for ever."""
    broken = NoIsolation(tmp_path / "state" / "sandboxes", limits=LIMITS, python=python)
    house = House(replace(empty_house.context, sandboxes=broken), empty_house.clock, empty_house.hired)
    session = await house.record()
    await house.handle(CommandSubmitted(command_id="early", text="echo early"), session)
    await house.handle(SessionRequested(user_id="alice"), session)
    assert (await house.session(session)).state is SessionState.FAILED
    early = await house.command(session, "early")
    assert early is not None
    assert (early.state, early.reason) == (CommandState.KILLED, "session_closed")


class Rival(LocalStore):
    """Records a command in the moment after all commands were settled, as another worker may."""

    house: House
    session: str
    looks = 0

    async def query(self, query: Query) -> list[Snapshot]:
        found = await super().query(query)
        self.looks += query.collection.endswith("/commands")
        if self.looks == len(UNSETTLED):
            event = CommandSubmitted(command_id="c1", text="x")
            await record(self.house.context, self.session, event, self.house.clock.now())
        return found


async def test_a_command_recorded_while_its_session_ends_has_an_end(empty_house: House) -> None:
    """It comes after all others were settled and before the end: it is settled with them."""
    async with empty_house.hired:
        await empty_house.hire()
        session = await empty_house.ready()
    own: Any = empty_house.context.store
    store = Rival(own._database, indexes=own._indexes)
    store.house, store.session = empty_house, session
    current = await load(empty_house.context, session)
    assert current is not None
    await finish(replace(empty_house.context, store=store), current, SessionState.LOST, "Gone.", 0)
    command = await empty_house.command(session, "c1")
    assert command is not None
    assert (command.state, command.reason) == (CommandState.LOST, "Gone.")
