"""Sizes and orders of stored values."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.local.values import (
    document_bytes,
    from_microseconds,
    microseconds,
    pack_document,
    sort_key,
    split_path,
    unpack_document,
)
from schemas.errors import TooLarge
from schemas.limits import MAX_DOCUMENT_BYTES

moments = st.datetimes(
    min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30), timezones=st.just(timezone(timedelta(hours=-3)))
)
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
scalars = st.none() | st.booleans() | numbers | st.text() | st.binary() | moments
names = st.text(min_size=1).filter(lambda name: not (name.startswith("__") and name.endswith("__")))


def nest(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Maps, and lists that hold no list."""
    flat = children.filter(lambda value: not isinstance(value, list))
    return st.lists(flat, max_size=4) | st.dictionaries(names, children, max_size=4)


@given(st.dictionaries(names, st.recursive(scalars, nest, max_leaves=8)))
def test_every_document_reads_back_exactly(data: dict[str, Any]) -> None:
    """Packing loses nothing, not even a microsecond."""
    assert unpack_document(pack_document("sessions/s1", data)) == data


@pytest.mark.parametrize("kind", [numbers, st.text(), st.binary(), moments, st.booleans()])
def test_keys_sort_as_values(kind: st.SearchStrategy[Any]) -> None:
    """Within a type, bytes compare as the values do; integers beyond 2**53 and floats too."""

    @given(kind, kind)
    def check(left: Any, right: Any) -> None:
        assert (sort_key(left) < sort_key(right)) == (left < right)
        assert (sort_key(left) == sort_key(right)) == (left == right)

    check()


@given(st.lists(st.integers() | st.floats(allow_nan=False)))
def test_neighbouring_numbers_stay_apart(values: list[float]) -> None:
    """Rounding to a double never makes two integers one."""
    for value in values:
        if isinstance(value, int) and abs(value) < 2**63 - 1:
            assert sort_key(value) < sort_key(value + 1)


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
def test_joined_keys_do_not_run_together(left: tuple[str, str], right: tuple[str, str]) -> None:
    """("a", "bc") and ("ab", "c") are two different places in an index."""
    joined = [b"".join(map(sort_key, pair)) for pair in (left, right)]
    assert (joined[0] < joined[1]) == (left < right)


def test_types_sort_apart() -> None:
    """Booleans, numbers, times, strings, bytes, as Firestore has it."""
    values = [False, True, -1, 1e308, datetime(1970, 1, 1, tzinfo=UTC), "", "z", b"", b"z"]
    keys = [sort_key(value) for value in values]
    assert keys == sorted(keys)


@given(moments)
def test_microseconds_are_exact(moment: datetime) -> None:
    """A time survives the way through an integer."""
    assert from_microseconds(microseconds(moment)) == moment


def test_size_is_counted_as_firestore_counts() -> None:
    """The example of Firestore's documentation of storage size: 147 bytes."""
    task = {"type": "Personal", "done": False, "priority": 1, "description": "Learn Cloud Firestore"}
    assert document_bytes("users/jeff/tasks/my_task_id", task) == 147


def test_the_limit_is_exact() -> None:
    """A document of exactly the limit fits, one byte more does not."""
    room = MAX_DOCUMENT_BYTES - document_bytes("sessions/s1", {"data": b""})
    pack_document("sessions/s1", {"data": bytes(room)})
    with pytest.raises(TooLarge):
        pack_document("sessions/s1", {"data": bytes(room + 1)})


def test_a_whole_chunk_fits() -> None:
    """256 KiB of output, with the fields around it, are far from the limit."""
    data = {"offset": 2**62, "data": bytes(256 * 1024), "at": datetime.now(UTC)}
    assert document_bytes("sessions/s1/chunks/0", data) < MAX_DOCUMENT_BYTES / 3


@pytest.mark.parametrize("name", ["", "__reserved__", "n" * 1_501])
def test_bad_field_names_are_refused(name: str) -> None:
    """As Firestore refuses them."""
    with pytest.raises(ValueError, match="name of a field"):
        pack_document("sessions/s1", {name: 1})


def test_depth_is_limited() -> None:
    """Twenty levels, as Firestore has it."""
    data: dict[str, Any] = {}
    for _ in range(20):
        data = {"deeper": data}
    with pytest.raises(ValueError, match="nested"):
        pack_document("sessions/s1", data)
    pack_document("sessions/s1", data["deeper"])


@pytest.mark.parametrize("path", ["a/\ud800", "a/__id__", "a/b/c", "a/.", "a/" + "x" * 1_501])
def test_bad_paths_are_refused(path: str) -> None:
    """Names that Firestore would not take, and text that is no UTF-8."""
    with pytest.raises(ValueError, match=r"."):
        split_path(path)
