"""The HTTP functions as Python calls, for the command `pigeon` and for tests."""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import ValidationError

from infra.local.keys import token_secret
from infra.local.presence import find
from infra.sse import EventParser, ServerSentEvent
from producers.identity import sign_local_token
from schemas.errors import Malformed, PigeonError, Unavailable
from schemas.http import (
    AcceptedResponse,
    CleanupSessionResponse,
    CommandStatus,
    CreateSessionResponse,
    ExecuteCommandResponse,
    ListCommandsResponse,
    ListSessionsResponse,
    Problem,
    ReadFileResponse,
    SessionStatus,
    StreamedData,
    StreamedEnd,
    StreamedGap,
    SyncFilesResponse,
)
from schemas.ids import new_id
from schemas.lifecycle import UNSETTLED
from schemas.model import Model

CALL_SECONDS = 60.0  # one call; long polls and transfers wait up to half of it
SILENCE_SECONDS = 45.0  # a stream says something at least every 15 s
PAGE = 100  # sessions in one answer; the server's limit
POLL_SECONDS = 0.1  # between looks at a command
TRIES = 6  # of a call that may succeed later: about 8 s in all
UNREACHABLE_SECONDS = 30.0  # after which a server that stays away is given up by who waits for something
MAX_PORT = 65_535
TOKEN_LIFETIME = timedelta(minutes=5)  # signed anew for each request

Answer = TypeVar("Answer", bound=Model)
Streamed = StreamedData | StreamedGap | StreamedEnd | SessionStatus
STREAMED: dict[str, type[Streamed]] = {
    "message": StreamedData,
    "gap": StreamedGap,
    "state": SessionStatus,
    "end": StreamedEnd,
}


UNEXPECTED = "unexpected_answer"  # the code where the server is not one of ours, or of another version


class Address(Model):
    """What the local gateway answers to a request for a ticket."""

    address: str


class NotRunning(PigeonError):
    """No stack runs on this state folder."""

    code = "not_running"


class Unreachable(Unavailable):
    """The server cannot be reached, or the connection to it broke."""

    code = "unreachable"


class CallFailed(PigeonError):
    """The server answered with a problem document; `code` is the document's."""

    def __init__(self, status: int, code: str, detail: str, retry_after: float = 0.0) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.retry_after = retry_after
        self.retryable = status == 429 or status >= 500


class LocalToken(httpx.Auth):
    """Signs a short-lived token for each request with this machine's secret."""

    def __init__(self, secret: bytes, user: str) -> None:
        self._secret = secret
        self._user = user

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Put the token into the request."""
        request.headers["authorization"] = f"Bearer {sign_local_token(self._secret, self._user, TOKEN_LIFETIME)}"
        yield request


class FixedToken(httpx.Auth):
    """A token that somebody else signed."""

    def __init__(self, token: str) -> None:
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Put the token into the request."""
        request.headers["authorization"] = f"Bearer {self._token}"
        yield request


@asynccontextmanager
async def local(state: Path, user: str) -> AsyncIterator[Client]:
    """A client of the stack that runs on a state folder of this machine. Raises NotRunning or InsecureSecret."""
    presence = find(state)
    if presence is None:
        raise NotRunning(f"nothing runs on {state}: start it with `make up` or `pigeon up`")
    if presence.port is None:
        raise NotRunning(f"the stack on {state} is starting or stopping: try again in a moment")
    url = f"http://127.0.0.1:{presence.port}"
    async with _open(url, LocalToken(token_secret(state), user), trust_env=False) as client:
        yield client


@asynccontextmanager
async def remote(url: str, token: str) -> AsyncIterator[Client]:
    """A client of the functions at `url`, with an access token. Raises Malformed for what is no address."""
    try:
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > MAX_PORT:
            raise httpx.InvalidURL("http://HOST:PORT or https://HOST is what an address looks like")
    except httpx.InvalidURL as error:
        raise Malformed(f"'{url}' is no address: {error}") from error
    async with _open(url, FixedToken(token), trust_env=True) as client:
        yield client


@asynccontextmanager
async def _open(url: str, auth: httpx.Auth, *, trust_env: bool) -> AsyncIterator[Client]:
    async with httpx.AsyncClient(base_url=url, auth=auth, timeout=CALL_SECONDS, trust_env=trust_env) as http:
        yield Client(http)


class Client:
    """One caller's view. Calls that may succeed later are repeated, under the same idempotency key; every method
    raises CallFailed where the server refuses and Unreachable where it does not answer."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def create(self, *, reconnect: bool = False, rows: int = 24, cols: int = 80) -> CreateSessionResponse:
        """A new session, or with `reconnect` the newest live one if there is one."""
        body = {"reconnect": reconnect, "rows": rows, "cols": cols, "requestId": new_id()}
        return await self._post(CreateSessionResponse, "terminal-create-session", body)

    async def execute(self, session: str, command: str, timeout_seconds: int | None = None) -> ExecuteCommandResponse:
        """Submit a command; it starts once."""
        body = {"sessionId": session, "command": command, "commandId": new_id(), "timeoutSeconds": timeout_seconds}
        return await self._post(ExecuteCommandResponse, "terminal-execute-command", body)

    async def send_input(self, session: str, data: bytes) -> None:
        """Type these bytes."""
        body = {"sessionId": session, "data": base64.b64encode(data).decode(), "requestId": new_id()}
        await self._post(AcceptedResponse, "terminal-send-input", body)

    async def resize(self, session: str, rows: int, cols: int) -> None:
        """Say the terminal's new size, in cells."""
        body = {"sessionId": session, "rows": rows, "cols": cols, "requestId": new_id()}
        await self._post(AcceptedResponse, "terminal-resize", body)

    async def signal(self, session: str, name: str, command: str | None = None) -> None:
        """Signal whatever holds the terminal, or cancel `command`."""
        body = {"sessionId": session, "signal": name, "commandId": command, "requestId": new_id()}
        await self._post(AcceptedResponse, "terminal-signal", body)

    async def push(self, session: str, files: list[dict[str, Any]]) -> SyncFilesResponse:
        """Write files; each is a FileEntry in JSON."""
        body = {"sessionId": session, "fileStructure": files, "requestId": new_id()}
        return await self._post(SyncFilesResponse, "terminal-sync-files", body)

    async def read_file(self, session: str, path: str) -> ReadFileResponse:
        """A file of the workspace."""
        return await self._get(ReadFileResponse, f"terminal-read-file/{session}", {"path": path})

    async def status(self, session: str) -> SessionStatus:
        """A session as it is now."""
        return await self._get(SessionStatus, f"terminal-get-status/{session}")

    async def sessions(self, *, live: bool = False) -> list[SessionStatus]:
        """The caller's sessions, newest first: all of them, or those that have not ended."""
        asked: dict[str, Any] = {"limit": PAGE, "live": live}
        found: list[SessionStatus] = []
        while True:
            page = (await self._get(ListSessionsResponse, "terminal-list-sessions", asked)).sessions
            found += page
            if len(page) < PAGE:
                return found
            asked["before"] = page[-1].model_dump(mode="json")["created_at"]

    async def commands(self, session: str, after: int = 0) -> tuple[CommandStatus, ...]:
        """A session's commands with a number greater than `after`."""
        return (await self._get(ListCommandsResponse, f"terminal-list-commands/{session}", {"after": after})).commands

    async def ended(self, session: str, command_id: str) -> CommandStatus:
        """That command, once it has ended; there is no stream of such news, so this asks again and again."""
        after, patience = 0, _Patience()
        while True:
            try:
                page = await self.commands(session, after)
            except (CallFailed, Unreachable) as error:
                patience.bear(error)  # a call alone gives up long before a server has started again
                continue
            patience = _Patience()
            found = next((command for command in page if command.command_id == command_id), None)
            if found is not None and found.state not in UNSETTLED:
                return found
            if found is None and page:
                after = page[-1].number  # what comes later has a greater one
            else:
                await asyncio.sleep(POLL_SECONDS)

    async def close(self, session: str) -> CleanupSessionResponse:
        """End a session."""
        return await self._call(CleanupSessionResponse, "DELETE", f"terminal-cleanup-session/{session}")

    async def address(self) -> str:
        """A fresh one-time address of the local page."""
        return (await self._call(Address, "POST", "tickets")).address

    async def stream(
        self, session: str, offset: int = 0, on_break: Callable[[PigeonError], None] = lambda _: None
    ) -> AsyncGenerator[Streamed, None]:
        """The transcript from `offset` on and the session's states, until StreamedEnd, which comes last.

        A broken connection is picked up where it broke (`on_break` hears of it), for UNREACHABLE_SECONDS.
        """
        position = str(offset)
        attempt, patience = 0, _Patience()
        while True:
            try:
                async for event in self._events(session, position):
                    attempt, patience = 0, _Patience()
                    position = event.id or position
                    if event.type == "problem":
                        raise _problem(event.data)
                    kind = STREAMED.get(event.type)
                    if kind is None:
                        continue
                    item = _parse(kind, event.data)
                    yield item
                    if isinstance(item, StreamedEnd):
                        return
            except (CallFailed, Unreachable) as error:
                patience.bear(error)
                on_break(error)
            await asyncio.sleep(backoff(attempt))
            attempt += 1

    async def _events(self, session: str, position: str) -> AsyncIterator[ServerSentEvent]:
        parser = EventParser()
        headers = {"last-event-id": position, "accept": "text/event-stream"}
        timeout = httpx.Timeout(CALL_SECONDS, read=SILENCE_SECONDS)
        path = f"/terminal-stream-output/{session}"
        try:
            async with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
                if response.is_error:
                    await response.aread()
                    raise _failure(response)
                async for data in response.aiter_bytes():
                    for event in parser.feed(data):
                        yield event
        except httpx.TransportError as error:
            raise Unreachable(_words(error, self._http.base_url)) from error

    async def _post(self, kind: type[Answer], function: str, body: dict[str, Any]) -> Answer:
        return await self._call(kind, "POST", function, json={k: v for k, v in body.items() if v is not None})

    async def _get(self, kind: type[Answer], function: str, params: dict[str, Any] | None = None) -> Answer:
        return await self._call(kind, "GET", function, params=params)

    async def _call(self, kind: type[Answer], method: str, path: str, **arguments: Any) -> Answer:
        return _parse(kind, await self._bytes(method, path, **arguments))

    async def _bytes(self, method: str, path: str, **arguments: Any) -> bytes:
        for attempt in range(TRIES):
            try:
                return await self._once(method, path, **arguments)
            except (CallFailed, Unreachable) as error:
                if not error.retryable or error.code == "limit_reached" or attempt == TRIES - 1:
                    raise
                await asyncio.sleep(max(backoff(attempt), getattr(error, "retry_after", 0.0)))
        raise AssertionError("the last try returns or raises")

    async def _once(self, method: str, path: str, **arguments: Any) -> bytes:
        try:
            response = await self._http.request(method, f"/{path}", **arguments)
        except httpx.TransportError as error:
            raise Unreachable(_words(error, self._http.base_url)) from error
        if not response.is_success:
            raise _failure(response)
        return response.content


class _Patience:
    """How long a server has been away. Not when it last spoke: an idle session is quiet for hours."""

    def __init__(self) -> None:
        self._since = float("inf")

    def bear(self, error: CallFailed | Unreachable) -> None:
        """Raises the error if to go on trying is no use, or has been none for UNREACHABLE_SECONDS."""
        now = asyncio.get_running_loop().time()
        self._since = min(self._since, now)
        if not error.retryable or now - self._since > UNREACHABLE_SECONDS:
            raise error


def backoff(attempt: int) -> float:
    """Seconds before try number `attempt` + 1: doubling from a quarter to four, spread by half."""
    return float(min(4.0, 0.25 * 2**attempt)) * random.uniform(0.75, 1.25)  # noqa: S311 - no secret


def _failure(response: httpx.Response) -> CallFailed:
    try:
        return _problem(response.content)
    except ValidationError:
        words = f"{response.request.url} answered {response.status_code}, and no problem document"
        return CallFailed(response.status_code, UNEXPECTED, words)


def _problem(document: bytes | str) -> CallFailed:
    """A problem document as an error. Raises ValidationError where it is none."""
    problem = Problem.model_validate_json(document)
    return CallFailed(problem.status, problem.code, problem.detail, float(problem.retry_after or 0))


def _parse(kind: type[Answer], text: bytes | str) -> Answer:
    """An answer or an event of a stream. Raises CallFailed where it is not what it should be."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        words = f"the server's {kind.__name__} is none: {error.errors(include_url=False)[0]['msg']}"
        raise CallFailed(200, UNEXPECTED, words) from error


def _words(error: httpx.TransportError, url: httpx.URL) -> str:
    return f"{url} does not answer ({str(error) or type(error).__name__})"
