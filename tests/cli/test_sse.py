"""Server-sent events, however the network cuts them."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from infra.sse import EventParser, ServerSentEvent

STREAM = (
    b": keep-alive\n\n"
    b'id: 5\ndata: {"offset":0}\n\n'
    b"event: state\r\ndata: one\r\ndata: two \xc3\xa9\r\n\r\n"
    b"data:no space\nunknown: x\n\n"
    b"event: nothing\n\n"
    b"id: 9\nevent: end\ndata:  kept space\n\n"
    b"data: unfinished"
)
EVENTS = [
    ServerSentEvent("message", '{"offset":0}', "5"),
    ServerSentEvent("state", "one\ntwo é", ""),
    ServerSentEvent("message", "no space", ""),
    ServerSentEvent("end", " kept space", "9"),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_how_the_bytes_are_cut(cuts: list[int]) -> None:
    """Every way to cut a stream gives the same events; one that was not finished is no event."""
    bounds = [0, *sorted(cuts), len(STREAM)]
    parser = EventParser()
    pieces = [STREAM[start:end] for start, end in itertools.pairwise(bounds)]
    assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS
