"""The client of the API server against answers that no API server should give."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from infra.adapters import kube_api
from infra.adapters.kube_api import Expired, KubeApi, refusal
from infra.adapters.kube_config import Access
from schemas.errors import (
    AlreadyExists,
    Conflict,
    NoCapacity,
    NotFound,
    PigeonError,
    SandboxFailed,
    Unavailable,
)
from tests.contracts.waiting import soon

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
DENIED = 'pods is forbidden: User "w" cannot create resource "pods" in API group "" in the namespace "n"'
QUOTA = 'pods "one" is forbidden: exceeded quota: sandboxes, requested: pods=1, used: pods=20, limited: pods=20'
INSECURE = 'pods "one" is forbidden: violates PodSecurity "restricted:latest": privileged'


@asynccontextmanager
async def answering(handler: Handler) -> AsyncIterator[KubeApi]:
    """A client of a server that answers like this."""
    runner = web.ServerRunner(web.Server(handler), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession() as session:
        try:
            yield KubeApi(Access(host, None, lambda _: None), session, "n")
        finally:
            await runner.cleanup()


def answer(status: int, body: bytes, kind: str = "application/json") -> Handler:
    """Always this."""

    async def handler(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=status, body=body, content_type=kind)

    return handler


async def _hang_up(request: web.BaseRequest) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


GARBAGE: dict[str, Handler] = {
    "a page of a proxy": answer(502, b"<html>bad gateway</html>", "text/html"),
    "a sign-in page": answer(200, b"<html>who are you?</html>", "text/html"),
    "half an object": answer(200, b'{"kind": "Pod", "metad'),
    "nothing": answer(200, b""),
    "no text": answer(200, b"\xff\xfe\x00"),
    "another number": answer(418, b"{}"),
    "a status that is a list": answer(403, b"[]"),
    "a closed connection": _hang_up,
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_foreign_exceptions_never_leak(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes back, callers see one hierarchy, with the cause chained where there is one."""
    monkeypatch.setattr(kube_api, "CALL_SECONDS", 0.2)
    async with answering(GARBAGE[name]) as api:
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: api.get("one"),
            lambda: api.list(),
            lambda: api.create({}),
            lambda: api.patch("one", {}),
            lambda: api.delete("one", "u", grace_seconds=1),
            lambda: api.execute("one", ["x"]),
            lambda: _watch(api),
        ]
        for call in calls:
            try:
                await call()
            except PigeonError:
                continue


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno length",
    ],
    ids=["another protocol", "no chunk"],
)
async def test_no_error_shows_our_token(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are logged and shown to people; the client's own tell the whole request where an answer makes no sense."""
    monkeypatch.setattr(kube_api, "CALL_SECONDS", 0.2)

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(said)
        request.transport.close()
        return web.Response()

    async with answering(handler) as api:
        api._access.token = lambda _: "Bearer SECRET"
        for call in (lambda: api.get("one"), lambda: api.execute("one", ["x"]), lambda: _watch(api)):
            with pytest.raises(PigeonError) as raised:
                await soon(call())
            assert "SECRET" not in "".join(traceback.format_exception(raised.value))


async def _watch(api: KubeApi) -> None:
    async with api.watch("1") as events:
        async for _ in events:
            pass


@pytest.mark.parametrize(
    ("status", "reason", "message", "error"),
    [
        (404, "NotFound", 'pods "one" not found', NotFound),
        (404, "NotFound", 'namespaces "n" not found', Unavailable),
        (409, "AlreadyExists", 'pods "one" already exists', AlreadyExists),
        (409, "Conflict", "the object has been modified", Conflict),
        (410, "Expired", "too old resource version", Expired),
        (403, "Forbidden", QUOTA, NoCapacity),
        (403, "Forbidden", DENIED, Unavailable),
        (403, "Forbidden", 'unable to create in namespace "n" because it is being terminated', Unavailable),
        (403, "Forbidden", INSECURE, SandboxFailed),
        (
            403,
            "Forbidden",
            'pods "one" is forbidden: no PriorityClass with name pigeon-session was found',
            SandboxFailed,
        ),
        (403, "Forbidden", "maximum memory usage per Container is 2Gi, but limit is 4Gi", SandboxFailed),
        (400, "BadRequest", "strict decoding error", SandboxFailed),
        (422, "Invalid", 'Pod "one" is invalid', SandboxFailed),
        (402, "", "pay first", Unavailable),
    ],
)
def test_an_answer_has_one_meaning(status: int, reason: str, message: str, error: type[PigeonError]) -> None:
    """What waits in the queue, what fails, and what is tried again is decided in one place."""
    made = refusal(status, reason, message)
    assert type(made) is error
    assert message in str(made)


async def test_an_event_longer_than_any_buffer_is_read() -> None:
    """A pod's object may be longer than a reader's line."""
    long = "x" * 500_000
    line = f'{{"type": "ADDED", "object": {{"metadata": {{"name": "{long}"}}}}}}\n'.encode()
    error = b'{"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old"}}\n'

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for start in range(0, len(line), 70_001):
            await response.write(line[start : start + 70_001])
        await response.write(b"\n" + error)
        return response

    seen: list[tuple[str, int]] = []

    async def take_all() -> None:
        async with api.watch("1") as events:
            async for kind, thing in events:
                seen.append((kind, len(thing["metadata"]["name"])))

    async with answering(handler) as api:
        with pytest.raises(Expired):
            await take_all()
    assert seen == [("ADDED", 500_000)]


async def test_advice_is_taken_within_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry-After is waited out when it is short, and handed to the caller when it is long."""
    asked = 0
    advice = "1"

    async def handler(_: web.BaseRequest) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        if asked % 2:
            return web.json_response({"metadata": {}}, status=429, headers={"Retry-After": advice})
        return web.json_response({"items": None, "metadata": {"resourceVersion": "7"}})

    async with answering(handler) as api:
        assert await api.list() == ([], "7")
        assert asked == 2
        advice = "600"
        with pytest.raises(Unavailable):
            await api.list()
        assert asked == 3
        advice = "nan"
        assert await soon(api.list()) == ([], "7")


async def test_a_watch_through_a_silent_proxy_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts the connection and never says whether it reaches the API server."""
    monkeypatch.setattr(kube_api, "TRY_SECONDS", 0.3)
    left = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        left.set()

    proxy = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    access = Access("https://cluster.example", None, lambda _: None, proxy=f"http://127.0.0.1:{port}")
    async with proxy, aiohttp.ClientSession() as session:
        with pytest.raises(Unavailable):
            async with asyncio.timeout(10), KubeApi(access, session, "n").watch("1"):
                pass
        await session.close()
        await soon(left.wait())
