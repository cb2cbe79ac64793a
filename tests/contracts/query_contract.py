"""What every Store promises of its queries and listeners. The fixtures are those of store_contract.py."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from schemas.ports import Query, Store, Where
from tests.contracts.store_contract import NOON
from tests.contracts.waiting import listening, soon, take


async def found(store: Store, query: Query) -> list[str]:
    """The ids that a query finds."""
    return [snapshot.id for snapshot in await store.query(query)]


class QueryContract:
    """Declared queries, and listeners that start where they are told."""

    async def test_a_query_by_id_goes_page_by_page(self, store: Store) -> None:
        """`after` continues where the last page ended, in either direction."""
        for number in range(5):
            await store.create(f"sessions/s1/chunks/{number}", {})
        chunks = "sessions/s1/chunks"
        assert await found(store, Query(chunks, limit=2)) == ["0", "1"]
        assert await found(store, Query(chunks, limit=2, after="1")) == ["2", "3"]
        assert await found(store, Query(chunks, limit=2, after="3")) == ["4"]
        assert await found(store, Query(chunks, limit=2, after="4")) == []
        assert await found(store, Query(chunks, limit=3, descending=True)) == ["4", "3", "2"]
        assert await found(store, Query(chunks, limit=3, descending=True, after="2")) == ["1", "0"]

    async def test_a_query_looks_at_one_collection(self, store: Store) -> None:
        """Collections of the same name below other documents, and those below the results, do not show."""
        for path in ("sessions/s1/commands/a", "sessions/s2/commands/b", "sessions/s1"):
            await store.create(path, {"number": 1, "state": "waiting"})
        assert await found(store, Query("sessions/s1/commands", order_by="number")) == ["a"]
        assert await found(store, Query("sessions/s1/commands")) == ["a"]
        assert await found(store, Query("sessions")) == ["s1"]

    async def test_a_query_orders_and_filters(self, store: Store) -> None:
        """Equalities first, then an order with a range on it."""
        for number in range(10):
            state = "waiting" if number % 2 else "exited"
            await store.create(f"sessions/s1/commands/c{number}", {"number": number, "state": state})
        commands = "sessions/s1/commands"
        waiting = Where("state", "==", "waiting")
        assert await found(store, Query(commands, (waiting,), "number")) == ["c1", "c3", "c5", "c7", "c9"]
        assert await found(store, Query(commands, (waiting,), "number", limit=2)) == ["c1", "c3"]
        last = Query(commands, (waiting, Where("number", "<=", 7)), "number", descending=True, limit=2)
        assert await found(store, last) == ["c7", "c5"]
        middle = Query(commands, (Where("number", ">=", 4),), "number", limit=3)
        assert await found(store, middle) == ["c4", "c5", "c6"]

    async def test_a_query_follows_updates_and_deletions(self, store: Store) -> None:
        """The index is never behind the documents."""
        commands = "sessions/s1/commands"
        for number in range(3):
            await store.create(f"{commands}/c{number}", {"number": number, "state": "waiting"})
        await store.update(f"{commands}/c0", {"state": "running"})
        await store.update(f"{commands}/c1", {"number": 9})
        waiting = Query(commands, (Where("state", "==", "waiting"),), "number")
        assert await found(store, waiting) == ["c2", "c1"]
        await store.delete(f"{commands}/c2")
        assert await found(store, waiting) == ["c1"]

    async def test_documents_without_the_field_are_not_in_the_order(self, store: Store) -> None:
        """None and missing are left out."""
        await store.create("sessions/none", {"deadline": None})
        await store.create("sessions/missing", {})
        await store.create("sessions/there", {"deadline": NOON})
        assert await found(store, Query("sessions", order_by="deadline")) == ["there"]
        await store.update("sessions/there", {"deadline": None})
        assert await found(store, Query("sessions", order_by="deadline")) == []

    async def test_values_are_ordered_as_themselves(self, store: Store) -> None:
        """Numbers by size whether whole or not, times by moment, text by code point."""
        numbers = [-(2.0**60), -7, -0.5, 0, 1e-9, 3, 3.5, 2**53, 2**53 + 1, 2**62]
        moments = [NOON + timedelta(microseconds=offset) for offset in (-(10**15), -1, 0, 1, 10**15)]
        texts = ["", "A", "AA", "B", "a", "ä", "中", "🕊"]
        for index, value in enumerate([*numbers, *moments, *texts]):
            await store.create(f"sessions/v{(index * 7) % 23:02}", {"deadline": value})
        for values in (numbers, moments, texts):
            bounds = (Where("deadline", ">=", values[0]), Where("deadline", "<=", values[-1]))
            snapshots = await store.query(Query("sessions", bounds, "deadline"))
            assert [snapshot.data["deadline"] for snapshot in snapshots] == values

    @pytest.mark.parametrize(
        "query",
        [
            Query("sessions", order_by="podName"),
            Query("sessions", (Where("podUid", "==", "x"),)),
            Query("sessions", (Where("userId", "==", "u"),), "deadline"),
            Query("sessions", (Where("deadline", "<=", 1),), "createdAt"),
            Query("sessions", (Where("deadline", "<=", 1),)),
            Query("sessions", (Where("deadline", "==", 1), Where("deadline", "<=", 1)), "deadline"),
            Query("sessions", (Where("deadline", "==", 1), Where("deadline", "==", 2)), "deadline"),
            Query("sessions", order_by="deadline", after="s1"),
            Query("sessions", limit=0),
            Query("sessions/s1", order_by="deadline"),
        ],
    )
    async def test_an_undeclared_query_is_refused(self, store: Store, query: Query) -> None:
        """What would fail in the cloud for want of an index fails everywhere."""
        with pytest.raises(ValueError, match=r"."):
            await store.query(query)

    async def test_watch_shows_now_and_then_every_change(self, store: Store, peer: Store) -> None:
        """First the present state, also when there is none, then what others write."""
        async with listening(store.watch("sessions/s1")) as states:
            assert await soon(anext(states)) is None
            await peer.create("sessions/s1", {"state": "queued"})
            created = await soon(anext(states))
            await peer.update("sessions/s1", {"state": "ready"})
            updated = await soon(anext(states))
            await peer.delete("sessions/s1")
            assert await soon(anext(states)) is None
        assert created is not None
        assert updated is not None
        assert (created.data, updated.data) == ({"state": "queued"}, {"state": "ready"})

    async def test_watch_may_skip_but_never_the_latest(self, store: Store, peer: Store) -> None:
        """Who looks late sees the last state, and no state twice."""
        await store.create("sessions/s1", {"number": 0})
        async with listening(store.watch("sessions/s1")) as states:
            await soon(anext(states))
            for number in range(1, 21):
                await peer.update("sessions/s1", {"number": number})
            seen: list[int] = []
            while not seen or seen[-1] < 20:
                snapshot = await soon(anext(states))
                assert snapshot is not None
                seen.append(snapshot.data["number"])
        assert seen == sorted(set(seen))

    async def test_follow_reads_history_then_news(self, store: Store, peer: Store) -> None:
        """In the order of ids, from the one after the cursor, in batches of at most the limit."""
        for number in range(7):
            await store.create(f"sessions/s1/chunks/{number:04}", {"offset": number})
        async with listening(store.follow("sessions/s1/chunks", after="0001", limit=2)) as pages:
            seen: list[str] = []
            while len(seen) < 5:
                page = await soon(anext(pages))
                assert 1 <= len(page) <= 2
                seen += [snapshot.id for snapshot in page]
            for number in range(7, 10):
                await peer.create(f"sessions/s1/chunks/{number:04}", {"offset": number})
                seen += [snapshot.id for snapshot in await soon(anext(pages))]
        assert seen == [f"{number:04}" for number in range(2, 10)]

    async def test_follow_ignores_other_collections(self, store: Store) -> None:
        """A neighbour's chunk is never delivered."""
        async with listening(store.follow("sessions/s1/chunks")) as pages:
            waiting = asyncio.ensure_future(soon(anext(pages)))
            await store.create("sessions/s2/chunks/0000", {})
            await store.create("sessions/s1/chunksX/0000", {})
            await store.create("sessions/s1/chunks/0001", {})
            page = await waiting
        assert [snapshot.path for snapshot in page] == ["sessions/s1/chunks/0001"]

    async def test_listeners_hear_each_for_themselves(self, store: Store, peer: Store) -> None:
        """A listener that was closed takes nothing from another."""
        async with listening(peer.follow("sessions/s1/chunks")) as right:
            async with listening(store.follow("sessions/s1/chunks")) as left:
                await store.create("sessions/s1/chunks/0", {})
                assert [len(page) for page in await take(left, 1)] == [1]
            await store.create("sessions/s1/chunks/1", {})
            ids: list[str] = []
            while len(ids) < 2:
                ids += [snapshot.id for snapshot in await soon(anext(right))]
        assert ids == ["0", "1"]
