"""How to reach an API server and prove who we are: the official client's configuration, and nothing else of it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import os
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from kubernetes.client.configuration import Configuration
from kubernetes.config.incluster_config import load_incluster_config
from kubernetes.config.kube_config import load_kube_config

from infra.adapters.kube_settings import KubeSettings
from schemas.errors import Unavailable

T = TypeVar("T")

GOOGLE_SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
TOKEN_SECONDS = 30.0  # that a token is used without asking for it again; whoever issues them keeps minutes in reserve
REFRESH_SECONDS = 20.0  # for a token from a plugin or over the network


class NoCluster(Unavailable):
    """There is no usable configuration for a cluster; the message says which was tried."""

    code = "no_cluster"
    retryable = False


@dataclass(slots=True)
class Access:
    """One API server, and the current proof of who we are. `server_name` is what its certificate must name, if not its
    host; `proxy` is an HTTP proxy's address, or None."""

    host: str
    tls: ssl.SSLContext | None
    token: Callable[[bool], str | None]  # may block; told whether the server did not take the last one
    server_name: str | None = None
    proxy: str | None = None
    _header: dict[str, str] = field(default_factory=dict)
    _fresh_until: float = 0.0
    _refused: bool = False
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def headers(self) -> dict[str, str]:
        """The Authorization header, if there is one. Raises Unavailable when no token can be had."""
        if time.monotonic() < self._fresh_until:
            return self._header
        async with self._lock:
            if time.monotonic() >= self._fresh_until:
                self._header = await self._ask()
                self._fresh_until = time.monotonic() + TOKEN_SECONDS
        return self._header

    def refused(self) -> None:
        """The server did not take the token: ask for another one next time."""
        self._fresh_until = 0.0
        self._refused = True

    async def _ask(self) -> dict[str, str]:
        try:
            async with asyncio.timeout(REFRESH_SECONDS):
                token = await _in_thread(functools.partial(self.token, self._refused))
        except Exception as error:  # plugins, files and identity services fail in their own ways
            raise Unavailable(f"no token for the cluster: {str(error) or 'it took too long'}") from error
        self._refused = False
        return {"Authorization": token} if token else {}


async def _in_thread(work: Callable[[], T]) -> T:
    """What it returns or raises. A plugin may hang for ever: it must hold up neither the few threads that everything
    else shares nor the end of the process."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: Exception | None) -> None:
        if result.done():  # whoever asked has gone
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(cast(T, value))

    def run() -> None:
        try:
            outcome: tuple[T | None, Exception | None] = (work(), None)
        except Exception as error:
            outcome = (None, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, daemon=True, name="token").start()
    return await result


async def load(settings: KubeSettings) -> Access:
    """Read the configuration that `settings.access` names. Raises NoCluster."""
    try:
        async with asyncio.timeout(REFRESH_SECONDS):
            return await _in_thread(functools.partial(_load, settings))
    except TimeoutError as error:
        raise NoCluster(f"no cluster can be reached ({settings.access}): its configuration took too long") from error


def _load(settings: KubeSettings) -> Access:
    try:
        return _access(settings)
    except Exception as error:  # a parser, a missing field, a file that is not there
        raise NoCluster(f"no cluster can be reached ({settings.access}): {error}") from error


def _configuration(settings: KubeSettings) -> Configuration:
    configuration = Configuration(proxy="")  # by default the environment's, without regard to its exceptions
    match settings.access:
        case "google":
            _google(configuration, settings)
        case "in-cluster":
            _in_cluster(configuration)
        case "auto" if settings.kubeconfig is None and ACCOUNT.exists():
            _in_cluster(configuration)
        case _:
            load_kube_config(  # type: ignore[no-untyped-call]
                config_file=str(
                    settings.kubeconfig or os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config"
                ),
                context=settings.context or None,
                client_configuration=configuration,
                persist_config=False,
            )
    return configuration


def _in_cluster(configuration: Configuration) -> None:
    """By the account of the pod that we run in, whose token the kubelet replaces under way."""
    load_incluster_config(configuration, try_refresh_token=False)  # type: ignore[no-untyped-call]

    def reread(current: Configuration) -> None:
        current.api_key["BearerToken"] = f"Bearer {ACCOUNT.read_text()}"

    configuration.refresh_api_key_hook = reread  # type: ignore[assignment]


def _google(configuration: Configuration, settings: KubeSettings) -> None:
    """A cluster of Google's by the credentials of the environment, without a kubeconfig or gcloud."""
    if not settings.server:
        raise ValueError("`server` is not set")
    import google.auth.transport.requests  # not everybody who has a cluster has Google's libraries

    credentials, _ = google.auth.default(scopes=GOOGLE_SCOPES)
    request = google.auth.transport.requests.Request()

    def refresh(current: Configuration) -> None:
        if not credentials.valid:
            credentials.refresh(request)  # type: ignore[no-untyped-call]
        current.api_key["BearerToken"] = f"Bearer {credentials.token}"

    configuration.host = settings.server if "://" in settings.server else f"https://{settings.server}"
    configuration.ca_cert_data = base64.b64decode(settings.server_ca, validate=True).decode() or None
    configuration.refresh_api_key_hook = refresh  # type: ignore[assignment]


def _access(settings: KubeSettings) -> Access:
    configuration = _configuration(settings)

    def token(refused: bool) -> str | None:
        """From memory as long as it serves. One that was refused is not trusted to tell when it ends: a file was
        replaced, or a plugin named no time."""
        nonlocal configuration
        if not refused:
            return _token(configuration)
        anew = _configuration(settings)
        found = _token(anew)
        if found is None and _token(configuration) is not None:  # a plugin that fails is only logged
            raise ValueError("the configuration names none any more")
        configuration = anew
        return found

    host = str(configuration.host).rstrip("/")
    return Access(
        host=host,
        tls=_tls(configuration) if host.startswith("https://") else None,
        token=token,
        server_name=configuration.tls_server_name or None,
        proxy=configuration.proxy or None,
    )


def _token(configuration: Configuration) -> str | None:
    found: str | None = configuration.get_api_key_with_prefix("BearerToken", "authorization")
    return found.strip() if found else None  # files end in a new line


def _tls(configuration: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert, cadata=configuration.ca_cert_data)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
