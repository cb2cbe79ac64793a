"""Documents as Firestore's messages, and back. Exact: times to the microsecond and in UTC, integers, bytes."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from google.cloud.firestore_v1.field_path import FieldPath
from google.cloud.firestore_v1.types import document as document_types

from infra.local.values import EPOCH, document_bytes, microseconds, split_path
from schemas.errors import TooLarge
from schemas.limits import MAX_DOCUMENT_BYTES
from schemas.ports import Fields, Snapshot, Value

Message = Any  # the generated messages have no types of their own

Document: Message = document_types.Document.pb()

MICROSECONDS = 1_000_000
NANOSECONDS = 1_000  # in a microsecond
VERSION = re.compile(r"(-?\d+)\.(\d{9})")

STAMP = "writeStamp"
"""Every update writes this field anew and no reader sees it. An update that changes nothing would keep the document's
update time, which is its version: a writer that read before it would not notice that somebody wrote."""

ID = "documentId"
"""Every document holds its id in this field, likewise unseen: Firestore does not order by name from the end."""

HIDDEN = frozenset({STAMP, ID})


class Database:
    """The names of one database's documents."""

    def __init__(self, project: str, database: str = "(default)") -> None:
        self.project = project
        self.name = f"projects/{project}/databases/{database}"
        self._prefix = f"{self.name}/documents/"

    def document(self, path: str) -> str:
        """The full name of a document or collection."""
        return self._prefix + path

    def parent(self, collection: str) -> tuple[str, str]:
        """What a query of the collection is asked of, and the collection's own id."""
        parent, _, name = collection.rpartition("/")
        return (self._prefix + parent).rstrip("/"), name

    def path(self, name: str) -> str:
        """The path of a full name."""
        return name.removeprefix(self._prefix)

    def snapshot(self, document: Message) -> Snapshot:
        """A received document."""
        data = {name: decode(value) for name, value in document.fields.items() if name not in HIDDEN}
        return Snapshot(self.path(document.name), data, version_of(document.update_time))


def check_document(path: str, data: Fields) -> None:
    """Raises TypeError, ValueError and TooLarge as the local store does, before anything is sent."""
    split_path(path)
    size = document_bytes(path, data)
    if not HIDDEN.isdisjoint(data):
        raise ValueError(f"{sorted(HIDDEN)} are the store's own fields")
    if size > MAX_DOCUMENT_BYTES:
        raise TooLarge(f"{path} would be {size} bytes; a document takes {MAX_DOCUMENT_BYTES}")


def encode_fields(data: Fields, fields: Message) -> None:
    """Fill a message's map of fields."""
    for name, value in data.items():
        encode(value, fields[name])


def encode(value: Value, into: Message) -> None:
    """Fill one value. Raises TypeError for what a document cannot hold."""
    if value is None:
        into.null_value = 0
    elif isinstance(value, bool):
        into.boolean_value = value
    elif isinstance(value, int):
        into.integer_value = value
    elif isinstance(value, float):
        into.double_value = value
    elif isinstance(value, str):
        into.string_value = value
    elif isinstance(value, bytes):
        into.bytes_value = value
    elif isinstance(value, datetime):
        _encode_time(value, into.timestamp_value)
    else:
        _encode_nested(value, into)


def _encode_time(value: datetime, into: Message) -> None:
    into.seconds, micros = divmod(microseconds(value), MICROSECONDS)
    into.nanos = micros * NANOSECONDS


def _encode_nested(value: Value, into: Message) -> None:
    if isinstance(value, Mapping):
        into.map_value.SetInParent()
        encode_fields(value, into.map_value.fields)
    elif isinstance(value, list):
        into.array_value.SetInParent()
        for item in value:
            encode(item, into.array_value.values.add())
    else:
        raise TypeError(f"a document cannot hold a {type(value).__name__}")


def decode(value: Message) -> Value:
    """A received value; kinds that we never write raise ValueError."""
    kind = value.WhichOneof("value_type")
    if kind == "null_value":
        return None
    if kind == "timestamp_value":
        moment = value.timestamp_value
        return EPOCH + timedelta(seconds=moment.seconds, microseconds=moment.nanos // NANOSECONDS)
    if kind == "map_value":
        return {name: decode(item) for name, item in value.map_value.fields.items()}
    if kind == "array_value":
        return [decode(item) for item in value.array_value.values]
    if kind in ("boolean_value", "integer_value", "double_value", "string_value", "bytes_value"):
        return getattr(value, kind)
    raise ValueError(f"a stored value is a {kind}")


def version_of(moment: Message) -> str:
    """An update time as a version."""
    return f"{moment.seconds}.{moment.nanos:09}"


def set_version(version: str, moment: Message) -> None:
    """The update time that a version stands for. Raises ValueError for a string that never was a version."""
    match = VERSION.fullmatch(version)
    if match is None:
        raise ValueError(f"{version!r} is not a version of this store")
    moment.seconds, moment.nanos = int(match[1]), int(match[2])


def field_path(name: str) -> str:
    """A field's name as paths write it, quoted where it has to be."""
    return FieldPath(name).to_api_repr()


def stamp() -> int:
    """A new value of STAMP."""
    return random.getrandbits(53)  # exact in a browser as well
