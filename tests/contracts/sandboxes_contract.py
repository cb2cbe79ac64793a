"""What every Sandboxes promises, whatever it is made of.

A test module inherits the class and gives one fixture, `lab`: an empty runtime, two clients of it, and what only its
own implementation knows how to do to a sandbox from outside.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Protocol

import pytest

from schemas.errors import Conflict, NoCapacity, SandboxFailed, SandboxGone
from schemas.limits import MIB
from schemas.ports import Phase, Sandbox, Sandboxes, SandboxSpec
from tests.contracts.waiting import soon
from tests.waiting import until

CAPACITY = 3  # of every lab


class Lab(Protocol):
    """One runtime under test."""

    sandboxes: Sandboxes
    peer: Sandboxes

    async def create_and_die(self, spec: SandboxSpec) -> None:
        """Create it in a process of its own, which is then killed with SIGKILL."""

    async def race_to_claim(self, sandbox: Sandbox, sessions: list[str]) -> list[str]:
        """Claim it from one process for each session, all at once; returns the sessions that got it."""

    async def kill(self, sandbox: Sandbox) -> None:
        """Kill its agent from outside, behind the port's back."""

    async def traces(self, sandbox: Sandbox) -> set[str]:
        """Everything that exists because of this sandbox now: processes, directories, limits."""

    async def still_there(self, traces: set[str]) -> set[str]:
        """Which of them exist now."""


def spec(name: str, session: str | None = None, *, lifetime_seconds: int = 600, image: str = "") -> SandboxSpec:
    """A small sandbox."""
    return SandboxSpec(
        name=name,
        session=session,
        memory_bytes=256 * MIB,
        workspace_bytes=16 * MIB,
        processes=32,
        file_bytes=16 * MIB,
        lifetime_seconds=lifetime_seconds,
        image=image,
    )


async def started(sandboxes: Sandboxes, name: str, session: str | None = None) -> Sandbox:
    """A sandbox that runs."""
    sandbox = await sandboxes.create(spec(name, session))
    return await soon(sandboxes.running(sandbox.name, sandbox.uid))


async def greeting(sandboxes: Sandboxes, sandbox: Sandbox) -> bytes:
    """The first bytes its agent sends on a new connection."""
    stream = await sandboxes.connect(sandbox.name, sandbox.uid)
    try:
        return await soon(stream.read(64))
    finally:
        await stream.close()


class SandboxesContract:
    """The promises of the port, each tried from outside."""

    async def test_a_created_sandbox_comes_to_run_and_its_agent_speaks_first(self, lab: Lab) -> None:
        """Create, wait, connect: what a session's start is made of."""
        created = await lab.sandboxes.create(spec("one", "s-one"))
        assert (created.name, created.session) == ("one", "s-one")
        assert abs(datetime.now(UTC) - created.created_at) < timedelta(minutes=1)
        running = await soon(lab.sandboxes.running("one", created.uid))
        assert (running.phase, running.uid) == (Phase.RUNNING, created.uid)
        assert await greeting(lab.sandboxes, running)

    async def test_creating_twice_makes_one(self, lab: Lab) -> None:
        """A redelivered event finds the sandbox it made before, with the same uid."""
        first = await lab.sandboxes.create(spec("one", "s-one"))
        again = await lab.peer.create(spec("one", "s-one"))
        assert again.uid == first.uid
        assert [sandbox.uid for sandbox in await lab.sandboxes.list()] == [first.uid]

    async def test_creating_at_once_makes_one(self, lab: Lab) -> None:
        """Two workers with the same event do not make two sandboxes."""
        made = await asyncio.gather(*(each.create(spec("one", "s")) for each in [lab.sandboxes, lab.peer] * 3))
        assert len({sandbox.uid for sandbox in made}) == 1

    async def test_a_name_belongs_to_one_session(self, lab: Lab) -> None:
        """A session is never given a sandbox in which another one lived."""
        await lab.sandboxes.create(spec("one", "s-one"))
        with pytest.raises(SandboxFailed):
            await lab.peer.create(spec("one", "s-two"))

    async def test_a_name_that_is_none_is_refused(self, lab: Lab) -> None:
        """A name is never a path."""
        for name in ("", "..", "a/b", "Upper", "x" * 64):
            with pytest.raises(SandboxFailed):
                await lab.sandboxes.create(spec(name))
            assert await lab.sandboxes.get(name) is None

    async def test_a_full_runtime_says_so(self, lab: Lab) -> None:
        """Sessions beyond the capacity wait in the queue instead of failing."""
        first, *_ = [await lab.sandboxes.create(spec(f"n{each}", f"s{each}")) for each in range(CAPACITY)]
        with pytest.raises(NoCapacity):
            await lab.peer.create(spec("late", "s-late"))
        assert await lab.sandboxes.get("late") is None
        await lab.sandboxes.delete(first.name, first.uid)

        async def admitted() -> Sandbox | None:
            try:
                return await lab.peer.create(spec("late", "s-late"))
            except NoCapacity:  # whoever counts may take a moment to notice
                return None

        assert (await until(admitted, "the room that was given back is there")).session == "s-late"

    async def test_warm_sandboxes_take_no_capacity(self, lab: Lab) -> None:
        """The pool never keeps a session out."""
        for each in range(CAPACITY):
            await lab.sandboxes.create(spec(f"w{each}"))
        assert (await lab.sandboxes.create(spec("one", "s-one"))).session == "s-one"

    async def test_ended_sandboxes_take_no_capacity(self, lab: Lab) -> None:
        """What has ended but is not cleaned up yet keeps no session out."""
        for each in range(CAPACITY):
            sandbox = await started(lab.sandboxes, f"n{each}", f"s{each}")
            await lab.kill(sandbox)
            await soon(lab.sandboxes.gone(sandbox.name, sandbox.uid))
        assert await lab.sandboxes.create(spec("one", "s-one"))

    async def test_claiming_gives_a_warm_sandbox_to_a_session(self, lab: Lab) -> None:
        """Everybody sees whose it is now."""
        warm = await started(lab.sandboxes, "warm")
        claimed = await lab.sandboxes.claim("warm", warm.uid, "s-one")
        assert (claimed.uid, claimed.session) == (warm.uid, "s-one")
        assert [sandbox.uid for sandbox in await lab.peer.find("s-one")] == [warm.uid]
        with pytest.raises(Conflict):
            await lab.peer.claim("warm", warm.uid, "s-two")

    async def test_one_of_several_claims_wins(self, lab: Lab) -> None:
        """Workers in different processes never share a warm sandbox between two sessions."""
        warm = await started(lab.sandboxes, "warm")
        winners = await lab.race_to_claim(warm, ["s-one", "s-two", "s-three"])
        assert len(winners) == 1
        found = await lab.sandboxes.get("warm")
        assert found is not None
        assert found.session == winners[0]

    async def test_claiming_what_is_gone_says_so(self, lab: Lab) -> None:
        """An older incarnation, an ended one and none at all are all no sandbox to claim."""
        warm = await started(lab.sandboxes, "warm")
        for name, uid in (("warm", "another"), ("none", warm.uid)):
            with pytest.raises(SandboxGone):
                await lab.sandboxes.claim(name, uid, "s-one")
        await lab.kill(warm)
        await soon(lab.sandboxes.gone("warm", warm.uid))
        with pytest.raises(SandboxGone):
            await lab.sandboxes.claim("warm", warm.uid, "s-one")

    async def test_a_session_is_found_by_its_own_name_only(self, lab: Lab) -> None:
        """Find and list are consistent with creates that have returned, here or elsewhere."""
        one = await lab.sandboxes.create(spec("one", "s-one"))
        two = await lab.peer.create(spec("two", "s-two"))
        await lab.peer.create(spec("warm"))
        assert [sandbox.uid for sandbox in await lab.peer.find("s-one")] == [one.uid]
        assert [sandbox.uid for sandbox in await lab.sandboxes.find("s-two")] == [two.uid]
        assert {sandbox.name for sandbox in await lab.sandboxes.list()} == {"one", "two", "warm"}

    async def test_a_second_client_can_connect(self, lab: Lab) -> None:
        """A worker takes over what another one started."""
        sandbox = await started(lab.sandboxes, "one", "s-one")
        assert await greeting(lab.peer, sandbox)

    async def test_a_sandbox_outlives_its_creator(self, lab: Lab) -> None:
        """A worker that is killed takes no session with it."""
        await lab.create_and_die(spec("one", "s-one"))
        (sandbox,) = await lab.sandboxes.find("s-one")
        await soon(lab.sandboxes.running(sandbox.name, sandbox.uid))
        assert await greeting(lab.sandboxes, sandbox)

    async def test_deleting_needs_the_right_uid(self, lab: Lab) -> None:
        """A late delete of an older incarnation does not touch the new one."""
        sandbox = await started(lab.sandboxes, "one", "s-one")
        await lab.sandboxes.delete("one", "another")
        assert await greeting(lab.peer, sandbox)

    async def test_nothing_is_left_after_delete(self, lab: Lab) -> None:
        """When delete returns, no process, directory or limit of the sandbox is there any more."""
        sandbox = await started(lab.sandboxes, "one", "s-one")
        traces = await lab.traces(sandbox)
        assert traces == await lab.still_there(traces)
        await lab.peer.delete("one", sandbox.uid)
        assert await lab.still_there(traces) == set()
        assert await lab.sandboxes.get("one") is None
        await lab.sandboxes.delete("one", sandbox.uid)

    async def test_a_sandbox_that_is_just_starting_can_be_deleted(self, lab: Lab) -> None:
        """A session that is closed at once leaves nothing, whatever stage its sandbox had reached."""
        for _ in range(5):
            sandbox = await lab.sandboxes.create(spec("one", "s-one"))
            await lab.peer.delete("one", sandbox.uid)
            assert await lab.sandboxes.list() == []

    async def test_a_name_can_be_used_again(self, lab: Lab) -> None:
        """A new incarnation has a new uid, and the old uid reaches nothing."""
        old = await started(lab.sandboxes, "one", "s-one")
        await lab.sandboxes.delete("one", old.uid)
        new = await started(lab.sandboxes, "one", "s-one")
        assert new.uid != old.uid
        with pytest.raises(SandboxGone):
            await lab.sandboxes.connect("one", old.uid)
        with pytest.raises(SandboxGone):
            await soon(lab.sandboxes.running("one", old.uid))

    async def test_gone_tells_of_a_kill_from_outside(self, lab: Lab) -> None:
        """A sandbox that vanishes is noticed by whoever waits, with a reason a person can read."""
        sandbox = await started(lab.sandboxes, "one", "s-one")
        waiting = asyncio.create_task(lab.peer.gone("one", sandbox.uid))
        await lab.kill(sandbox)
        ended = await soon(waiting)
        assert ended.phase is Phase.ENDED
        assert "killed from outside" in ended.reason
        with pytest.raises(SandboxGone):
            await lab.sandboxes.connect("one", sandbox.uid)

    async def test_an_ended_sandbox_is_remembered_until_it_is_deleted(self, lab: Lab) -> None:
        """The sweep can still read why it ended."""
        sandbox = await started(lab.sandboxes, "one", "s-one")
        await lab.kill(sandbox)
        ended = await soon(lab.sandboxes.gone("one", sandbox.uid))
        assert await lab.peer.get("one") == ended
        assert await lab.sandboxes.list() == [ended]

    async def test_gone_tells_of_a_delete(self, lab: Lab) -> None:
        """Whoever still waits for a sandbox that another worker removes is told."""
        sandbox = await started(lab.sandboxes, "one", "s-one")
        waiting = asyncio.create_task(lab.peer.gone("one", sandbox.uid))
        await asyncio.sleep(0)
        await lab.sandboxes.delete("one", sandbox.uid)
        ended = await soon(waiting)
        assert (ended.phase, ended.uid) == (Phase.ENDED, sandbox.uid)
        assert "deleted" in ended.reason
        assert (await soon(lab.peer.gone("one", sandbox.uid))).phase is Phase.ENDED

    async def test_a_lifetime_ends(self, lab: Lab) -> None:
        """No sandbox lives longer than it was given, with the reason told."""
        sandbox = await lab.sandboxes.create(spec("one", "s-one", lifetime_seconds=1))
        ended = await soon(lab.peer.gone("one", sandbox.uid))
        assert "lifetime" in ended.reason

    async def test_waiting_can_be_given_up(self, lab: Lab) -> None:
        """A cancelled wait leaves the sandbox as it was."""
        sandbox = await started(lab.sandboxes, "one", "s-one")
        waiting = asyncio.create_task(lab.sandboxes.gone("one", sandbox.uid))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await greeting(lab.sandboxes, sandbox)
