"""Writes as Firestore's messages, and transactions that lock nothing.

A transaction reads without locks, and its commit carries the versions it read as preconditions: Firestore's own
transactions lock what they read, and contended ones wait for seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from infra.adapters.firestore_calls import CommitRequest
from infra.adapters.firestore_values import (
    ID,
    STAMP,
    Database,
    Message,
    check_document,
    encode_fields,
    field_path,
    set_version,
    stamp,
)
from infra.local.values import split_path
from infra.transactions import Reads
from schemas.errors import TooLarge
from schemas.limits import MAX_COMMIT_BYTES
from schemas.ports import Fields


@dataclass(frozen=True, slots=True)
class Change:
    """A checked write; its message is complete but for preconditions on what was read."""

    kind: Literal["create", "update", "delete"]
    path: str
    write: Message


def creation(database: Database, path: str, data: Fields) -> Change:
    """Raises TypeError, ValueError and TooLarge as check_document does."""
    check_document(path, data)
    write = _write()
    write.update.name = database.document(path)
    encode_fields(data, write.update.fields)
    write.update.fields[ID].string_value = path.rpartition("/")[2]
    write.current_document.exists = False
    return Change("create", path, write)


def update(database: Database, path: str, fields: Fields) -> Change:
    """As `creation`; the merged document's size is for the server to judge."""
    check_document(path, fields)
    write = _write()
    write.update.name = database.document(path)
    encode_fields(fields, write.update.fields)
    write.update.fields[STAMP].integer_value = stamp()
    write.update_mask.field_paths.extend([*map(field_path, fields), STAMP])
    write.current_document.exists = True
    return Change("update", path, write)


def deletion(database: Database, path: str) -> Change:
    """Raises ValueError for a bad path."""
    split_path(path)
    write = _write()
    write.delete = database.document(path)
    return Change("delete", path, write)


def commit_request(database: Database, changes: Iterable[Change]) -> Message:
    """A commit of these. Raises TooLarge beyond MAX_COMMIT_BYTES."""
    request = CommitRequest(database=database.name)
    request.writes.extend(change.write for change in changes)
    size = request.ByteSize()
    if size > MAX_COMMIT_BYTES:
        raise TooLarge(f"the commit is {size} bytes; Firestore takes {MAX_COMMIT_BYTES}")
    return request


def expect(change: Change, version: str) -> Change:
    """The change, if the document still has that version. Raises ValueError for what is no version."""
    set_version(version, change.write.current_document.update_time)
    return change


def conditioned(database: Database, changes: list[Change], reads: Reads) -> list[Change]:
    """The changes, to be made only if everything read is still as it was."""
    open_reads = dict(reads)
    result: list[Change] = []
    for change in changes:
        if change.path in open_reads:
            result += _conditions(database, change, open_reads.pop(change.path))
        result.append(change)
    return [*(_unchanged(database, path, version) for path, version in open_reads.items()), *result]


def _conditions(database: Database, change: Change, version: str | None) -> list[Change]:
    """Make `change` depend on what was read of its document, or return what does."""
    if change.kind == "create" and version is None:
        return []  # says itself that there must be none
    if change.kind != "create" and version is not None:
        expect(change, version)
        return []
    return [_unchanged(database, change.path, version)]


def _unchanged(database: Database, path: str, version: str | None) -> Change:
    """Changes nothing, and fails if the document is not what was read: an update of no fields, or the deletion of
    what is not there."""
    write = _write()
    if version is None:
        write.delete = database.document(path)
        write.current_document.exists = False
        return Change("delete", path, write)
    write.update.name = database.document(path)
    write.update_mask.SetInParent()
    set_version(version, write.current_document.update_time)
    return Change("update", path, write)


def _write() -> Message:
    return CommitRequest().writes.add()
