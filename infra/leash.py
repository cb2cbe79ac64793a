"""Run a command that ends when this program's standard input does: `python leash.py COMMAND...`.

Whoever holds the other end of the pipe owns the command. Its death closes the pipe, however it died, so nothing is
left behind. Standard library only: it starts with -I -S in a few milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading

PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 2.0  # between the request to end and the end


def main(command: list[str]) -> int:
    """Returns the command's exit code, negative for a signal."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_leash) as child:  # noqa: PLW1509
        threading.Thread(target=_end_with_input, args=(child,), daemon=True).start()
        return child.wait()


def _end_with_input(child: subprocess.Popen[bytes]) -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    child.terminate()
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()


def _die_with_leash() -> None:
    """The pipe covers the owner's death; this one, on Linux, our own. We forked on the main thread, which stays."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
