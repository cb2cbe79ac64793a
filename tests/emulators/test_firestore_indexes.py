"""What is deployed beside the program is what the program declares."""

from __future__ import annotations

from typing import Any

from infra.firestore.indexes import FILE, index_file, text
from schemas.documents import INDEXES

MAX_EXEMPTIONS = 200  # of a database; Firestore


def test_the_index_file_is_the_declared_one() -> None:
    """Whoever declares an index writes the file anew: python -m infra.firestore.indexes."""
    assert FILE.read_text() == text()


def test_every_declared_index_is_there_in_both_directions() -> None:
    """A query that was checked against the declaration has its index in the cloud."""
    composite = {
        (index["collectionGroup"], tuple(field["fieldPath"] for field in index["fields"]), index["fields"][-1]["order"])
        for index in index_file()["indexes"]
    }
    single = {(field["collectionGroup"], field["fieldPath"], len(field["indexes"])) for field in overrides()}
    for collection, declared in INDEXES.items():
        for fields in declared:
            if len(fields) == 1:
                assert (collection, fields[0], 2) in single
            else:
                assert {(collection, fields, "ASCENDING"), (collection, fields, "DESCENDING")} <= composite


def test_output_is_not_indexed() -> None:
    """Bytes and times of chunks cost a write, and no index entries."""
    exempt = {
        field["fieldPath"] for field in overrides() if field["collectionGroup"] == "chunks" and not field["indexes"]
    }
    assert {"data", "at", "expireAt", "offset", "length", "reason", "kind"} <= exempt


def test_everything_that_expires_has_a_policy() -> None:
    """Each collection with expireAt is removed by it."""
    policies = {field["collectionGroup"] for field in overrides() if field.get("ttl")}
    assert policies == {"chunks", "commands", "cursors", "deadLetters", "sessions", "transfers"}


def test_there_is_room_for_more_exemptions() -> None:
    """Firestore takes so many of them."""
    assert len(overrides()) <= MAX_EXEMPTIONS


def overrides() -> list[dict[str, Any]]:
    """The fields that are not indexed as Firestore would by itself."""
    found: list[dict[str, Any]] = index_file()["fieldOverrides"]
    return found
