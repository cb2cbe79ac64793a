"""exec over WebSockets, protocols v4 and v5: into a sandbox's agent, or to a plain process for everything else.

What is not `attach` or `control` runs on this machine outside of any sandbox, in an empty directory of its own: enough
for `kubectl exec` and `kubectl cp` in a test, and never to be given anything hostile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from aiohttp import WSMsgType, web

from schemas.errors import AgentUnreachable, PigeonError
from schemas.ports import ByteStream
from tests.kube.answers import Object, Refused
from tests.kube.kubelet import Kubelet, PodWorker
from tests.kube.statuses import KILLED
from tests.kube.streams import TAP

V5, V4 = "v5.channel.k8s.io", "v4.channel.k8s.io"
STDIN, STDOUT, STDERR, ERROR, CLOSE = 0, 1, 2, 3, 255
FRAME_BYTES = 32 * 1024  # what a kubelet copies at once
VERBS = ("attach", "control")
SUCCESS: Object = {"metadata": {}, "status": "Success"}


class Output(Protocol):
    """Sends bytes on a channel."""

    def __call__(self, channel: int, data: bytes) -> Awaitable[None]: ...


def check_exec(request: web.Request, pod: Object) -> list[str]:
    """The command. Raises Refused with 400 as the API server does before it looks for the kubelet."""
    command = request.query.getall("command", [])
    if not command:
        raise Refused(400, "you must specify at least 1 command for the container")
    if not any(_asked(request, stream) for stream in ("stdin", "stdout", "stderr")):
        raise Refused(400, "you must specify at least 1 of stdin, stdout, stderr")
    name, known = request.query.get("container"), [each["name"] for each in pod["spec"]["containers"]]
    if name and name not in known:
        raise Refused(400, f"container {name} is not valid for pod {pod['metadata']['name']}")
    if not name and len(known) > 1:
        raise Refused(400, f"a container name must be specified for pod {pod['metadata']['name']}")
    if "nodeName" not in pod["spec"]:
        raise Refused(400, f"pod {pod['metadata']['name']} does not have a host assigned")
    if request.headers.get("Upgrade", "").lower() != "websocket":
        raise Refused(400, "Upgrade request required")
    return command


def _asked(request: web.Request, stream: str) -> bool:
    return request.query.get(stream, "").lower() in ("1", "true")


class Exec:
    """One exec of one client."""

    def __init__(self, request: web.Request, kubelet: Kubelet, worker: PodWorker) -> None:
        self._request = request
        self._kubelet = kubelet
        self._worker = worker
        self._tap = request[TAP]
        self._socket = web.WebSocketResponse(protocols=(V5, V4), compress=False, max_msg_size=0)
        self._sending = asyncio.Lock()

    async def serve(self, pod: Object, command: Sequence[str]) -> web.StreamResponse:
        """Answer the request. With v5 the API server upgrades before it has reached the kubelet, with v4 after."""
        offered = self._request.headers.get("Sec-WebSocket-Protocol", "")
        if V4 not in offered and V5 not in offered:
            raise Refused(400, f"unable to upgrade: unable to negotiate protocol: client supports [{offered}]")
        trouble = self._trouble(pod)
        if trouble and V5 not in offered:
            raise trouble
        await self._socket.prepare(self._request)
        with contextlib.suppress(ConnectionError):
            if trouble:
                await self._send(ERROR, json.dumps(trouble.status).encode())
            else:
                await self._send(STDOUT, b"")  # says that the connection is established
                status = await self._carry_out(command)
                await self._send(ERROR, json.dumps(status).encode())
            await self._socket.close()
        return self._socket

    def _trouble(self, pod: Object) -> Refused | None:
        if self._worker.node_gone:
            return Refused(500, "Internal error occurred: error dialing backend: dial tcp 10.0.0.1:10250: i/o timeout")
        if pod["status"]["phase"] != "Running" or self._worker.closed.is_set():
            name = pod["spec"]["containers"][0]["name"]
            return Refused(
                500, f'Internal error occurred: unable to upgrade connection: container not found ("{name}")'
            )
        return None

    async def _carry_out(self, command: Sequence[str]) -> Object:
        if len(command) >= 3 and command[-3] in VERBS and command[-2] == "--socket":
            return await self._bridge()
        return await self._process(command)

    async def _bridge(self) -> Object:
        """What the agent's helpers do: copy both ways until either side ends."""
        try:
            stream = await self._kubelet.connect(self._worker)
        except PigeonError:
            return exited(KILLED if self._worker.closed.is_set() else 1)
        try:
            ended_by_client = await self._copy(stream)
            if self._worker.node_gone:
                await asyncio.Event().wait()  # nobody is there to say anything: it stands until the server is closed
            if ended_by_client:
                return SUCCESS
            sandbox = self._worker.sandbox
            alive = sandbox is not None and await self._kubelet.lives(sandbox)
            return SUCCESS if alive else exited(KILLED)
        finally:
            await stream.close()

    async def _copy(self, stream: ByteStream) -> bool:
        """Whether it was the client who ended it. Raises ConnectionError when the connection broke."""

        async def out() -> bool:
            while data := await stream.read(FRAME_BYTES):
                await self._send(STDOUT, data)
            return False

        async def into() -> bool:
            with contextlib.suppress(AgentUnreachable):  # it ended; its last words are still read
                await self._receive(stream.write)
                return True
            return await reading

        reading = asyncio.create_task(out())
        tasks = [reading, asyncio.create_task(into())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return all([await task for task in done])
        finally:
            await _end(tasks)

    async def _process(self, command: Sequence[str]) -> Object:
        with tempfile.TemporaryDirectory(prefix="exec-") as home:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    cwd=home,
                    env={"PATH": os.environ["PATH"], "HOME": home},
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                    start_new_session=True,
                )
            except OSError as error:
                return Refused(500, f"Internal error occurred: error executing command in container: {error}").status
            try:
                return await self._attend(process)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.communicate()  # what nobody read

    async def _attend(self, process: asyncio.subprocess.Process) -> Object:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        stdin = process.stdin

        async def write(data: bytes) -> None:
            with contextlib.suppress(ConnectionError):
                stdin.write(data)
                await stdin.drain()

        async def feed() -> None:
            if _asked(self._request, "stdin"):
                await self._receive(write)
            stdin.close()

        pumps = [
            asyncio.create_task(self._pump(STDOUT, process.stdout)),
            asyncio.create_task(self._pump(STDERR, process.stderr)),
        ]
        feeding = asyncio.create_task(feed())
        try:
            await asyncio.gather(*pumps)
        finally:
            await _end([feeding, *pumps])
        return exited(await process.wait())

    async def _pump(self, channel: int, source: asyncio.StreamReader) -> None:
        while data := await source.read(FRAME_BYTES):
            await self._send(channel, data)

    async def _receive(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Hand on what comes on stdin, until its end or the client's."""
        async for message in self._socket:
            data = message.data.encode() if message.type is WSMsgType.TEXT else message.data
            if self._tap.frozen:
                await asyncio.Event().wait()
            if data[:1] == bytes([STDIN]):
                await write(data[1:])
            elif self._socket.ws_protocol == V5 and data == bytes([CLOSE, STDIN]):
                return

    async def _send(self, channel: int, data: bytes) -> None:
        """Output counts for cuts and freezes; the status comes after all output."""
        async with self._sending:
            passed = self._tap.admit(data) if channel != ERROR else data
            if passed or not data:
                await self._socket.send_bytes(bytes([channel]) + passed)
            await self._tap.after()


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def exited(code: int) -> Object:
    """The status of a command that ended; a negative code is a signal's."""
    if code == 0:
        return SUCCESS
    shown = code if code > 0 else 128 - code
    return {
        "metadata": {},
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": f"command terminated with non-zero exit code: exit status {shown}",
        "details": {"causes": [{"reason": "ExitCode", "message": str(shown)}]},
    }
