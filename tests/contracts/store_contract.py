"""What every Store promises, whatever it is made of.

Reading and writing here; queries and listeners in query_contract.py. A test module inherits the classes and gives two
fixtures: `store`, empty at the start, and `peer`, another client of the same documents.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from schemas.errors import AlreadyExists, Conflict, NotFound, TooLarge
from schemas.limits import MAX_DOCUMENT_BYTES, MIB
from schemas.ports import Store, Transaction

NOON = datetime(2026, 3, 1, 12, 0, 0, 123_457, tzinfo=UTC)

EVERYTHING: dict[str, Any] = {
    "none": None,
    "yes": True,
    "no": False,
    "small": -1,
    "large": 2**63 - 1,
    "least": -(2**63),
    "fraction": 0.1,
    "text": "grüße 🕊",
    "empty": "",
    "raw": bytes(range(256)),
    "at": NOON,
    "long ago": datetime(1901, 12, 13, 20, 45, 51, 999_999, tzinfo=UTC),
    "list": [1, "two", b"three", None, {"four": 4.5}],
    "map": {"a": {"b": [NOON]}},
}


async def increment(store: Store, path: str) -> None:
    """Add one to the document's count, in a transaction, however often that takes."""

    async def work(transaction: Transaction) -> None:
        snapshot = await transaction.get(path)
        assert snapshot is not None
        transaction.update(path, {"count": snapshot.data["count"] + 1})

    while True:
        try:
            return await store.transact(work)
        except Conflict:
            continue


class StoreContract:
    """Documents with preconditions, transactions, queries and listeners."""

    async def test_a_created_document_reads_back_exactly(self, store: Store) -> None:
        """Every kind of value survives, times to the microsecond."""
        version = await store.create("sessions/s1", EVERYTHING)
        snapshot = await store.get("sessions/s1")
        assert snapshot is not None
        assert snapshot.data == EVERYTHING
        assert (snapshot.path, snapshot.id, snapshot.version) == ("sessions/s1", "s1", version)
        kinds = {name: type(value) for name, value in snapshot.data.items()}
        assert kinds == {name: type(value) for name, value in EVERYTHING.items()}

    async def test_a_time_in_another_zone_is_the_same_moment(self, store: Store) -> None:
        """Times come back in UTC."""
        await store.create("sessions/s1", {"at": NOON.astimezone(timezone(timedelta(hours=5, minutes=30)))})
        snapshot = await store.get("sessions/s1")
        assert snapshot is not None
        assert snapshot.data["at"] == NOON
        assert snapshot.data["at"].utcoffset() == timedelta(0)

    async def test_a_missing_document_is_none(self, store: Store) -> None:
        """Reading what is not there is no error."""
        assert await store.get("sessions/missing") is None

    async def test_create_refuses_to_overwrite(self, store: Store) -> None:
        """The first writer wins; its document stays as it was."""
        await store.create("sessions/s1", {"by": "first"})
        with pytest.raises(AlreadyExists):
            await store.create("sessions/s1", {"by": "second"})
        snapshot = await store.get("sessions/s1")
        assert snapshot is not None
        assert snapshot.data == {"by": "first"}

    async def test_of_many_creators_one_wins(self, store: Store, peer: Store) -> None:
        """Create is atomic between clients."""

        async def try_to_create(client: Store, number: int) -> bool:
            try:
                await client.create("sessions/s1", {"by": number})
            except AlreadyExists:
                return False
            return True

        clients = [store, peer] * 5
        won = await asyncio.gather(*(try_to_create(client, number) for number, client in enumerate(clients)))
        assert won.count(True) == 1
        snapshot = await store.get("sessions/s1")
        assert snapshot is not None
        assert snapshot.data == {"by": won.index(True)}

    async def test_a_write_is_seen_by_every_later_read(self, store: Store, peer: Store) -> None:
        """Another client reads what a finished write wrote."""
        for number in range(10):
            await store.create(f"sessions/s{number}", {"number": number})
            snapshot = await peer.get(f"sessions/s{number}")
            assert snapshot is not None
            assert snapshot.data == {"number": number}

    async def test_update_replaces_top_level_fields_only(self, store: Store) -> None:
        """Fields that are not named stay; a map that is named is replaced whole."""
        await store.create("sessions/s1", {"keep": 1, "change": 2, "map": {"old": True}, "a.b": 1})
        version = await store.update("sessions/s1", {"change": 3, "map": {"new": True}, "more": b"x", "a.b": 2})
        snapshot = await store.get("sessions/s1")
        assert snapshot is not None
        assert snapshot.data == {"keep": 1, "change": 3, "map": {"new": True}, "more": b"x", "a.b": 2}
        assert snapshot.version == version

    async def test_update_needs_a_document(self, store: Store) -> None:
        """Nothing is created by accident."""
        with pytest.raises(NotFound):
            await store.update("sessions/s1", {"state": "ready"})
        assert await store.get("sessions/s1") is None

    async def test_update_with_the_current_version_succeeds(self, store: Store) -> None:
        """A compare-and-set that nobody disturbed goes through, again and again."""
        version = await store.create("sessions/s1", {"epoch": 0})
        for epoch in range(1, 5):
            version = await store.update("sessions/s1", {"epoch": epoch}, expect=version)
        snapshot = await store.get("sessions/s1")
        assert snapshot is not None
        assert (snapshot.data, snapshot.version) == ({"epoch": 4}, version)

    async def test_update_with_an_old_version_is_a_conflict(self, store: Store, peer: Store) -> None:
        """Who read before somebody else wrote changes nothing, even when the same fields were written."""
        old = await store.create("sessions/s1", {"epoch": 1})
        await peer.update("sessions/s1", {"epoch": 1})
        with pytest.raises(Conflict):
            await store.update("sessions/s1", {"epoch": 2}, expect=old)
        snapshot = await store.get("sessions/s1")
        assert snapshot is not None
        assert snapshot.data == {"epoch": 1}

    async def test_of_many_compare_and_sets_one_wins(self, store: Store, peer: Store) -> None:
        """Two tenders that read the same version never both take the next epoch."""
        version = await store.create("sessions/s1", {"epoch": 0})
        clients = [store, peer] * 4
        results = await asyncio.gather(
            *(client.update("sessions/s1", {"epoch": 1}, expect=version) for client in clients),
            return_exceptions=True,
        )
        assert sum(isinstance(result, str) for result in results) == 1
        assert sum(isinstance(result, Conflict) for result in results) == len(clients) - 1

    async def test_delete_removes_and_forgives(self, store: Store) -> None:
        """Deleting twice is as good as once, and the name is free again under a new version."""
        first = await store.create("sessions/s1", {})
        await store.delete("sessions/s1")
        await store.delete("sessions/s1")
        assert await store.get("sessions/s1") is None
        assert await store.create("sessions/s1", {}) != first

    async def test_a_documents_children_are_their_own(self, store: Store) -> None:
        """Deleting a document leaves the collections below it."""
        await store.create("sessions/s1", {})
        await store.create("sessions/s1/chunks/0", {"offset": 0})
        await store.delete("sessions/s1")
        assert await store.get("sessions/s1/chunks/0") is not None

    @pytest.mark.parametrize(
        "path", ["", "sessions", "sessions/", "/s1", "sessions//chunks/1", "sessions/s1/chunks", "sessions/..", "a/b/"]
    )
    async def test_a_bad_path_is_refused(self, store: Store, path: str) -> None:
        """A document's path has an even number of segments, none of them empty."""
        with pytest.raises(ValueError, match=r"."):
            await store.create(path, {})
        with pytest.raises(ValueError, match=r"."):
            await store.get(path)

    async def test_an_id_may_be_1500_bytes_long(self, store: Store) -> None:
        """Counted in UTF-8; one byte more is refused."""
        await store.create("sessions/" + "ä" * 750, {})
        with pytest.raises(ValueError, match=r"."):
            await store.create("sessions/" + "ä" * 750 + "x", {})

    @pytest.mark.parametrize(
        "value", [datetime(2026, 1, 1), {1: "x"}, object(), {"a", "b"}, (1, 2), [[1]], 1j, bytearray(b"x")]
    )
    async def test_a_value_without_a_kind_is_refused(self, store: Store, value: Any) -> None:
        """What a document cannot hold is a TypeError at once, and nothing is written."""
        with pytest.raises(TypeError):
            await store.create("sessions/s1", {"value": value})
        assert await store.get("sessions/s1") is None

    async def test_an_integer_beyond_64_bits_is_refused(self, store: Store) -> None:
        """Nothing is rounded silently."""
        with pytest.raises(ValueError, match=r"."):
            await store.create("sessions/s1", {"value": 2**63})

    async def test_a_document_over_the_limit_is_refused(self, store: Store) -> None:
        """Neither a create nor an update makes a document larger than Firestore takes."""
        with pytest.raises(TooLarge):
            await store.create("sessions/s1", {"data": bytes(MAX_DOCUMENT_BYTES)})
        assert await store.get("sessions/s1") is None
        await store.create("sessions/s1", {"data": bytes(MAX_DOCUMENT_BYTES - 200)})
        with pytest.raises(TooLarge):
            await store.update("sessions/s1", {"more": bytes(200)})
        snapshot = await store.get("sessions/s1")
        assert snapshot is not None
        assert list(snapshot.data) == ["data"]

    async def test_a_transaction_commits_everything(self, store: Store) -> None:
        """Creates, updates and deletions of several documents become visible together; the result comes back."""
        await store.create("users/u1", {"live": 1})
        await store.create("sessions/old", {})

        async def work(transaction: Transaction) -> str:
            user = await transaction.get("users/u1")
            assert user is not None
            assert await transaction.get("sessions/new") is None
            transaction.create("sessions/new", {"userId": "u1"})
            transaction.update("users/u1", {"live": user.data["live"] + 1})
            transaction.delete("sessions/old")
            return "done"

        assert await store.transact(work) == "done"
        user, new = await store.get("users/u1"), await store.get("sessions/new")
        assert user is not None
        assert new is not None
        assert (user.data, new.data) == ({"live": 2}, {"userId": "u1"})
        assert await store.get("sessions/old") is None

    async def test_a_transaction_that_raises_commits_nothing(self, store: Store) -> None:
        """The work's own exception comes out."""

        async def work(transaction: Transaction) -> None:
            transaction.create("sessions/s1", {})
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await store.transact(work)
        assert await store.get("sessions/s1") is None

    async def test_a_transaction_whose_write_fails_commits_nothing(self, store: Store) -> None:
        """AlreadyExists and NotFound of one write undo the others."""
        await store.create("sessions/s1", {})

        async def create_twice(transaction: Transaction) -> None:
            transaction.create("sessions/s2", {})
            transaction.create("sessions/s1", {})

        async def update_missing(transaction: Transaction) -> None:
            transaction.create("sessions/s2", {})
            transaction.update("sessions/s3", {})

        with pytest.raises(AlreadyExists):
            await store.transact(create_twice)
        with pytest.raises(NotFound):
            await store.transact(update_missing)
        assert await store.get("sessions/s2") is None

    async def test_a_transaction_reads_before_it_writes(self, store: Store) -> None:
        """A read after a write is a mistake in the program, also where it would be harmless."""

        async def work(transaction: Transaction) -> None:
            transaction.create("sessions/s1", {})
            await transaction.get("sessions/s2")

        with pytest.raises(RuntimeError):
            await store.transact(work)
        assert await store.get("sessions/s1") is None

    async def test_a_commit_over_the_limit_is_refused(self, store: Store) -> None:
        """Eleven documents of a mebibyte are too much for one transaction."""

        async def work(transaction: Transaction) -> None:
            for number in range(11):
                transaction.create(f"sessions/s{number}", {"data": bytes(MIB - 200)})

        with pytest.raises(TooLarge):
            await store.transact(work)
        assert await store.get("sessions/s0") is None

    async def test_a_counter_in_transactions_is_exact(self, store: Store, peer: Store) -> None:
        """No increment is lost between racing clients."""
        await store.create("users/u1", {"count": 0})
        await asyncio.gather(*(increment(client, "users/u1") for client in [store, peer] * 5))
        snapshot = await store.get("users/u1")
        assert snapshot is not None
        assert snapshot.data == {"count": 10}

    async def test_transactions_are_serialisable(self, store: Store, peer: Store) -> None:
        """Of two that each read both documents and write one, the second sees what the first did."""
        await store.create("users/a", {"live": True})
        await store.create("users/b", {"live": True})

        async def leave(client: Store, name: str) -> None:
            async def work(transaction: Transaction) -> None:
                people = [await transaction.get(f"users/{who}") for who in "ab"]
                if all(person is not None and person.data["live"] for person in people):
                    transaction.update(f"users/{name}", {"live": False})

            await client.transact(work)

        await asyncio.gather(leave(store, "a"), leave(peer, "b"))
        people = [await store.get(f"users/{who}") for who in "ab"]
        assert sum(person is not None and person.data["live"] for person in people) == 1
