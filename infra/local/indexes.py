"""Declared indexes: which one answers a query, and the rows that keep them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from infra.local.values import check_collection, check_id, sort_key, unpack_document
from infra.local.writer import Write
from schemas.ports import Fields, Query, Where

Indexes = Mapping[str, tuple[tuple[str, ...], ...]]
Entry = tuple[str, bytes]  # an index's name and a key in it

PAST_EVERY_KEY = b"\xff"  # no key's type byte is as high


@dataclass(frozen=True, slots=True)
class Plan:
    """A query as SQL."""

    sql: str
    parameters: tuple[Any, ...]


def index_name(fields: Iterable[str]) -> str:
    """How an index is called in the table of entries."""
    return "\n".join(fields)


def entries(indexes: Indexes, collection: str, data: Fields) -> set[Entry]:
    """The entries of one document; an index has none for a document that lacks one of its fields."""
    found = set()
    for fields in indexes.get(collection.rpartition("/")[2], ()):
        values = [data.get(field) for field in fields]
        if not any(value is None or isinstance(value, (list, dict)) for value in values):
            found.add((index_name(fields), b"".join(map(sort_key, values))))
    return found


def write_entries(write: Write, collection: str, document: str, old: Set[Entry], new: Set[Entry]) -> None:
    """Bring the table of entries from `old` to `new` for one document."""
    for name, key in old - new:
        write.execute(
            "DELETE FROM entries WHERE collection = ? AND fields = ? AND key = ? AND id = ?",
            (collection, name, key, document),
        )
    for name, key in new - old:
        write.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", (collection, name, key, document))


def plan(indexes: Indexes, query: Query) -> Plan:
    """How a query is answered. Raises ValueError for one that no declared index answers."""
    fields = check_query(indexes, query)
    if not fields:
        return _plan_by_id(query)
    equal = {where.field: where.value for where in query.where if where.op == "=="}
    ranges = [where for where in query.where if where.op != "=="]
    return _plan_by_index(query, fields, equal, ranges)


def check_query(indexes: Indexes, query: Query) -> tuple[str, ...]:
    """The fields of the index that answers a query, none for one by id. Raises ValueError as `plan` does."""
    check_collection(query.collection)
    if query.after:
        check_id(query.after)
    if query.limit < 1:
        raise ValueError("a query's limit is at least 1")
    if query.after and query.order_by is not None:
        raise ValueError("`after` goes with the order by id")
    equal = {where.field: where.value for where in query.where if where.op == "=="}
    ranges = [where for where in query.where if where.op != "=="]
    ranged = {where.field for where in ranges}
    if len(equal) + len(ranges) < len(query.where) or not ranged <= {query.order_by} - set(equal):
        raise ValueError("a query takes one equality a field, and ranges on the field of its order")
    if not query.where and query.order_by is None:
        return ()
    return _declared(indexes, query, equal)


def _declared(indexes: Indexes, query: Query, equal: Mapping[str, Any]) -> tuple[str, ...]:
    order = () if query.order_by is None else (query.order_by,)
    for fields in indexes.get(query.collection.rpartition("/")[2], ()):
        if fields[len(fields) - len(order) :] == order and set(fields) - set(order) == set(equal) - set(order):
            return fields
    raise ValueError(f"no index of {query.collection!r} has the fields {[*equal, *order]}; declare it in INDEXES")


def _plan_by_id(query: Query) -> Plan:
    bound, direction = ("<", "DESC") if query.descending else (">", "ASC")
    after, parameters = (f"AND id {bound} ?", (query.after,)) if query.after else ("", ())
    return Plan(
        f"SELECT id, version, body FROM documents WHERE collection = ? {after} ORDER BY id {direction} LIMIT ?",  # noqa: S608
        (query.collection, *parameters, query.limit),
    )


def _plan_by_index(query: Query, fields: tuple[str, ...], equal: Mapping[str, Any], ranges: list[Where]) -> Plan:
    bound, direction = ("<", "DESC") if query.descending else (">", "ASC")
    prefix = b"".join(sort_key(equal[field]) for field in fields if field in equal)
    low, high = _range(prefix, ranges)
    after, parameters = (f"AND e.id {bound} ?", (query.after,)) if query.after else ("", ())
    return Plan(
        "SELECT d.id, d.version, d.body FROM entries AS e JOIN documents AS d "  # noqa: S608
        "ON d.collection = e.collection AND d.id = e.id "
        f"WHERE e.collection = ? AND e.fields = ? AND e.key >= ? AND e.key < ? {after} "
        f"ORDER BY e.key {direction}, e.id {direction} LIMIT ?",
        (query.collection, index_name(fields), low, high, *parameters, query.limit),
    )


def _range(prefix: bytes, ranges: list[Where]) -> tuple[bytes, bytes]:
    """The first key that matches, and the first after it that does not."""
    low, high = prefix, prefix + PAST_EVERY_KEY
    for where in ranges:
        key = sort_key(where.value)
        if where.op == ">=":
            low = max(low, prefix + key)
            high = min(high, prefix + bytes((key[0] + 1,)))
        else:
            low = max(low, prefix + key[:1])
            high = min(high, prefix + key + b"\x00")
    return low, high


def rebuild(indexes: Indexes, write: Write) -> None:
    """Make the entries those of `indexes`, where another version of the program declared others."""
    declared = {(collection, index_name(fields)) for collection, all_ in indexes.items() for fields in all_}
    present = set(write.execute("SELECT collection, fields FROM indexes").fetchall())
    if declared == present:
        return
    write.execute("DELETE FROM entries")
    for name in indexes:
        for collection, document, body in _documents(write, name):
            write_entries(write, collection, document, frozenset(), entries(indexes, collection, unpack_document(body)))
    write.execute("DELETE FROM indexes")
    for row in declared:
        write.execute("INSERT INTO indexes VALUES (?, ?)", row)


def _documents(write: Write, name: str) -> sqlite3.Cursor:
    return write.execute(
        "SELECT collection, id, body FROM documents WHERE collection = ? OR substr(collection, -?) = ?",
        (name, len(name) + 1, "/" + name),
    )
