"""Sessions under other settings than the default."""

from __future__ import annotations

import pytest

from tests.journeys.conftest import MakeStack
from tests.journeys.stack import User
from tests.waiting import until

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("PIGEON_UNSAFE_NO_SANDBOX", "1", b"WARNING: no sandbox here."),
        ("PIGEON_NETWORK", "host", b"This session shares the network of its host."),
    ],
)
async def test_less_isolation_is_the_first_line_of_a_session(
    make_stack: MakeStack, variable: str, value: str, words: bytes
) -> None:
    """Nobody types into such a session without having been told; the operator is told at start."""
    stack = make_stack(**{variable: value})
    await stack.start()
    assert f"WARNING: {variable}" in stack.log()
    async with stack.user() as alice:
        session = await alice.ready()
        seen = await alice.until_output(session, b"$ ")
        assert seen.startswith(words)
        assert (await alice.run(session, "echo on"))[1] == b"on\r\n"


async def test_a_flood_past_the_budget_is_given_up_with_a_mark(make_stack: MakeStack) -> None:
    """The transcript says how many bytes it does not hold; Ctrl-C works at once; the shell goes on."""
    stack = make_stack(PIGEON_LIMITS=f'{{"output_bytes": {MIB}}}')
    await stack.start()
    async with stack.user() as alice:
        session = await alice.ready()
        command = await alice.execute(session, "yes")
        await alice.until_output(session, b"y\r\n" * 10_000)
        await alice.call("POST", "signal", json={"sessionId": session, "signal": "INT"})
        record = await alice.ended(session, command)
        assert record["exitCode"] == 130
        await alice.call("DELETE", f"cleanup-session/{session}")
        output = await alice.transcript(session)
        assert len(output.data) <= 2 * MIB
        assert output.end is not None
        assert output.end["finalOffset"] == output.offset == len(output.data) + sum(g["length"] for g in output.gaps)
        assert record["endOffset"] <= output.offset


async def test_a_user_has_a_limit_of_sessions(make_stack: MakeStack) -> None:
    """429 with Retry-After, and a place again as soon as one is closed; others are not concerned."""
    stack = make_stack(PIGEON_LIMITS='{"sessions_per_user": 1}')
    await stack.start()
    async with stack.user("alice") as alice, stack.user("bob") as bob:
        session = await alice.ready()
        problem = await alice.call("POST", "create-session", expect=429, json={})
        assert problem["code"] == "limit_reached"
        await bob.ready()
        await alice.call("DELETE", f"cleanup-session/{session}")
        await alice.transcript(session)
        await alice.ready()


async def test_a_full_house_shows_the_place_in_the_queue(make_stack: MakeStack) -> None:
    """Waiting, second, first, ready: without a refusal and without asking again."""
    stack = make_stack(PIGEON_LIMITS='{"capacity": 1, "pool_size": 0}', PIGEON_TICK_SECONDS="0.2")
    await stack.start()
    async with stack.user("alice") as alice, stack.user("bob") as bob, stack.user("carol") as carol:
        first = await alice.ready()
        second = await _queued(bob, 1)
        third = await _queued(carol, 2)
        await alice.call("DELETE", f"cleanup-session/{first}")
        await bob.until(second, lambda status: status["state"] == "ready")
        await carol.until(third, lambda status: status["position"] == 1)


async def _queued(user: User, place: int) -> str:
    session = await user.create()
    await user.until(session, lambda status: status["state"] == "queued" and status["position"] == place)
    return session


async def test_the_start_says_what_isolates_sessions(make_stack: MakeStack) -> None:
    """An operator sees what protects the machine."""
    stack = make_stack()
    await stack.start()

    async def said() -> bool:
        return "Isolation: bubblewrap" in stack.log()

    await until(said, "the start says what isolates sessions")
