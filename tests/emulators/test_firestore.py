"""What the Firestore adapter does beyond the contract, and where the emulator is not the cloud (docs/emulators.md)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest

from infra.adapters.firebase_token import unsigned
from infra.adapters.firestore import LISTENED, FirestoreStore, firestore_store
from infra.adapters.firestore_calls import Calls, ListenRequest, ListenResponse, received
from infra.adapters.firestore_listen import View
from infra.adapters.firestore_queries import newest_target
from infra.adapters.firestore_values import HIDDEN, Database
from infra.clock import ServiceClock, SystemClock
from infra.emulators import FIRESTORE
from schemas.documents import INDEXES
from schemas.errors import NotFound, StoreUnavailable, TooLarge
from schemas.limits import MIB
from schemas.ports import Query, Transaction, Where
from tests.contracts.waiting import listening, soon
from tests.emulators.machinery import machine
from tests.emulators.users import Caller, id_token, load_rules

OWNER = (("authorization", "Bearer owner"),)


@pytest.fixture
async def store(firestore_host: str, project: str) -> AsyncIterator[FirestoreStore]:
    """A client."""
    async with firestore_store(project, indexes=INDEXES, emulator=firestore_host) as store:
        yield store


async def test_a_flood_is_followed_to_its_end(store: FirestoreStore) -> None:
    """More new documents than a listener sees: nothing is left out."""
    async with listening(store.follow("sessions/s1/chunks", limit=5)) as batches:
        seen: list[str] = []
        for burst in range(3):
            names = [f"{burst}{number:03}" for number in range(3 * LISTENED)]
            for name in names:
                await store.create(f"sessions/s1/chunks/{name}", {})
            while seen[-1:] != names[-1:]:
                seen += [snapshot.id for snapshot in await soon(anext(batches))]
    assert seen == [f"{burst}{number:03}" for burst in range(3) for number in range(3 * LISTENED)]


async def test_the_stores_own_fields_are_its_own(store: FirestoreStore) -> None:
    """Nobody reads them, and nobody writes them by accident."""
    await store.create("sessions/s1", {"a": 1})
    await store.update("sessions/s1", {"b": 2})
    snapshot = await store.get("sessions/s1")
    assert snapshot is not None
    assert snapshot.data == {"a": 1, "b": 2}
    for name in HIDDEN:
        with pytest.raises(ValueError, match=name):
            await store.create("sessions/s2", {name: 1})


async def test_a_version_of_what_is_gone_is_not_found(store: FirestoreStore) -> None:
    """The emulator calls it a failed precondition, the cloud does not."""
    version = await store.create("sessions/s1", {})
    await store.delete("sessions/s1")
    with pytest.raises(NotFound):
        await store.update("sessions/s1", {}, expect=version)


async def test_what_was_only_read_holds_at_the_commit(store: FirestoreStore) -> None:
    """A transaction that read a document, or that there was none, runs again when that is no longer so."""
    await store.create("users/there", {"count": 0})
    runs: list[tuple[Any, bool]] = []

    async def work(transaction: Transaction) -> None:
        there = await transaction.get("users/there")
        missing = await transaction.get("users/missing")
        assert there is not None
        runs.append((there.data["count"], missing is None))
        if len(runs) == 1:
            await store.update("users/there", {"count": 1})
        elif len(runs) == 2:
            await store.create("users/missing", {})
        transaction.create("users/new", {})

    await store.transact(work)
    assert runs == [(0, True), (1, True), (1, False)]


async def test_a_decision_is_made_on_what_was_there_at_one_time(store: FirestoreStore) -> None:
    """An exception out of a transaction counts only if its reads belong together."""
    await store.create("users/a", {"count": 0})
    await store.create("users/b", {"count": 0})
    runs = 0

    async def work(transaction: Transaction) -> None:
        nonlocal runs
        runs += 1
        first = await transaction.get("users/a")
        if runs == 1:
            await store.update("users/a", {"count": 1})
            await store.update("users/b", {"count": 1})
        second = await transaction.get("users/b")
        assert first is not None
        assert second is not None
        if first.data["count"] != second.data["count"]:
            raise ZeroDivisionError

    await store.transact(work)
    assert runs == 2


async def test_closing_a_client_cancels_nobody(firestore_host: str, project: str) -> None:
    """Who still listens or waits sees StoreUnavailable, and no cancellation that nobody asked for."""
    async with firestore_store(project, indexes=INDEXES, emulator=firestore_host) as store:
        states = store.watch("sessions/s1")
        assert await soon(anext(states)) is None
        listening = asyncio.ensure_future(anext(states))
        reading = asyncio.ensure_future(store.get("sessions/s1"))
        await asyncio.sleep(0)
    for waiting in (listening, reading):
        with pytest.raises(StoreUnavailable):
            await soon(waiting)


def test_a_view_is_complete_when_the_server_says_so() -> None:
    """Between a reset and the next consistent moment nothing is shown; a target that is taken away is an outage."""
    view = View(7)
    change = ListenResponse(document_change={"document": {"name": "n"}, "target_ids": [7]})
    current = ListenResponse(target_change={"target_change_type": "CURRENT", "target_ids": [7]})
    consistent = ListenResponse(target_change={"read_time": {"seconds": 1}})
    reset = ListenResponse(target_change={"target_change_type": "RESET", "target_ids": [7]})
    assert [view.feed(message) for message in (consistent, change, consistent, current, consistent)] == [False] * 4 + [
        True
    ]
    assert list(view.documents) == ["n"]
    assert [view.feed(message) for message in (reset, consistent)] == [False, False]
    assert not view.documents
    other = ListenResponse(target_change={"target_change_type": "REMOVE", "target_ids": [6]})
    assert not view.feed(other)
    with pytest.raises(StoreUnavailable):
        view.feed(ListenResponse(target_change={"target_change_type": "REMOVE", "target_ids": [7]}))


class TestTheEmulator:
    """Each of these fails when a newer emulator is closer to the cloud; then docs/emulators.md changes too."""

    async def test_needs_no_composite_index(self, firestore_host: str, project: str) -> None:
        """In the cloud an index has to be deployed first."""
        indexes = {"sessions": (("never", "deployed"),)}
        async with firestore_store(project, indexes=indexes, emulator=firestore_host) as store:
            await store.create("sessions/s1", {"never": 1, "deployed": 2})
            found = await store.query(Query("sessions", (Where("never", "==", 1),), "deployed"))
        assert [snapshot.id for snapshot in found] == ["s1"]

    async def test_keeps_what_has_expired(self, store: FirestoreStore) -> None:
        """The cloud removes it within a day or so."""
        await store.create("sessions/s1", {"expireAt": datetime.now(UTC) - timedelta(days=2)})
        assert await store.get("sessions/s1") is not None

    async def test_takes_four_mebibytes_a_commit(self, store: FirestoreStore) -> None:
        """The cloud takes ten; here a larger commit is TooLarge already."""

        async def work(transaction: Transaction) -> None:
            for number in range(5):
                transaction.create(f"sessions/s{number}", {"data": bytes(MIB - 200)})

        with pytest.raises(TooLarge, match="4194304"):
            await store.transact(work)

    async def test_sends_a_listeners_whole_result_again(
        self, store: FirestoreStore, firestore_host: str, project: str
    ) -> None:
        """The cloud sends what has changed; so our listeners see only the newest few."""
        database = Database(project)
        metadata = (*OWNER, ("google-cloud-resource-prefix", database.name))
        calls = Calls(lambda: grpc.aio.insecure_channel(firestore_host), metadata, ServiceClock(SystemClock()))

        async def sent(chunks: str) -> tuple[int, int]:
            """How many documents come until the first chunk has: alone, and when another was written."""
            await store.create(f"{chunks}/0", {})
            async with calls.listen() as call:
                request = ListenRequest(database=database.name)
                request.add_target.target_id = 1
                newest_target(database, chunks, "", 9, request.add_target)
                await call.write(request)
                alone = await _sent(call, f"documents/{chunks}/0")
                await store.create(f"{chunks}/1", {})
                return alone, await _sent(call, f"documents/{chunks}/0")

        seen = None
        for attempt in range(5):
            with suppress(grpc.aio.AioRpcError):  # now and then an answer is garbled
                seen = seen or await sent(f"sessions/s{attempt}/chunks")
        assert seen == (1, 2)
        await calls.close()

    async def test_has_no_descending_order_by_name(self, firestore_host: str, project: str) -> None:
        """Nor has the cloud without an index of its own: hence our field documentId."""
        order = {"field": {"fieldPath": "__name__"}, "direction": "DESCENDING"}
        query = {"structuredQuery": {"from": [{"collectionId": "sessions"}], "orderBy": [order]}}
        url = f"http://{firestore_host}/v1/projects/{project}/databases/(default)/documents:runQuery"
        async with httpx.AsyncClient(trust_env=False, timeout=30, headers=dict(OWNER)) as client:
            answer = await client.post(url, json=query)
        assert answer.status_code == 400
        assert "descending key scans" in answer.text

    async def test_misses_a_version_where_there_is_no_document(self, firestore_host: str, project: str) -> None:
        """The cloud says NOT_FOUND; hence one more read in the adapter."""
        async with rest(firestore_host, project, dict(OWNER)) as client:
            name = f"projects/{project}/databases/(default)/documents/sessions/none"
            version = {"updateTime": "2026-01-01T00:00:00Z"}
            writes = [{"update": {"name": name, "fields": {}}, "currentDocument": version}]
            answer = await client.post("/documents:commit", json={"writes": writes})
        assert answer.json()["error"]["status"] == "FAILED_PRECONDITION"

    async def test_believes_every_token(self, store: FirestoreStore, firestore_host: str, project: str) -> None:
        """No signature, another's audience, and a year late; Firebase would take none of it."""
        await store.create("sessions/s1", {"userId": "alice"})
        token = unsigned({"aud": "another", "iss": "nobody", "sub": "alice", "user_id": "alice", "iat": 1, "exp": 2})
        async with httpx.AsyncClient(base_url=f"http://{firestore_host}", trust_env=False, timeout=30) as client:
            await load_rules(client, project)
            assert await Caller(client, project, token).get("sessions/s1")
            assert not await Caller(client, project, None).get("sessions/s1")

    @pytest.mark.slow
    async def test_starts_with_broken_rules(self, tmp_path: Path, project: str) -> None:
        """And then refuses users with 400; the cloud refuses the rules."""
        broken = tmp_path / "broken.rules"
        broken.write_text("service cloud.firestore { match /nonsense")
        user = {"authorization": f"Bearer {id_token(project, 'alice')}"}
        async with machine(FIRESTORE, broken) as own, rest(own.host, project, user) as client:
            assert (await client.get("/documents/sessions/s1")).status_code == 400


def rest(host: str, project: str, headers: dict[str, str]) -> httpx.AsyncClient:
    """The database's REST door."""
    url = f"http://{host}/v1/projects/{project}/databases/(default)"
    return httpx.AsyncClient(base_url=url, trust_env=False, timeout=30, headers=headers)


async def _sent(call: grpc.aio.StreamStreamCall, last: str) -> int:
    """How many documents come until that one has. Raises grpc.aio.AioRpcError."""
    count = 0
    while True:
        response = received(await soon(call.read()))
        if response.HasField("document_change"):
            count += 1
            if response.document_change.document.name.endswith(last):
                return count
