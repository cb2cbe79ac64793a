"""How documents are stored: what may be in them, how large they are, and how values sort in an index."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import msgpack

from schemas.errors import TooLarge
from schemas.limits import MAX_DOCUMENT_BYTES
from schemas.ports import Fields, Value

MAX_ID_BYTES = 1_500  # Firestore
MAX_DEPTH = 20  # maps and lists within each other; Firestore
DOCUMENT_OVERHEAD = 32  # bytes; Firestore's rules of storage size, as are the sizes below
NAME_OVERHEAD = 16
INT64 = range(-(2**63), 2**63)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
SIGN = 1 << 63


def split_path(path: str) -> tuple[str, str]:
    """A document's collection and id. Raises ValueError when `path` does not name a document."""
    collection, _, document = path.rpartition("/")
    check_id(document)
    check_collection(collection)
    return collection, document


def check_collection(collection: str) -> None:
    """Raises ValueError unless the path names a collection: an odd number of proper segments."""
    segments = collection.split("/")
    if len(segments) % 2 == 0:
        raise ValueError(f"{collection!r} is not the path of a collection")
    for segment in segments:
        check_id(segment)


def check_id(segment: str) -> None:
    """Raises ValueError for what Firestore does not take as an id."""
    size = len(segment.encode())
    if not 0 < size <= MAX_ID_BYTES or "/" in segment or segment in (".", "..") or _is_reserved(segment):
        raise ValueError(f"{segment[:80]!r} ({size} bytes) cannot be a segment of a path")


def _is_reserved(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def pack_document(path: str, data: Fields) -> bytes:
    """The stored body. Raises TypeError for a value that cannot be stored, ValueError for a bad field name or an
    integer beyond 64 bits, and TooLarge beyond MAX_DOCUMENT_BYTES as Firestore counts."""
    size = document_bytes(path, data)
    if size > MAX_DOCUMENT_BYTES:
        raise TooLarge(f"{path} would be {size} bytes; a document takes {MAX_DOCUMENT_BYTES}")
    packed: bytes = msgpack.packb(dict(data), datetime=True)
    return packed


def unpack_document(body: bytes) -> dict[str, Value]:
    """What `pack_document` was given; times are in UTC."""
    data: dict[str, Value] = msgpack.unpackb(body, timestamp=3)
    return data


def document_bytes(path: str, data: Fields) -> int:
    """The size of a document by Firestore's rules. Raises TypeError and ValueError as `pack_document` does."""
    if not isinstance(data, Mapping):
        raise TypeError(f"a document is a mapping, not {type(data).__name__}")
    name = sum(len(segment.encode()) + 1 for segment in path.split("/")) + NAME_OVERHEAD
    return name + _map_bytes(data, 1) + DOCUMENT_OVERHEAD


def _map_bytes(data: Mapping[Any, Any], depth: int) -> int:
    size = 0
    for name, value in data.items():
        if not isinstance(name, str):
            raise TypeError(f"a field's name is a string, not {type(name).__name__}")
        length = len(name) if name.isascii() else len(name.encode())
        if not 0 < length <= MAX_ID_BYTES or _is_reserved(name):
            raise ValueError(f"{name[:80]!r} cannot be the name of a field")
        size += length + 1 + _value_bytes(value, depth)
    return size


def _value_bytes(value: Value, depth: int) -> int:
    if value is None or isinstance(value, bool):
        return 1
    if isinstance(value, str):
        return (len(value) if value.isascii() else len(value.encode())) + 1
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, int):
        if value not in INT64:
            raise ValueError(f"{value} does not fit 64 bits")
        return 8
    if isinstance(value, float):
        return 8
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise TypeError("a stored time needs a time zone")
        return 8
    return _nested_bytes(value, depth + 1)


def _nested_bytes(value: Value, depth: int) -> int:
    if depth > MAX_DEPTH:
        raise ValueError(f"values are nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        return _map_bytes(value, depth)
    if not isinstance(value, list):
        raise TypeError(f"a document cannot hold a {type(value).__name__}")
    if any(isinstance(item, list) for item in value):
        raise TypeError("a list cannot hold a list")  # Firestore
    return sum(_value_bytes(item, depth) for item in value)


def microseconds(moment: datetime) -> int:
    """Whole microseconds since the epoch."""
    return (moment - EPOCH) // MICROSECOND


def from_microseconds(value: int) -> datetime:
    """The moment, in UTC."""
    return EPOCH + timedelta(microseconds=value)


def sort_key(value: Value) -> bytes:
    """Bytes that compare as Firestore orders values: booleans, numbers, times, strings, bytes.

    Self-delimiting, so that keys can be joined; the first byte is the type's, so that a range stays within it.
    Raises TypeError for a value that has no place in an index (None, lists, maps).
    """
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, (int, float)):
        return b"\x20" + _number_key(value)
    if isinstance(value, datetime):
        return b"\x30" + (microseconds(value) + SIGN).to_bytes(8, "big")
    if isinstance(value, str):
        return b"\x40" + _delimited(value.encode())
    if isinstance(value, bytes):
        return b"\x50" + _delimited(value)
    raise TypeError(f"a {type(value).__name__} cannot be looked up in an index")


def _delimited(raw: bytes) -> bytes:
    return raw.replace(b"\x00", b"\x00\xff") + b"\x00\x01"


def _number_key(value: float) -> bytes:
    """A double that sorts as bytes, then what rounding an integer to a double took off."""
    if value != value:  # NaN comes before every number
        return b"\x00" * 10
    near = float(value) + 0.0  # -0.0 becomes 0.0
    (bits,) = struct.unpack("!q", struct.pack("!d", near))
    rest = value - int(near) if isinstance(value, int) and math.isfinite(near) else 0
    ordered: int = bits + SIGN if bits >= 0 else ~bits
    return ordered.to_bytes(8, "big") + (rest + 0x8000).to_bytes(2, "big")
