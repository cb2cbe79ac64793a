"""Events as messages: CloudEvents 1.0, binary mode."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeVar

import jsonschema
import pytest
from cloudevents.conversion import to_binary
from cloudevents.http import CloudEvent as OfficialEvent
from cloudevents.http import from_http
from hypothesis import given
from hypothesis import strategies as st

from schemas.envelope import CloudEvent, decode, encode, wrap
from schemas.errors import MalformedEvent, PigeonError
from schemas.events import (
    EVENTS,
    ClockTicked,
    CloseReason,
    CommandSubmitted,
    Event,
    FileItem,
    FileRequested,
    FilesPushed,
    InputSent,
    SessionClosed,
    SessionEnded,
    SessionOpened,
    SessionRequested,
    SessionStarted,
    Signal,
    SignalSent,
    TerminalResized,
    Usage,
)
from schemas.model import Model
from schemas.ports import Message
from schemas.topics import ORDERED_TOPICS

GOLDEN = Path(__file__).parent.parent / "golden"
SAMPLES = sorted(GOLDEN.glob("*.json"))

M = TypeVar("M", bound=Model)

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
ids = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
paths = st.lists(st.from_regex(r"[a-z0-9ü ]{1,8}", fullmatch=True), min_size=1, max_size=4).map("/".join)
rows, cols = st.integers(1, 500), st.integers(1, 1000)
amounts = st.integers(0, 2**53)
seconds = st.floats(0, 1e9)
moments = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))


def built(kind: type[M], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[M]:
    return st.fixed_dictionaries(fields).map(lambda values: kind(**values))


usages = built(Usage, pod_seconds=seconds, commands=amounts, bytes=amounts, writes=amounts)
items = built(
    FileItem,
    path=paths,
    type=st.sampled_from(["file", "directory", "delete"]),
    data=st.binary(max_size=40),
    mode=st.integers(0, 0o777),
)

STRATEGIES: dict[type[Event], st.SearchStrategy[Event]] = {
    SessionRequested: built(SessionRequested, user_id=text, rows=rows, cols=cols, image=text),
    CommandSubmitted: built(
        CommandSubmitted, command_id=ids, text=text, timeout_seconds=st.none() | st.integers(1, 21600)
    ),
    InputSent: built(InputSent, data=st.binary(max_size=100)),
    TerminalResized: built(TerminalResized, rows=rows, cols=cols),
    SignalSent: built(SignalSent, signal=st.sampled_from(Signal), command_id=st.none() | ids),
    FilesPushed: built(
        FilesPushed, items=st.lists(items, min_size=1, max_size=3).map(tuple), transfer_id=st.none() | ids
    ),
    FileRequested: built(FileRequested, path=text, transfer_id=ids, what=st.sampled_from(["content", "listing"])),
    SessionClosed: built(SessionClosed, reason=st.sampled_from(CloseReason)),
    SessionOpened: built(SessionOpened, epoch=amounts),
    ClockTicked: built(ClockTicked, at=moments),
    SessionStarted: built(SessionStarted, user_id=text, seconds=seconds),
    SessionEnded: built(SessionEnded, user_id=text, state=text, reason=text, seconds=seconds, usage=usages),
}
events = st.one_of(*STRATEGIES.values())
traceparents = st.just("") | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", fullmatch=True)
zones = st.sampled_from([UTC, timezone(timedelta(hours=2)), timezone(timedelta(hours=-9, minutes=-30))])
cloud_events = st.builds(
    CloudEvent,
    event=events,
    subject=st.just("") | ids,
    id=ids,
    time=st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=zones),
    source=st.sampled_from(["/producers", "/consumers", "//pigeon.example/x"]),
    traceparent=traceparents,
)


def sample(path: Path) -> Message:
    """A message as it was published once."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return Message(json.dumps(content["data"]).encode(), content["attributes"], content["orderingKey"])


def test_there_is_a_sample_and_a_strategy_of_every_event() -> None:
    """An event type without one could change unseen."""
    assert {path.stem for path in SAMPLES} == EVENTS.keys()
    assert {kind.type for kind in STRATEGIES} == EVENTS.keys()


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_messages_that_were_published_once_are_still_read(path: Path) -> None:
    """A deployment meets messages of the version before it; what it reads it would write the same."""
    message = sample(path)
    cloud_event = decode(message)
    assert cloud_event.event.type == path.stem
    again = encode(cloud_event)
    assert json.loads(again.data) == json.loads(message.data)
    assert (again.attributes, again.ordering_key) == (message.attributes, message.ordering_key)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_a_later_version_may_add_fields(path: Path) -> None:
    """A reader of this version takes what it knows."""
    message = sample(path)
    data = {**json.loads(message.data), "inventedLater": {"x": [1]}}
    newer = Message(json.dumps(data).encode(), {**message.attributes, "ce-later": "1"}, message.ordering_key)
    assert decode(newer) == decode(message)


@given(cloud_events)
def test_what_is_encoded_is_decoded(cloud_event: CloudEvent) -> None:
    """Every field of every event survives; times come back in UTC."""
    message = encode(cloud_event)
    assert decode(message) == cloud_event
    assert decode(message).time.tzinfo is UTC
    ordered = cloud_event.event.topic in ORDERED_TOPICS
    assert message.ordering_key == (cloud_event.subject if ordered else "")


@given(cloud_events)
def test_what_is_published_obeys_the_published_schema(cloud_event: CloudEvent) -> None:
    """Readers in other languages validate with schemas/json."""
    folder = Path(__file__).parent.parent.parent / "schemas" / "json"
    schema = json.loads((folder / f"{cloud_event.event.type}.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(json.loads(encode(cloud_event).data), schema)


@given(cloud_events)
def test_the_official_library_reads_what_we_write(cloud_event: CloudEvent) -> None:
    """A subscriber need not be ours; Pub/Sub's push without a wrapper makes our attributes its headers."""
    message = encode(cloud_event)
    official = from_http(dict(message.attributes), message.data)
    assert official["id"] == cloud_event.id
    assert official["type"] == cloud_event.event.type
    assert official["source"] == cloud_event.source
    assert official.get("subject", "") == cloud_event.subject
    assert official.get("traceparent", "") == cloud_event.traceparent
    assert datetime.fromisoformat(official["time"]) == cloud_event.time
    assert official.data == json.loads(message.data)


@given(cloud_events)
def test_we_read_what_the_official_library_writes(cloud_event: CloudEvent) -> None:
    """A publisher need not be ours either."""
    attributes = {
        "id": cloud_event.id,
        "type": cloud_event.event.type,
        "source": cloud_event.source,
        "time": cloud_event.time.isoformat(),
        "datacontenttype": "application/json",
    }
    if cloud_event.subject:
        attributes["subject"] = cloud_event.subject
    if cloud_event.traceparent:
        attributes["traceparent"] = cloud_event.traceparent
    data = json.loads(cloud_event.event.model_dump_json(by_alias=True))
    headers, body = to_binary(OfficialEvent(attributes, data))
    assert isinstance(body, bytes)
    assert decode(Message(body, headers)) == cloud_event


VALID = encode(
    wrap(SessionOpened(epoch=1), subject="s1", source="/test", time=datetime(2026, 11, 2, tzinfo=UTC), id="e1")
)


def refusal(message: Message) -> MalformedEvent | None:
    """How the message is refused; None if it is an event after all."""
    try:
        decode(message)
    except MalformedEvent as error:
        return error
    return None


@given(st.binary(max_size=80), st.dictionaries(st.sampled_from([*VALID.attributes, "x"]), st.text(max_size=20)))
def test_bytes_that_are_no_event_raise_malformed_event_and_nothing_else(data: bytes, changes: dict[str, str]) -> None:
    """A worker refuses to dead letters on this error; any other would be a poison message. The bytes are kept."""
    error = refusal(Message(data, {**VALID.attributes, **changes}))
    assert error is None or (error.raw == data and str(error))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(EVENTS)), st.data())
def test_fields_of_any_shape_raise_malformed_event_and_nothing_else(kind: str, data: st.DataObject) -> None:
    """Well-formed JSON with the right names and any values."""
    names = [field.alias or name for name, field in EVENTS[kind].model_fields.items()]
    value = data.draw(st.dictionaries(st.sampled_from(names), json_values) | json_values)
    raw = json.dumps(value).encode()
    error = refusal(Message(raw, {**VALID.attributes, "ce-type": kind}))
    assert error is None or (error.raw == raw and str(error))


@pytest.mark.parametrize(
    ("attributes", "word"),
    [
        ({"ce-specversion": "0.3"}, "ce-specversion"),
        ({"ce-specversion": None}, "ce-specversion"),
        ({"ce-type": "session.opened.v2"}, "session.opened.v2"),
        ({"ce-type": None}, "event type"),
        ({"ce-id": ""}, "ce-id"),
        ({"ce-source": None}, "ce-source"),
        ({"ce-time": None}, "ce-time"),
        ({"ce-time": "yesterday"}, "yesterday"),
        ({"ce-time": "2026-11-02T12:00:00"}, "time zone"),
        ({"content-type": "text/plain"}, "text/plain"),
    ],
)
def test_a_refused_envelope_says_why(attributes: dict[str, str | None], word: str) -> None:
    """Whoever reads the dead letters wants to know."""
    changed: dict[str, Any] = {**VALID.attributes, **attributes}
    with pytest.raises(MalformedEvent, match=word):
        decode(Message(VALID.data, {name: value for name, value in changed.items() if value is not None}))


@pytest.mark.parametrize(
    ("kind", "data", "word"),
    [
        ("session.requested.v1", {"userId": "a", "rows": "24"}, "rows"),
        ("command.submitted.v1", {"commandId": "a b", "text": "x"}, "commandId"),
        ("command.submitted.v1", {"commandId": "a", "text": "x\0"}, "NUL"),
        ("command.submitted.v1", {"commandId": "a", "text": "x" * 65_537}, "65536"),
        ("files.pushed.v1", {"items": []}, "items"),
        ("files.pushed.v1", {"items": [{"path": "../x"}]}, "path"),
        ("input.sent.v1", {"data": "not base64!"}, "base64"),
        ("input.sent.v1", {"data": base64.b64encode(bytes(65_537)).decode()}, "data"),
        ("session.closed.v1", {"reason": "bored"}, "reason"),
        ("clock.ticked.v1", {"at": "soon"}, "at"),
    ],
)
def test_a_refused_field_is_named(kind: str, data: dict[str, Any], word: str) -> None:
    """In the name it has on the wire, without echoing what it held."""
    with pytest.raises(MalformedEvent, match=word):
        decode(Message(json.dumps(data).encode(), {**VALID.attributes, "ce-type": kind}))


def test_a_trace_context_that_is_none_is_dropped_and_the_event_kept() -> None:
    """Tracing never costs an event."""
    assert decode(Message(VALID.data, {**VALID.attributes, "ce-traceparent": "x"})).traceparent == ""


def test_a_malformed_event_is_refused_and_not_retried() -> None:
    """Settlement asks this flag."""
    assert issubclass(MalformedEvent, PigeonError)
    assert not MalformedEvent.retryable
