"""The program that a worker executes in a pod to be connected to its agent.

It is the agent's own pump without the rest of the agent, taken from its source and handed over on the command line: a
pod with a quarter of a core takes 0.3 s to compile the whole file, at every connection. For the same reason it imports
neither socket nor contextlib: Python's own start is 15 ms of a core, and these would be another 15. It also waits for
an agent that is just starting, which spares a second exec.
"""

from __future__ import annotations

import functools
import inspect

from consumers.agent import agent
from infra.adapters.kube_pod import AGENT_SOCKET, PYTHON

PATIENCE_SECONDS = 10.0  # for an agent that does not listen yet
SILENCE_SECONDS = 60.0  # from either side, after which the helper ends: an exec may outlive its connection

PROLOGUE = """
from __future__ import annotations
import _socket, os, select, sys, time
"""
EPILOGUE = """
def _dial(address, until):
    while True:
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            if time.monotonic() > until:
                sys.exit("agent: {}".format(error))
            time.sleep(0.02)
try:
    Pump(_dial(chr(0) + sys.argv[-1][1:], time.monotonic() + PATIENCE), SILENCE).run()
except OSError:
    pass
"""


def helper() -> list[str]:
    """Its command line. The last three words are those of the agent's own helper."""
    return [PYTHON, "-I", "-S", "-c", source(), "attach", "--socket", AGENT_SOCKET]


@functools.cache
def source() -> str:
    """Its program, for Python 3.8 and later. It makes itself unreadable to the user's programs first of all."""
    return "\n".join(
        (
            PROLOGUE.strip(),
            inspect.getsource(agent.prctl),
            f"prctl({agent.PR_SET_DUMPABLE}, 0)",
            f"KIB, PATIENCE, SILENCE = {agent.KIB}, {PATIENCE_SECONDS}, {SILENCE_SECONDS}",
            inspect.getsource(agent.Pump),
            inspect.getsource(agent._empty),
            EPILOGUE.strip(),
        )
    )
