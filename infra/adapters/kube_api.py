"""The calls of the API server that we make: raw JSON, each with a time-out and retries, its errors translated, once."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, NoReturn
from urllib.parse import quote

import aiohttp
from aiohttp.client_proto import ResponseHandler

from infra.adapters.kube_config import Access, load
from infra.adapters.kube_exec import OPENING_SECONDS, PROTOCOLS, ExecStream
from infra.adapters.kube_pod import CONTAINER, NAME, SELECTOR
from infra.adapters.kube_settings import KubeSettings
from schemas.errors import (
    AgentUnreachable,
    AlreadyExists,
    Conflict,
    NoCapacity,
    NotFound,
    PigeonError,
    SandboxFailed,
    Unavailable,
)
from schemas.limits import MIB

Object = dict[str, Any]

CALL_SECONDS = 15.0  # of trying, all in all: somebody waits for the answer
TRY_SECONDS = 8.0  # for one try
RETRY_MIN_SECONDS, RETRY_MAX_SECONDS = 0.1, 2.0
RETRY_AFTER_MAX_SECONDS = 10.0  # a longer advice is answered with Unavailable, and whoever called comes again
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
WATCH_SECONDS = 290  # after which the server ends a watch, and we open the next
WATCH_SILENCE_SECONDS = 100.0  # bookmarks come every minute: a watch silent for longer is dead
WATCH_READ_BYTES = 1 * MIB
MERGE_PATCH = "application/merge-patch+json"


class Expired(PigeonError):
    """The server does not know any more what happened since then (410): list anew."""

    code = "expired"
    retryable = True


class _Busy(Unavailable):
    """The same call may succeed soon; `advised` is how many seconds the server wants to be left alone."""

    def __init__(self, reason: str, advised: float = 0.0) -> None:
        super().__init__(reason)
        self.advised = advised


class KubeApi:
    """One namespace's pods. Every call raises Unavailable when the server cannot be had or does not let us, and what
    `refusal` makes of its answer. All calls may be repeated: names, uids and versions see to that."""

    def __init__(self, access: Access, session: aiohttp.ClientSession, namespace: str) -> None:
        self.host = access.host
        self._access = access
        self._session = session
        self._pods = f"{access.host}/api/v1/namespaces/{quote(namespace, safe='')}/pods"

    async def create(self, pod: Object) -> Object:
        """Raises AlreadyExists, NoCapacity (quota) or SandboxFailed (refused for good)."""
        return await self._call("POST", self._pods, json=pod)

    async def try_create(self, pod: Object) -> None:
        """Have the server judge a pod as if it was to be created. Raises what `create` does."""
        await self._call("POST", self._pods, json=pod, params={"dryRun": "All"})

    async def get(self, name: str) -> Object | None:
        """The pod, read consistently, or None."""
        try:
            return await self._call("GET", self._pod(name))
        except NotFound:
            return None

    async def list(self, selector: str = SELECTOR) -> tuple[list[Object], str]:
        """The pods with these labels, read consistently, and the version of the list."""
        answer = await self._call("GET", self._pods, params={"labelSelector": selector})
        return answer.get("items") or [], str(answer["metadata"].get("resourceVersion"))

    async def patch(self, name: str, change: Object) -> Object:
        """A JSON merge patch. Raises NotFound, or Conflict where it names another version or uid."""
        body = json.dumps(change)
        return await self._call("PATCH", self._pod(name), data=body, headers={"Content-Type": MERGE_PATCH})

    async def delete(self, name: str, uid: str, *, grace_seconds: int, version: int | None = None) -> None:
        """Ask for the pod's end. Raises NotFound, or Conflict if the name is another incarnation's, or `version` is not
        the pod's any more."""
        preconditions = {"uid": uid} | ({} if version is None else {"resourceVersion": str(version)})
        options = {"preconditions": preconditions, "gracePeriodSeconds": grace_seconds}
        await self._call("DELETE", self._pod(name), json=options)

    @asynccontextmanager
    async def watch(self, version: str) -> AsyncIterator[AsyncIterator[tuple[str, Object]]]:
        """What happens to our pods after that version, as (type, object); ends when the server ends it.

        Raises Expired when the version is too old, or of a future that a restored server does not know, of which it
        says nothing at all; Unavailable when the connection breaks.
        """
        params = {
            "labelSelector": SELECTOR,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        patience = aiohttp.ClientTimeout(total=None, connect=TRY_SECONDS, sock_read=WATCH_SILENCE_SECONDS)
        try:
            async with self._session.get(
                self._pods, params=params, timeout=patience, **await self._common()
            ) as response:
                if response.status != 200:
                    await self._refuse(response)
                async with aclosing(_events(response.content)) as events:
                    yield events
        except aiohttp.SocketTimeoutError as error:
            raise Expired("the watch of the pods said nothing for too long") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"the watch of the pods broke: {_words(error)}") from error

    async def execute(self, name: str, command: Sequence[str]) -> ExecStream:
        """Start a program in the pod's container. Raises NotFound, AgentUnreachable or Unavailable."""
        query = [("command", word) for word in command]
        query += [("container", CONTAINER), ("stdin", "true"), ("stdout", "true"), ("stderr", "true"), ("tty", "false")]
        try:
            async with asyncio.timeout(OPENING_SECONDS):
                return ExecStream(await self._open(f"{self._pod(name)}/exec", query))
        except aiohttp.WSServerHandshakeError as error:
            if error.status == 404:
                raise NotFound(f"there is no pod {name}") from error
            raise AgentUnreachable(f"exec was refused: {error.status} {error.message}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise AgentUnreachable(f"exec could not be started: {_words(error)}") from error

    async def _open(self, url: str, query: Sequence[tuple[str, str]]) -> aiohttp.ClientWebSocketResponse:
        for again in (True, False):
            try:
                websocket: aiohttp.ClientWebSocketResponse = await self._session.ws_connect(
                    url, params=query, protocols=PROTOCOLS, compress=0, max_msg_size=MIB, **await self._common()
                )
                return websocket
            except aiohttp.WSServerHandshakeError as error:
                if error.status != 401 or not again:
                    raise
                self._access.refused()
        raise AssertionError("the second try has no further one")

    def _pod(self, name: str) -> str:
        """The pod's address. Raises NotFound for what can be no pod's name, and might be a path."""
        if not NAME.fullmatch(name):
            raise NotFound(f"not a name for a pod: {name!r}")
        return f"{self._pods}/{name}"

    async def _common(self, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """What every request needs. Raises Unavailable without a token."""
        access = self._access
        return {
            "headers": {**await access.headers(), **(headers or {})},
            "proxy": access.proxy,
            "server_hostname": access.server_name,
        }

    async def _call(self, method: str, url: str, **options: Any) -> Object:
        """One call, tried until it is answered or its time is over."""
        deadline = time.monotonic() + CALL_SECONDS
        delay = RETRY_MIN_SECONDS
        while True:
            try:
                return await self._once(method, url, **options)
            except _Busy as busy:
                pause = max(busy.advised, delay * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries
                if busy.advised > RETRY_AFTER_MAX_SECONDS or time.monotonic() + pause >= deadline:
                    raise
            await asyncio.sleep(pause)
            delay = min(2 * delay, RETRY_MAX_SECONDS)

    async def _once(self, method: str, url: str, *, headers: Mapping[str, str] | None = None, **options: Any) -> Object:
        common = await self._common(headers)
        try:
            async with self._session.request(method, url, **options, **common) as response:
                if response.status >= 300:
                    await self._refuse(response)
                return _object(await response.read())
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: cut, or no JSON
            raise _Busy(f"the cluster's API server does not answer: {_words(error)}") from error

    async def _refuse(self, response: aiohttp.ClientResponse) -> NoReturn:
        """Raise what the answer means."""
        if response.status == 401:
            self._access.refused()
        try:
            status = _object(await response.read())
        except ValueError:  # a proxy's page
            status = {}
        if response.status in TRANSIENT or response.status == 401:
            words = f"the cluster's API server is not able to: {response.status} {status.get('message', '')}"
            raise _Busy(words, _retry_after(response))
        reason, message = str(status.get("reason") or ""), str(status.get("message") or response.reason or "")
        error = refusal(response.status, reason, message)
        if isinstance(error, SandboxFailed) and response.method in ("GET", "DELETE"):
            raise Unavailable(str(error))  # says nothing of the sandbox, and what may look or delete changes
        raise error


def refusal(status: int, reason: str, message: str) -> PigeonError:
    """What an answer of the API server means to us."""
    said = f"the cluster says: {message}"
    match status, reason:
        case 404, _ if "namespaces" not in message:
            return NotFound(said)
        case 409, "AlreadyExists":
            return AlreadyExists(said)
        case 409, _:  # also of a quota that two creates count at once
            return Conflict(said)
        case 410, _:
            return Expired(said)
        case 403, _ if "exceeded quota" in message:
            return NoCapacity(said)
        case 403, _ if " cannot " in message and " resource " in message:  # our account's rights
            return Unavailable(said)
        case 403, _ if "being terminated" in message:  # the namespace
            return Unavailable(said)
        case ((400 | 403 | 413 | 415 | 422), _):
            return SandboxFailed(said)
    return Unavailable(f"{said} ({status})")


def _words(error: Exception) -> str:
    """What an error of the HTTP client says. Its `repr` may show the request's headers, and so our token."""
    if isinstance(error, aiohttp.ClientResponseError):
        return f"{error.status} {error.message}".strip()
    return str(error) or type(error).__name__


def _object(body: bytes) -> Object:
    """An answer of an API server. Raises ValueError for anything else."""
    answer = json.loads(body)
    if not isinstance(answer, dict) or not isinstance(answer.get("metadata"), dict):
        raise ValueError(f"no object: {body[:100]!r}")
    return answer


def _retry_after(response: aiohttp.ClientResponse) -> float:
    try:
        return int(response.headers.get("Retry-After", 0))
    except ValueError:  # a date
        return 0.0


async def _events(content: aiohttp.StreamReader) -> AsyncGenerator[tuple[str, Object], None]:
    """One JSON object a line; an object may be longer than the reader's own limit for lines."""
    rest = b""
    async for piece in content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in filter(None, lines):
            yield _event(line)


def _event(line: bytes) -> tuple[str, Object]:
    try:
        event = json.loads(line)
        kind, thing = event["type"], dict(event["object"])
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"the watch said what is no event: {line[:100]!r}") from error
    if kind == "ERROR":
        raise refusal(thing.get("code", 500), thing.get("reason", ""), thing.get("message", ""))
    return kind, thing


class _Connection(ResponseHandler):
    """One that is closed is closed at once. TLS would wait half a minute for the server's own farewell, and with it the
    socket of a watch that a worker gives up as it ends."""

    def close(self) -> None:
        self.abort()


@asynccontextmanager
async def kube_api(settings: KubeSettings) -> AsyncIterator[KubeApi]:
    """A client of the cluster that the settings name. Raises NoCluster."""
    access = await load(settings)
    connector = aiohttp.TCPConnector(limit=0, ssl=access.tls or True)
    connection: type[ResponseHandler] = _Connection
    connector._factory = functools.partial(connection, loop=asyncio.get_running_loop())
    patience = aiohttp.ClientTimeout(total=TRY_SECONDS)
    async with aiohttp.ClientSession(connector=connector, timeout=patience, trust_env=False) as session:
        yield KubeApi(access, session, settings.namespace)
