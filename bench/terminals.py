"""A terminal as a benchmark sees it, and what is done with every one of them."""

from __future__ import annotations

import itertools
from typing import Protocol

PROMPTS = (b"$ ", b"# ")


class Terminal(Protocol):
    """A shell at the other end of a server, with one client that reads what it prints."""

    name: str

    def type(self, data: bytes) -> None:
        """Send keystrokes."""

    def run(self, command: str) -> None:
        """Have a command run, the way this server's users do."""

    def receive(self) -> bytes:
        """The next output: at least one byte, as soon as there is one."""

    def settle(self) -> None:
        """Take what the server owes for the last call, such as a response, out of the way; it is not output."""

    def roots(self) -> list[int]:
        """The processes that serve it; what is below them counts too."""

    def close(self) -> None:
        """End it."""


_markers = itertools.count(1)


def until(terminal: Terminal, text: bytes) -> None:
    """Receive up to the output that completes `text`."""
    tail = b""
    while text not in tail:
        tail = tail[-len(text) :] + terminal.receive()


def calm(terminal: Terminal) -> None:
    """Empty the line, and receive everything up to a fresh prompt."""
    number = next(_markers)
    terminal.type(b"\x15echo C$((%d+0))M\r" % number)
    terminal.settle()
    tail, mark = b"", b"C%dM\r\n" % number
    while mark not in tail:
        tail = tail[-200:] + terminal.receive()
    tail = tail.partition(mark)[2]
    while not any(prompt in tail for prompt in PROMPTS):
        tail += terminal.receive()
