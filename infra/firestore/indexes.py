"""firestore.indexes.json from what the program declares: composite indexes, fields without one, and expiry.

`python -m infra.firestore.indexes` writes the file. It is in the format that Firebase's tools deploy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.adapters.firestore_values import ID, STAMP
from schemas.documents import INDEXES, Chunk, Command, Cursor, Rollout, Session, Stored, Transfer, User

FILE = Path(__file__).with_name("firestore.indexes.json")

COLLECTIONS: dict[str, type[Stored]] = {
    "chunks": Chunk,
    "commands": Command,
    "config": Rollout,
    "cursors": Cursor,
    "sessions": Session,
    "transfers": Transfer,
    "users": User,
}
DEAD_LETTER_FIELDS = ("at", "attributes", "data", "expireAt", "size")
EXPIRY = "expireAt"
DIRECTIONS = ("ASCENDING", "DESCENDING")


def index_file() -> dict[str, Any]:
    """The whole file."""
    return {"indexes": list(_composite()), "fieldOverrides": list(_overrides())}


def _composite() -> Iterator[dict[str, Any]]:
    """Each in both directions of its order: Firestore reads an index in one direction only."""
    for collection, declared in sorted(INDEXES.items()):
        for *equal, order in (fields for fields in declared if len(fields) > 1):
            for direction in DIRECTIONS:
                fields = [{"fieldPath": field, "order": "ASCENDING"} for field in equal]
                fields.append({"fieldPath": order, "order": direction})
                yield {"collectionGroup": collection, "queryScope": "COLLECTION", "fields": fields}


def _overrides() -> Iterator[dict[str, Any]]:
    """Fields that no query looks at are exempt: each index entry costs storage and time, and `data` is large."""
    for collection, names in sorted(_fields().items()):
        for name in sorted({*names, ID, STAMP}):
            override: dict[str, Any] = {"collectionGroup": collection, "fieldPath": name}
            if name == EXPIRY:
                override["ttl"] = True
            yield override | {"indexes": _single(collection, name)}


def _fields() -> dict[str, tuple[str, ...]]:
    stored = {
        collection: tuple(field.alias or name for name, field in document.model_fields.items())
        for collection, document in COLLECTIONS.items()
    }
    return stored | {"deadLetters": DEAD_LETTER_FIELDS}


def _single(collection: str, name: str) -> list[dict[str, str]]:
    if (name,) in INDEXES.get(collection, ()):
        return [{"order": direction, "queryScope": "COLLECTION"} for direction in DIRECTIONS]
    if name == ID:
        return [{"order": "DESCENDING", "queryScope": "COLLECTION"}]
    return []


def text() -> str:
    """The file's contents."""
    return json.dumps(index_file(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
