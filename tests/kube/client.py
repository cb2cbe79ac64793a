"""The server seen through a raw HTTP client."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tests.kube.answers import Object
from tests.kube.certificates import certificate
from tests.kube.etcd import FIRST_REVISION
from tests.kube.server import NAMESPACE, ApiServer

PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
BEGINNING = str(FIRST_REVISION)  # a watch from here on sees everything
PATIENCE = 30.0  # seconds; only a failing test waits that long


def pod(name: str, **spec: Any) -> Object:
    """A pod with only what it needs."""
    labels = {"app": "test", "name": name}
    container = {"name": "main", "image": "example/terminal:1"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "spec": {"restartPolicy": "Never", "containers": [container], **spec},
    }


class Client:
    """Requests as one account."""

    def __init__(self, server: ApiServer, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.session = session

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        expect: int = 200,
        kind: str = "application/json",
        **query: str,
    ) -> Object:
        """The answer's object; any other status fails the test with the answer's text."""
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": kind} if body is not None else {}
        async with self.session.request(
            method, self.server.url + path, data=data, headers=headers, params=query
        ) as answer:
            text = await answer.text()
            assert answer.status == expect, f"{method} {path}: {answer.status} {text}"
            found: Object = json.loads(text)
            return found

    async def create(self, name: str, **spec: Any) -> Object:
        """A new pod."""
        return await self.call("POST", PODS, pod(name, **spec), expect=201)

    async def phase(self, name: str, *phases: str) -> Object:
        """The pod, as soon as it is in one of these phases."""
        async with self.watching(fieldSelector=f"metadata.name={name}") as events:
            async for event in events:
                if event["object"]["status"].get("phase") in phases:
                    found: Object = event["object"]
                    return found
        raise AssertionError("the watch ended")

    async def gone(self, name: str) -> Object:
        """The pod's last state, as soon as it is removed, or if it was."""
        async with self.watching(fieldSelector=f"metadata.name={name}", resourceVersion=BEGINNING) as events:
            async for event in events:
                if event["type"] == "DELETED":
                    found: Object = event["object"]
                    return found
        raise AssertionError("the watch ended")

    @asynccontextmanager
    async def watching(self, path: str = PODS, **query: str) -> AsyncIterator[AsyncIterator[Object]]:
        """The events of a watch."""
        params: Mapping[str, str] = {"watch": "1", **query}
        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        async with self.session.get(self.server.url + path, params=params, timeout=timeout) as answer:
            assert answer.status == 200, await answer.text()
            yield _events(answer)

    @asynccontextmanager
    async def executing(
        self, name: str, command: list[str], protocol: str = "v5.channel.k8s.io"
    ) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """A WebSocket to an exec with stdin."""
        streams = [("stdin", "true"), ("stdout", "true"), ("stderr", "true")]
        query = [*(("command", part) for part in command), *streams]
        url = self.server.url + f"{PODS}/{name}/exec"
        async with self.session.ws_connect(url, params=query, protocols=(protocol,)) as socket:
            yield socket


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[Object]:
    async for line in answer.content:
        yield json.loads(line)


@asynccontextmanager
async def client(server: ApiServer, token: str = "worker-token") -> AsyncIterator[Client]:
    """A client with this token."""
    context = ssl.create_default_context(cadata=certificate().pem.decode())
    connector = aiohttp.TCPConnector(ssl=context)
    headers = {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        yield Client(server, session)
