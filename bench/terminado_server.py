"""terminado as its documentation shows it; `python -m bench.terminado_server PORT [nodelay]`."""

from __future__ import annotations

import sys
from typing import Any

from terminado.management import UniqueTermManager
from terminado.websocket import TermSocket
from tornado.ioloop import IOLoop
from tornado.web import Application

SHELL = ["bash", "--noprofile", "--norc", "-i"]


class PromptSocket(TermSocket):
    """Sends without waiting for the client's acknowledgements (TCP_NODELAY), which terminado does not ask for."""

    def open(self, url_component: Any = None) -> None:
        """See TermSocket.open."""
        self.set_nodelay(True)
        super().open(url_component)


def main() -> None:
    """Serve until killed."""
    manager = UniqueTermManager(shell_command=SHELL)
    handler = PromptSocket if "nodelay" in sys.argv[2:] else TermSocket
    Application([(r"/ws", handler, {"term_manager": manager})]).listen(int(sys.argv[1]), "127.0.0.1")
    IOLoop.current().start()


if __name__ == "__main__":
    main()
