"""The exec stream against a WebSocket server that says what an API server might."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from infra.adapters import kube_exec
from infra.adapters.kube_api import KubeApi
from infra.adapters.kube_config import Access
from infra.adapters.kube_exec import MAX_SAID, V4, V5, ExecStream, Exit, parse_status
from schemas.errors import AgentUnreachable, NotFound
from schemas.limits import KIB, MIB
from tests.contracts.waiting import soon
from tests.waiting import until

Talk = Callable[[web.WebSocketResponse], Awaitable[None]]
SUCCESS = json.dumps({"metadata": {}, "status": "Success"}).encode()


def failure(code: int) -> bytes:
    """The status of a program that ended with this code."""
    cause = {"reason": "ExitCode", "message": str(code)}
    return json.dumps({"status": "Failure", "message": f"exit status {code}", "details": {"causes": [cause]}}).encode()


class Server:
    """Upgrades every exec to `protocols`, then talks; remembers the queries."""

    def __init__(self, talk: Talk, protocols: tuple[str, ...]) -> None:
        self.talk = talk
        self.protocols = protocols
        self.asked: list[web.BaseRequest] = []
        self.refuse = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One exec."""
        self.asked.append(request)
        if self.refuse:
            return web.json_response({"kind": "Status", "message": "no"}, status=self.refuse)
        socket = web.WebSocketResponse(protocols=self.protocols)
        await socket.prepare(request)
        await self.talk(socket)
        return socket


@asynccontextmanager
async def serving(talk: Talk, *protocols: str) -> AsyncIterator[tuple[Server, KubeApi]]:
    """A server on a free port, and a client of it."""
    server = Server(talk, protocols or (V5, V4))
    runner = web.ServerRunner(web.Server(server.handle), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    access = Access(f"http://127.0.0.1:{runner.addresses[0][1]}", None, lambda _: "Bearer t")
    async with aiohttp.ClientSession() as session:
        try:
            yield server, KubeApi(access, session, "here")
        finally:
            await runner.cleanup()


async def everything(stream: ExecStream, limit: int = 64 * KIB) -> bytes:
    """Read to the end."""
    parts = []
    while part := await soon(stream.read(limit)):
        assert len(part) <= limit
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("protocol", [V5, V4])
async def test_bytes_arrive_as_they_were_however_they_are_cut(protocol: str) -> None:
    """A frame's limits mean nothing: neither in a character nor in a byte sequence."""
    said = "zażółć gęślą jaźń \x00\xff".encode() * 50

    async def talk(socket: web.WebSocketResponse) -> None:
        await socket.send_bytes(b"\x01")  # empty, as the first one always is
        for start in range(0, len(said), 7):
            await socket.send_bytes(b"\x01" + said[start : start + 7])
            await socket.send_bytes(b"")
        await socket.send_bytes(b"\x03" + SUCCESS)
        await socket.close()

    async with serving(talk, protocol) as (server, api):
        stream = await api.execute("one", ["a", "b c"])
        assert await everything(stream, 5) == said
        assert stream.exit == Exit(0)
        await stream.close()
    query = server.asked[0].query
    assert query.getall("command") == ["a", "b c"]
    assert {name: query[name] for name in ("stdin", "stdout", "stderr", "tty", "container")} == {
        **dict.fromkeys(("stdin", "stdout", "stderr"), "true"),
        "tty": "false",
        "container": "sandbox",
    }
    assert server.asked[0].path == "/api/v1/namespaces/here/pods/one/exec"


async def test_an_end_without_status_is_a_lost_connection() -> None:
    """A cut connection is never exit code 0."""

    async def talk(socket: web.WebSocketResponse) -> None:
        await socket.send_bytes(b"\x01half")
        await socket.close()

    async with serving(talk) as (_, api):
        stream = await api.execute("one", ["x"])
        assert await everything(stream) == b"half"
        assert stream.exit is None
        assert "cut" in stream.why()


async def test_a_connection_cut_in_a_frame_ends_the_stream() -> None:
    """What came whole is given out; nothing hangs."""

    async def talk(socket: web.WebSocketResponse) -> None:
        await socket.send_bytes(b"\x01whole")
        transport = socket._req.transport if socket._req else None
        assert transport is not None
        transport.write(b"\x82\x7e\x01\x00\x01half a frame")
        await asyncio.sleep(0)
        transport.close()
        await asyncio.sleep(0)

    async with serving(talk) as (_, api):
        stream = await api.execute("one", ["x"])
        assert await everything(stream) == b"whole"
        assert stream.exit is None
        with pytest.raises(AgentUnreachable):
            await soon(stream.write(b"x" * MIB))


async def test_standard_error_is_kept_apart_and_bounded() -> None:
    """What a helper complains of is not the terminal's output, and no flood of it fills the memory."""

    async def talk(socket: web.WebSocketResponse) -> None:
        for _ in range(100):
            await socket.send_bytes(b"\x02agent attach: refused\n" + b"x" * KIB)
        await socket.send_bytes(b"\x01out")
        await socket.send_bytes(b"\x03" + failure(1))
        await socket.close()

    async with serving(talk) as (_, api):
        stream = await api.execute("one", ["x"])
        assert await everything(stream) == b"out"
        assert stream.exit == Exit(1, "exit status 1")
        assert stream.why().startswith("agent attach: refused")
        assert len(stream.said) <= MAX_SAID


async def test_the_status_is_the_end_even_if_the_server_stays() -> None:
    """A server that freezes after the status holds nobody up."""

    async def talk(socket: web.WebSocketResponse) -> None:
        await socket.send_bytes(b"\x03" + SUCCESS)
        await socket.receive()

    async with serving(talk) as (_, api):
        stream = await api.execute("one", ["x"])
        assert await everything(stream) == b""
        assert stream.exit == Exit(0)
        await soon(stream.close())


@pytest.mark.parametrize("protocol", [V5, V4])
async def test_what_is_written_arrives_and_its_end_is_told(protocol: str) -> None:
    """A large write is cut into messages; closing ends the program's input where the protocol can say so."""
    heard: list[bytes] = []
    done = asyncio.Event()

    async def talk(socket: web.WebSocketResponse) -> None:
        async for message in socket:
            heard.append(message.data)
        done.set()

    said = bytes(range(256)) * KIB
    async with serving(talk, protocol) as (_, api):
        stream = await api.execute("one", ["x"])
        await soon(stream.write(said))
        await stream.close()
        await soon(done.wait())
        await stream.close()
    assert (heard[-1] == b"\xff\x00") is (protocol == V5)
    pieces = heard[:-1] if protocol == V5 else heard
    assert all(piece[:1] == b"\x00" for piece in pieces)
    assert b"".join(piece[1:] for piece in pieces) == said


async def test_closing_from_elsewhere_ends_a_read() -> None:
    """An exec whose pod is gone may stand still for ever: the watch closes it under its reader."""

    async def talk(socket: web.WebSocketResponse) -> None:
        await socket.send_bytes(b"\x01last words")
        await asyncio.Event().wait()

    async with serving(talk) as (_, api):
        stream = await api.execute("one", ["x"])
        assert await soon(stream.read(100)) == b"last words"
        reading = asyncio.create_task(stream.read(100))
        closing = asyncio.create_task(stream.close_after(0))
        assert await soon(reading) == b""
        await soon(closing)


async def test_a_slow_reader_loses_nothing_and_fills_no_memory() -> None:
    """What nobody reads stays with the program that wrote it, for as long as it takes."""
    sent = 0
    total = 64 * MIB
    stuck = asyncio.Event()

    async def talk(socket: web.WebSocketResponse) -> None:
        nonlocal sent
        piece = b"\x01" + bytes(32 * KIB)
        while sent < total:
            sending = asyncio.create_task(socket.send_bytes(piece))
            _, waits = await asyncio.wait({sending}, timeout=0.5)
            if waits:
                stuck.set()
            await sending
            sent += 32 * KIB
        await socket.send_bytes(b"\x03" + SUCCESS)
        await socket.close()

    async with serving(talk) as (_, api):
        stream = await api.execute("one", ["x"])
        await soon(stream.read(1))
        await soon(stuck.wait())
        assert sent < total / 2
        assert len(await everything(stream, MIB)) == total - 1
        assert stream.exit == Exit(0)


async def test_a_write_that_nobody_takes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen API server is a lost connection, and the write says so."""
    monkeypatch.setattr(kube_exec, "WRITE_SECONDS", 0.3)

    async def talk(socket: web.WebSocketResponse) -> None:
        await asyncio.Event().wait()

    async with serving(talk) as (_, api):
        stream = await api.execute("one", ["x"])
        with pytest.raises(AgentUnreachable):
            await soon(stream.write(bytes(64 * MIB)))
        assert await soon(stream.read(1)) == b""
        assert not await _waits(stream)  # or the socket stays open for it


async def test_a_write_that_is_cancelled_half_way_ends_the_connection() -> None:
    """A handler that loses its lease in the middle of a large push: nothing later is taken for the rest of it."""

    async def talk(socket: web.WebSocketResponse) -> None:
        await asyncio.Event().wait()

    async with serving(talk) as (_, api):
        stream = await api.execute("one", ["x"])
        writing = asyncio.create_task(stream.write(bytes(64 * MIB)))
        await until(lambda: _waits(stream), "the other side takes no more")
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        assert await soon(stream.read(1)) == b""
        with pytest.raises(AgentUnreachable):
            await soon(stream.write(b"next"))


async def _lost(stream: ExecStream) -> None:
    """The connection breaks while nobody reads."""
    await until(lambda: _broken(stream), "the connection is lost")
    await stream.close()


async def _broken(stream: ExecStream) -> bool:
    transport = stream._websocket._writer.transport
    return transport is None or transport.is_closing()


async def _write_cancelled(stream: ExecStream) -> None:
    writing = asyncio.create_task(stream.write(bytes(64 * MIB)))
    await until(lambda: _waits(stream), "the other side takes no more")
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    await stream.close()


async def _close_cancelled(stream: ExecStream) -> None:
    """By a worker that stops, while the other side takes nothing."""
    writing = asyncio.create_task(stream.write(bytes(64 * MIB)))
    await until(lambda: _waits(stream), "the other side takes no more")
    closing = asyncio.create_task(stream.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(closing)
    assert not await _waits(stream)
    await asyncio.gather(writing, return_exceptions=True)


@pytest.mark.parametrize("end", [_lost, _write_cancelled, _close_cancelled])
async def test_however_a_connection_ends_nothing_of_it_is_kept(end: Callable[[ExecStream], Awaitable[None]]) -> None:
    """A worker has thousands of them in its life; what it did not let go of, the garbage collector complained of."""

    async def talk(socket: web.WebSocketResponse) -> None:
        if end is _lost:
            assert socket._req is not None
            assert socket._req.transport is not None
            socket._req.transport.abort()
        else:
            await asyncio.Event().wait()

    async with serving(talk) as (_, api):
        stream = await api.execute("one", ["x"])
        await end(stream)
        assert api._session.connector is not None
        assert not api._session.connector._acquired
        assert not await _waits(stream)


async def _waits(stream: ExecStream) -> bool:
    transport = stream._websocket._writer.transport
    return transport is not None and transport.get_write_buffer_size() > 0


async def _silent(socket: web.WebSocketResponse) -> None:
    await socket.close()


@pytest.mark.parametrize(("status", "error"), [(404, NotFound), (403, AgentUnreachable), (500, AgentUnreachable)])
async def test_a_refused_upgrade_is_one_of_our_errors(status: int, error: type[Exception]) -> None:
    """No error of the HTTP client leaves the adapter."""
    async with serving(_silent) as (server, api):
        server.refuse = status
        with pytest.raises(error):
            await api.execute("one", ["x"])


async def test_an_expired_token_is_asked_for_again() -> None:
    """A session that starts as the token expires does not notice."""
    async with serving(_silent) as (server, api):
        server.refuse = 401
        tokens = iter(["Bearer old", "Bearer new"])

        def token(_: bool) -> str:
            if (given := next(tokens)) == "Bearer new":
                server.refuse = 0
            return given

        api._access.token = token
        stream = await api.execute("one", ["x"])
        assert [each.headers["Authorization"] for each in server.asked] == ["Bearer old", "Bearer new"]
        await stream.close()


async def test_a_path_is_no_pod() -> None:
    """A name never leaves its place in an address."""
    async with serving(_silent) as (server, api):
        for name in ("..", "a/b", "a?b", ""):
            with pytest.raises(NotFound):
                await api.execute(name, ["x"])
        assert server.asked == []


@pytest.mark.parametrize(
    ("raw", "end"),
    [
        (SUCCESS, Exit(0)),
        (failure(137), Exit(137, "exit status 137")),
        (b'{"status": "Failure", "reason": "InternalError", "message": "gone"}', Exit(None, "gone")),
        (b'{"status": "Failure", "details": {"causes": [{"reason": "ExitCode"}]}}', None),
        (b'{"status": "Failure", "details": {"causes": [{"reason": "ExitCode", "message": "x"}]}}', None),
        (b"command terminated", Exit(None, "command terminated")),
        (b"[]", Exit(None, "[]")),
        (b"\xff\xfe", None),
    ],
)
def test_only_a_success_is_code_zero(raw: bytes, end: Exit | None) -> None:
    """Whatever else the status says, it is not taken for a good end."""
    found = parse_status(raw)
    assert found == end or (end is None and found.code is None)
