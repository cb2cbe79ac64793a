"""The table of documents, in SQL. What runs here runs on the threads of a Database."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from infra.local.indexes import Entry, Indexes, Plan, entries, write_entries
from infra.local.values import microseconds, pack_document, split_path, unpack_document
from infra.local.writer import Write
from schemas.errors import AlreadyExists, Conflict, NotFound
from schemas.limits import MIB
from schemas.ports import Fields, Snapshot

MAX_PAGE_BYTES = 2 * MIB  # of one batch of a listener; a larger document comes alone
SPARE_SHARE = 4  # space is given back when more than one page in so many is free,
SPARE_PAGES = 1_024  # and more than this; what grows again soon needs no giving back
VACUUM_PAGES = 128  # given back in one operation, so that no write waits long behind it


@dataclass(frozen=True, slots=True)
class Change:
    """A checked write that is still to be made; `body` is packed, so that later changes of its values do not show."""

    kind: Literal["create", "update", "delete"]
    path: str
    body: bytes = b""
    expires: int | None = None
    entries: frozenset[Entry] = frozenset()
    expect: str | None = None


def creation(indexes: Indexes, path: str, data: Fields) -> Change:
    """Raises as values.split_path and values.pack_document do."""
    collection, _ = split_path(path)
    body = pack_document(path, data)
    return Change("create", path, body, _expiry(data), frozenset(entries(indexes, collection, data)))


def update(path: str, fields: Fields, expect: str | None = None) -> Change:
    """Raises as `creation` does; the size counts when the fields are merged."""
    split_path(path)
    return Change("update", path, pack_document(path, fields), expect=expect)


def deletion(path: str) -> Change:
    """Raises ValueError for a bad path."""
    split_path(path)
    return Change("delete", path)


def _expiry(data: Fields) -> int | None:
    moment = data.get("expireAt")
    return microseconds(moment) if isinstance(moment, datetime) else None


def document_bell(path: str) -> str:
    """Rings when the document changes."""
    return "document " + path


def collection_bell(collection: str) -> str:
    """Rings when a document is created in the collection."""
    return "collection " + collection


def select(connection: sqlite3.Connection, path: str) -> Snapshot | None:
    """The document, or None."""
    rows = connection.execute(
        "SELECT id, version, body FROM documents WHERE collection = ? AND id = ?", split_path(path)
    ).fetchall()
    return _snapshot(path, rows[0][1], rows[0][2]) if rows else None


def select_plan(connection: sqlite3.Connection, collection: str, plan: Plan) -> list[Snapshot]:
    """What a query finds."""
    rows = connection.execute(plan.sql, plan.parameters).fetchall()
    return [_snapshot(f"{collection}/{document}", version, body) for document, version, body in rows]


def select_page(connection: sqlite3.Connection, collection: str, after: str, limit: int) -> tuple[list[Snapshot], bool]:
    """The next documents by id, at most `limit` and, but for the first, MAX_PAGE_BYTES; and whether that is all."""
    page: list[Snapshot] = []
    size = 0
    rows = connection.execute(
        "SELECT id, version, body FROM documents WHERE collection = ? AND id > ? ORDER BY id LIMIT ?",
        (collection, after, limit),
    )
    with closing(rows):  # a cursor left open would hold an old state of the database
        for document, version, body in rows:
            page.append(_snapshot(f"{collection}/{document}", version, body))
            size += len(body)
            if size >= MAX_PAGE_BYTES:
                return page, False
    return page, len(page) < limit


def _snapshot(path: str, version: int, body: bytes) -> Snapshot:
    return Snapshot(path, unpack_document(body), str(version))


def unchanged(write: Write, versions: Mapping[str, str | None]) -> bool:
    """Whether every document still has this version (None: is still missing)."""
    return all(_version(write, path) == version for path, version in versions.items())


def _version(write: Write, path: str) -> str | None:
    rows = write.execute("SELECT version FROM documents WHERE collection = ? AND id = ?", split_path(path)).fetchall()
    return str(rows[0][0]) if rows else None


def apply(write: Write, indexes: Indexes, changes: Iterable[Change]) -> str:
    """Make the changes; returns the version of what was written. Raises AlreadyExists, NotFound, Conflict, TooLarge."""
    version = write.number()
    for change in changes:
        if change.kind == "create":
            _create(write, change, version)
        elif change.kind == "update":
            _update(write, indexes, change, version)
        else:
            _delete(write, change.path)
    return str(version)


def _create(write: Write, change: Change, version: int) -> None:
    collection, document = split_path(change.path)
    inserted = write.execute(
        "INSERT INTO documents VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (collection, document, version, change.expires, change.body),
    )
    if not inserted.rowcount:
        raise AlreadyExists(f"{change.path} exists")
    write_entries(write, collection, document, frozenset(), change.entries)
    write.ring(document_bell(change.path))
    write.ring(collection_bell(collection))


def _update(write: Write, indexes: Indexes, change: Change, version: int) -> None:
    collection, document = split_path(change.path)
    rows = write.execute(
        "SELECT version, body FROM documents WHERE collection = ? AND id = ?", (collection, document)
    ).fetchall()
    if not rows:
        raise NotFound(f"there is no {change.path}")
    if change.expect not in (None, str(rows[0][0])):
        raise Conflict(f"{change.path} was changed by somebody else")
    old = unpack_document(rows[0][1])
    new = old | unpack_document(change.body)
    write.execute(
        "UPDATE documents SET version = ?, expires = ?, body = ? WHERE collection = ? AND id = ?",
        (version, _expiry(new), pack_document(change.path, new), collection, document),
    )
    write_entries(write, collection, document, entries(indexes, collection, old), entries(indexes, collection, new))
    write.ring(document_bell(change.path))


def _delete(write: Write, path: str) -> None:
    collection, document = split_path(path)
    deleted = write.execute("DELETE FROM documents WHERE collection = ? AND id = ?", (collection, document))
    if deleted.rowcount:
        write.execute("DELETE FROM entries WHERE collection = ? AND id = ?", (collection, document))
        write.ring(document_bell(path))


def prune(write: Write, now: datetime, limit: int) -> int:
    """Remove at most `limit` documents whose `expireAt` is over; returns how many."""
    expired = write.execute(
        "SELECT collection, id FROM documents WHERE expires <= ? ORDER BY expires LIMIT ?", (microseconds(now), limit)
    ).fetchall()
    for collection, document in expired:
        _delete(write, f"{collection}/{document}")
    return len(expired)


def shrink(write: Write) -> bool:
    """Give some free pages back to the file system; whether there are more to give."""
    ((free,),) = write.execute("PRAGMA freelist_count").fetchall()
    ((pages,),) = write.execute("PRAGMA page_count").fetchall()
    if free <= max(pages // SPARE_SHARE, SPARE_PAGES):
        return False
    for _ in range(VACUUM_PAGES):
        write.execute("PRAGMA incremental_vacuum(1)")  # sqlite3 stops after the first page, whatever number is given
    return True
