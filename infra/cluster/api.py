"""As much of a client of the API server as it takes to see whether the cluster is up."""

from __future__ import annotations

import base64
import json
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any

from infra.cluster.layout import API_ADDRESS, API_PORT, Layout

ANSWER_SECONDS = 10.0


class Api:
    """Reads as the administrator. Every call raises OSError while the server does not answer or refuses."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def text(self, path: str) -> str:
        """The answer's body."""
        return "".join(self.lines(path, ANSWER_SECONDS))

    def lines(self, path: str, patience: float | None = None) -> Iterator[str]:
        """The lines of the answer as they come; `patience` bounds the seconds between them."""
        url = f"https://{API_ADDRESS}:{API_PORT}{path}"
        try:
            with urllib.request.urlopen(url, timeout=patience, context=self._context()) as answer:
                yield from (line.decode() for line in answer)
        except HTTPException as error:
            raise ConnectionError(f"no answer from the API server: {error!r}") from error

    def json(self, path: str) -> Any:
        """The answer's body, parsed."""
        return json.loads(self.text(path))

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""
        try:
            self.text(path)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return False
            raise
        return True

    def _context(self) -> ssl.SSLContext:
        kubeconfig = json.loads(self._layout.kubeconfig.read_text())
        context = ssl.create_default_context(cafile=str(self._layout.pki / "ca.crt"))
        user = kubeconfig["users"][0]["user"]
        with tempfile.NamedTemporaryFile(dir=self._layout.pki) as pem:  # mode 0600
            for part in ("client-certificate-data", "client-key-data"):
                pem.write(base64.b64decode(user[part]))
            pem.flush()
            context.load_cert_chain(pem.name)
        return context
