"""Bad days of the Firestore adapter: every call fails once, answers get lost, wires are cut, the emulator dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest

from infra.adapters import firestore_calls
from infra.adapters.firestore import FirestoreStore, firestore_store
from infra.emulators import FIRESTORE, EmulatorMissing, end, free_port, launch
from schemas.documents import INDEXES
from schemas.errors import AlreadyExists, Conflict, PigeonError, StoreUnavailable
from schemas.ports import Query, Snapshot, Transaction
from tests.contracts.waiting import listening, soon
from tests.emulators.faults import Faults, wire
from tests.emulators.fixtures import absent

Code = grpc.StatusCode
Call = Callable[[FirestoreStore], Awaitable[object]]
PASSING = [Code.UNAVAILABLE, Code.ABORTED, Code.DEADLINE_EXCEEDED]


async def count_up(transaction: Transaction) -> None:
    """One more in one document, and another one created."""
    snapshot = await transaction.get("users/u1")
    assert snapshot is not None
    transaction.update("users/u1", {"count": snapshot.data["count"] + 1})
    transaction.create("sessions/new", {})


async def update_expecting(store: FirestoreStore) -> str:
    """A compare-and-set."""
    snapshot = await store.get("users/u1")
    assert snapshot is not None
    return await store.update("users/u1", {"count": 2}, expect=snapshot.version)


REPEATABLE: dict[str, Call] = {
    "get": lambda store: store.get("users/u1"),
    "create": lambda store: store.create("sessions/s1", {"by": "me"}),
    "update expecting": update_expecting,
    "transact": lambda store: store.transact(count_up),
    "query": lambda store: store.query(Query("users")),
}
ONCE: dict[str, Call] = {
    "update": lambda store: store.update("users/u1", {"count": 2}),
    "delete": lambda store: store.delete("users/u1"),
}


@pytest.fixture
def faults() -> Faults:
    """None yet."""
    return Faults()


@pytest.fixture
async def store(firestore_host: str, project: str, faults: Faults) -> AsyncIterator[FirestoreStore]:
    """A client whose calls can fail, with one document."""
    opening = firestore_store(project, indexes=INDEXES, emulator=firestore_host, interceptors=faults.interceptors())
    async with opening as store:
        await store.create("users/u1", {"count": 1})
        yield store


async def count(store: FirestoreStore) -> object:
    """What the one document says."""
    snapshot = await store.get("users/u1")
    return snapshot and snapshot.data["count"]


@pytest.mark.parametrize("code", PASSING, ids=lambda code: code.name)
@pytest.mark.parametrize("name", REPEATABLE)
async def test_a_passing_fault_is_not_seen(
    store: FirestoreStore, faults: Faults, name: str, code: grpc.StatusCode
) -> None:
    """What can be tried again without harm is."""
    faults.before = [code, code]
    await REPEATABLE[name](store)
    assert not faults.before


@pytest.mark.parametrize("name", ONCE)
async def test_an_unconditional_write_is_not_repeated_blindly(store: FirestoreStore, faults: Faults, name: str) -> None:
    """It could undo what somebody wrote after a first try that did reach the store."""
    faults.before = [Code.UNAVAILABLE]
    with pytest.raises(StoreUnavailable):
        await ONCE[name](store)
    assert await count(store) == 1
    faults.before = [Code.ABORTED]  # says that nothing was written
    await ONCE[name](store)
    assert await count(store) != 1


@pytest.mark.parametrize("name", [*REPEATABLE, *ONCE])
async def test_grpc_errors_never_leak(
    store: FirestoreStore, faults: Faults, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever the status, the caller sees one of our errors, in bounded time."""
    monkeypatch.setattr(firestore_calls, "CALL_SECONDS", 0.05)
    for code in set(Code) - {Code.OK}:
        faults.before = [code] * 100
        with pytest.raises(PigeonError) as caught:
            await soon((REPEATABLE | ONCE)[name](store))
        assert isinstance(caught.value.__cause__, grpc.aio.AioRpcError | PigeonError)


async def test_a_create_whose_answer_was_lost_is_not_said_to_be_anothers(store: FirestoreStore, faults: Faults) -> None:
    """The second try finds the document: nobody can tell whose, so it is StoreUnavailable, and never AlreadyExists."""
    faults.after = [Code.UNAVAILABLE]
    with pytest.raises(StoreUnavailable, match="may have been made"):
        await store.create("sessions/s1", {"by": "me"})
    with pytest.raises(AlreadyExists):
        await store.create("sessions/s1", {"by": "me"})
    snapshot = await store.get("sessions/s1")
    assert snapshot is not None
    assert snapshot.data == {"by": "me"}


async def test_a_compare_and_set_whose_answer_was_lost_happened_once(store: FirestoreStore, faults: Faults) -> None:
    """Its own write is no conflict."""
    before = await store.get("users/u1")
    assert before is not None
    faults.after = [Code.DEADLINE_EXCEEDED]
    with pytest.raises(StoreUnavailable):
        await store.update("users/u1", {"count": 2}, expect=before.version)
    assert await count(store) == 2
    with pytest.raises(Conflict):
        await store.update("users/u1", {"count": 3}, expect=before.version)


async def test_a_transaction_whose_answer_was_lost_happened_once(store: FirestoreStore, faults: Faults) -> None:
    """It does not run again upon its own result."""
    faults.after = [Code.UNAVAILABLE]
    with pytest.raises(StoreUnavailable):
        await store.transact(count_up)
    assert await count(store) == 2


async def test_an_outage_ends_in_bounded_time(
    store: FirestoreStore, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody waits for the answer: a handful of tries, then StoreUnavailable."""
    monkeypatch.setattr(firestore_calls, "CALL_SECONDS", 0.3)
    faults.calls = 0
    faults.before = [Code.UNAVAILABLE] * 100
    with pytest.raises(StoreUnavailable):
        await soon(store.create("sessions/s1", {}), 5)
    assert 2 <= faults.calls <= 6


async def test_a_closed_client_is_unavailable(firestore_host: str, project: str) -> None:
    """Also what comes late while a process ends sees one of our errors."""
    async with firestore_store(project, indexes=INDEXES, emulator=firestore_host) as store:
        await store.get("users/u1")
    with pytest.raises(StoreUnavailable):
        await store.get("users/u1")


async def test_listeners_outlast_cut_wires(firestore_host: str, project: str) -> None:
    """Under load, with the connection gone again and again: nothing lost, nothing twice, in order."""
    chunks = [f"{number:04}" for number in range(60)]
    async with (
        firestore_store(project, indexes=INDEXES, emulator=firestore_host) as writer,
        wire(firestore_host) as (line, near),
        firestore_store(project, indexes=INDEXES, emulator=near) as reader,
        listening(reader.follow("sessions/s1/chunks", limit=4)) as batches,
        listening(reader.watch("sessions/s1")) as states,
    ):
        await writer.create("sessions/s1", {"offset": -1})
        assert await soon(anext(states)) is not None
        seen: list[str] = []
        for number, name in enumerate(chunks):
            await writer.create(f"sessions/s1/chunks/{name}", {"offset": number})
            if number % 10 == 5:
                line.cut()
            while number % 3 == 2 and seen[-1:] != [name]:
                seen += [snapshot.id for snapshot in await soon(anext(batches))]
        await writer.update("sessions/s1", {"offset": 60})
        latest = await soon(anext(states))
    assert seen == chunks
    assert line.cuts > 5
    assert latest is not None
    assert latest.data == {"offset": 60}


@pytest.mark.slow
async def test_an_emulator_killed_and_started_again(project: str) -> None:
    """It forgets its documents; calls and listeners go on with the new one, each chunk once."""
    port = free_port()
    try:
        keeper, log = await launch(FIRESTORE, port)
    except EmulatorMissing as error:
        absent(error)
    opening = firestore_store(project, indexes=INDEXES, emulator=f"127.0.0.1:{port}")
    try:
        async with opening as store, listening(store.follow("sessions/s1/chunks")) as batches:
            seen = await _write_and_read(store, batches, range(5))
            await end(keeper)
            log.close()
            keeper, log = await launch(FIRESTORE, port)
            seen += await _write_and_read(store, batches, range(5, 10))
        assert seen == [f"{number:04}" for number in range(10)]
    finally:
        await end(keeper)
        log.close()


async def _write_and_read(store: FirestoreStore, batches: AsyncIterator[list[Snapshot]], numbers: range) -> list[str]:
    for number in numbers:
        await _insist(store, f"sessions/s1/chunks/{number:04}")
    seen: list[str] = []
    while len(seen) < len(numbers):
        seen += [snapshot.id for snapshot in await soon(anext(batches), 40)]
    return seen


async def _insist(store: FirestoreStore, path: str) -> None:
    """Create as the pump does: until it is there."""
    async with asyncio.timeout(60):
        while True:
            try:
                await store.create(path, {})
            except StoreUnavailable:
                continue
            except AlreadyExists:
                pass
            return


async def test_many_listeners_do_not_starve_calls(
    firestore_host: str, project: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection takes so many streams; listeners open more connections, and calls have one of their own."""
    monkeypatch.setattr(firestore_calls, "LISTENERS_PER_CHANNEL", 2)
    async with firestore_store(project, indexes=INDEXES, emulator=firestore_host) as store:
        watches = [store.watch(f"sessions/s{number}") for number in range(5)]
        try:
            assert await asyncio.gather(*(soon(anext(states)) for states in watches)) == [None] * 5
            await store.create("sessions/s4", {})
            assert await soon(anext(watches[4])) is not None
        finally:
            for states in watches:
                await states.aclose()  # type: ignore[attr-defined]
