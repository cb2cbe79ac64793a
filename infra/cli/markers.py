"""A script's own output, cut out of everything its terminal printed; free of I/O.

The command's document names the same place by offsets, but it is written a little later than the output can be
read. The markers are in the stream itself, so nothing is printed late and no prompt is printed after it. They are
operating system commands of a number that no terminal knows: invisible where the transcript is looked at.
"""

from __future__ import annotations

import shlex

from schemas.ids import new_id


class Markers:
    """The markers around one command's output; the id makes them unlike anything a script prints."""

    def __init__(self) -> None:
        self._id = new_id()

    def around(self, command: str) -> str:
        """A command that does the same and prints the markers; its exit code is the same too.

        The subshell outlives what ends the command, so that the end marker is printed before the next prompt.
        """
        traps = "trap : INT TERM QUIT"
        return f"({traps}; {self._print('start')}; {command}; set -- $?; {self._print('end')}; exit $1)"

    def cutter(self) -> Cutter:
        """What finds the output between them."""
        return Cutter(self._bytes("start"), self._bytes("end"))

    def _print(self, name: str) -> str:
        return f"printf '\\033]7770;%s;%s\\007' {shlex.quote(self._id)} {name}"

    def _bytes(self, name: str) -> bytes:
        return f"\x1b]7770;{self._id};{name}\x07".encode()


class Cutter:
    """Takes a transcript piece by piece, gives what lies between the two markers. `done` after the second."""

    def __init__(self, start: bytes, end: bytes) -> None:
        self._start = start
        self._end = end
        self._held = b""
        self._started = False
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """The output in `data`, and what was held back before it because it could have begun a marker."""
        data = self._held + data
        self._held = b""
        if not self._started:
            _, self._started, data = _partition(data, self._start)
            if not self._started:
                self._held = data
                return b""
        output, self.done, self._held = _partition(data, self._end)
        return output

    def flush(self) -> bytes:
        """What is held back; nothing comes any more."""
        held = b"" if self.done or not self._started else self._held
        self._held = b""
        return held


def _partition(data: bytes, marker: bytes) -> tuple[bytes, bool, bytes]:
    """What is before the marker, whether it is there, and what is after it or could be its beginning."""
    before, found, after = data.partition(marker)
    if found:
        return before, True, after
    for size in range(min(len(marker) - 1, len(data)), 0, -1):
        if data.endswith(marker[:size]):
            return data[:-size], False, data[-size:]
    return data, False, b""
