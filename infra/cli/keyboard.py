"""The way out of an attached terminal, as ssh has it: `~.` at the start of a line. Free of I/O."""

from __future__ import annotations

LINE_ENDS = frozenset(b"\r\n")
TILDE, DOT = ord("~"), ord(".")


class Keyboard:
    """Takes what is typed, gives what is to be sent. `left` once `~.` was typed; `~~` sends one tilde."""

    def __init__(self) -> None:
        self._line_start = True
        self._tilde = False  # one is held back, at the start of a line
        self.left = False

    def feed(self, typed: bytes) -> bytes:
        """The keys to send; nothing of what follows `~.`."""
        send = bytearray()
        for key in typed:
            if self._tilde:
                self._tilde = False
                if key == DOT:
                    self.left = True
                    break
                send += b"~" if key == TILDE else bytes((TILDE, key))
            elif self._line_start and key == TILDE:
                self._tilde = True
            else:
                send.append(key)
            self._line_start = key in LINE_ENDS and not self._tilde
        return bytes(send)
