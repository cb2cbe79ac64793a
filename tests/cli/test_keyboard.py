"""The way out of an attached terminal."""

from __future__ import annotations

import pytest

from infra.cli.keyboard import Keyboard


@pytest.mark.parametrize(
    ("typed", "sent", "left"),
    [
        (b"~.", b"", True),
        (b"ls\r~.", b"ls\r", True),
        (b"ls\n~.rest", b"ls\n", True),
        (b"ls ~.", b"ls ~.", False),
        (b"~~.\r", b"~.\r", False),
        (b"~~~.", b"~~.", False),
        (b"~ls\r", b"~ls\r", False),
        (b"~\r~.", b"~\r", True),
        (b"\x03~.", b"\x03~.", False),
        (b"cd ~/x\r", b"cd ~/x\r", False),
        ("é~.".encode(), "é~.".encode(), False),
    ],
)
def test_only_a_tilde_and_a_dot_at_the_start_of_a_line_leave(typed: bytes, sent: bytes, left: bool) -> None:
    """Everything else that is typed arrives, whether its keys come together or one by one."""
    for pieces in ([typed], [bytes((key,)) for key in typed]):
        keyboard = Keyboard()
        out = b""
        for piece in pieces:
            if not keyboard.left:
                out += keyboard.feed(piece)
        assert (out, keyboard.left) == (sent, left)
