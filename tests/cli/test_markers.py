"""A script's own output, cut out of its terminal's."""

from __future__ import annotations

import itertools
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.cli.markers import Cutter, Markers

START, END = b"\x1b]S\x07", b"\x1b]E\x07"


@given(
    st.binary(max_size=30).filter(lambda output: END not in output),
    st.lists(st.integers(0, 60), max_size=8),
)
def test_output_does_not_depend_on_how_it_is_cut(output: bytes, cuts: list[int]) -> None:
    """What is between the markers comes out byte for byte, and nothing of what is around them."""
    stream = b"$ echo S E\r\n" + START + output + END + b"$ prompt"
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    cutter = Cutter(START, END)
    printed = b""
    for start, end in itertools.pairwise(bounds):
        if not cutter.done:
            printed += cutter.feed(stream[start:end])
    expected = output[: (output + END).index(END)]
    assert (printed, cutter.done, cutter.flush()) == (expected, True, b"")


def test_output_is_not_held_back_for_long() -> None:
    """A byte that cannot belong to the end marker is printed at once: a prompt for input shows."""
    cutter = Cutter(START, END)
    assert cutter.feed(START + b"name? ") == b"name? "
    assert cutter.feed(b"\x1b[1m") == b"\x1b[1m"


def test_what_could_have_begun_a_marker_is_printed_at_the_end() -> None:
    """A script that is killed in the middle of an escape sequence loses no byte."""
    cutter = Cutter(START, END)
    assert cutter.feed(START + b"dying \x1b]") == b"dying "
    assert cutter.flush() == b"\x1b]"


@pytest.mark.parametrize("command", ["true", "(exit 3)", "kill -9 $BASHPID", "cd /nowhere"])
def test_a_command_keeps_its_exit_code(command: str) -> None:
    """bash says of the command with markers what it says of the command."""
    markers = Markers()
    alone = subprocess.run(["bash", "-c", f"({command})"], capture_output=True)
    marked = subprocess.run(["bash", "-c", markers.around(f"({command})")], capture_output=True)
    cutter = markers.cutter()
    assert (marked.returncode, cutter.feed(marked.stdout), cutter.done) == (alone.returncode, alone.stdout, True)
