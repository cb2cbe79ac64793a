"""Frames and proofs: what a worker and the agent share."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.agent import agent as wire
from tests.agent.client import AGENT

FRAMES = st.lists(st.tuples(st.integers(0, 255), st.integers(0, 2**64 - 1), st.binary(max_size=300)), max_size=8)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` in pieces, cut at these places."""
    places = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@given(FRAMES, st.lists(st.integers(0, 5_000)))
def test_frames_survive_any_cut(frames: list[tuple[int, int, bytes]], cuts: list[int]) -> None:
    """However the stream is cut, the same frames come out in order."""
    decoder = wire.FrameDecoder()
    stream = b"".join(wire.encode_frame(*frame) for frame in frames)
    assert [frame for piece in cut(stream, cuts) for frame in decoder.feed(piece)] == frames


def test_what_a_reader_leaves_is_kept() -> None:
    """Who stops after one frame finds the next one later."""
    decoder = wire.FrameDecoder()
    frames = decoder.feed(wire.encode_frame(1, 1) + wire.encode_frame(2, 2, b"x"))
    assert next(frames) == (1, 1, b"")
    frames.close()
    assert list(decoder.feed(b"")) == [(2, 2, b"x")]


def test_a_payload_over_the_limit_is_refused_before_it_is_read() -> None:
    """Nobody makes the other side buffer more than a frame's limit."""
    with pytest.raises(wire.ProtocolError):
        list(wire.FrameDecoder(limit=100).feed(wire.HEADER.pack(wire.OUT, 101, 0)))


@pytest.mark.parametrize("payload", [b"", b"[]", b"{", b"\xff", b"[" * 100_000], ids=repr)
def test_only_objects_are_json(payload: bytes) -> None:
    """Anything but a JSON object is a protocol error, however it is broken."""
    with pytest.raises(wire.ProtocolError):
        wire.decode_json(payload)


def test_a_proof_names_everything_that_is_claimed() -> None:
    """A proof overheard on one connection is of no use on another, or for another claim."""
    proofs = {
        wire.attach_proof(b"k" * 32, "c", 1, 2, 3),
        wire.attach_proof(b"k" * 32, "d", 1, 2, 3),
        wire.attach_proof(b"k" * 32, "c", 2, 2, 3),
        wire.attach_proof(b"k" * 32, "c", 1, 3, 3),
        wire.attach_proof(b"k" * 32, "c", 1, 2, 4),
        wire.attach_proof(b"k" * 32, "c", 1, 2, None),
        wire.attach_proof(b"l" * 32, "c", 1, 2, 3),
        wire.control_proof(b"k" * 32, "c"),
    }
    assert len(proofs) == 8


def test_the_agent_is_python_3_8() -> None:
    """Images with an old Python run the agent too."""
    ast.parse(AGENT.read_text(), feature_version=(3, 8))


def test_importing_the_agent_has_no_effects_and_needs_only_the_standard_library() -> None:
    """The worker imports it for the wire format."""
    code = f"import sys; sys.path.insert(0, {str(AGENT.parent)!r}); import agent; print(agent.VERSION)"
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, check=True)
    assert (result.stdout, result.stderr) == (b"1\n", b"")
