"""A small Kubernetes API server on 127.0.0.1 whose pods are local sandboxes.

It is a test double of one API server with one node. It knows pods, their exec, ConfigMaps, ResourceQuotas and
namespaces; refuses what a real one would refuse of them; and can be told to go wrong. What is proved on it still has to
be proved on a real cluster.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from aiohttp import web

from tests.kube import discovery
from tests.kube.answers import Object, Refused
from tests.kube.certificates import certificate
from tests.kube.discovery import RESOURCES
from tests.kube.etcd import Etcd
from tests.kube.execs import Exec, check_exec
from tests.kube.faults import Fault, Faults
from tests.kube.kubelet import Kubelet
from tests.kube.rest import Rest, read_body
from tests.kube.rights import ACCOUNT, ADMIN, WORKER, Account, authorize
from tests.kube.streams import TAP, Tap

NAMESPACE = "pigeon-sandboxes"  # made beforehand, besides "default"
MAX_LINE_BYTES = 1024 * 1024  # of a request, as Go takes it
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ApiServer:
    """The server. `accounts` may be changed while it runs: a token that is taken out is refused from then on."""

    def __init__(self, root: Path, *, python: Path | None = None, history: int = 1_000) -> None:
        self.etcd = Etcd(history=history)
        self.faults = Faults()
        self.kubelet = Kubelet(self.etcd, self.faults, root, python)
        self.accounts: dict[str, Account] = {"admin-token": ADMIN, "worker-token": WORKER}
        self.requests: list[tuple[str, str]] = []  # method, path and query of all that came
        self.rest = Rest(self.etcd, self.kubelet)
        self.url = ""
        for name in ("default", NAMESPACE):
            self.rest.put(
                ("namespaces", "", name), {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": name}}
            )

    @asynccontextmanager
    async def serving(self, *, tls: bool = True) -> AsyncIterator[ApiServer]:
        """Serve on a free port; on the way out everything is ended and removed."""
        runner = web.AppRunner(self._app(), access_log=None, shutdown_timeout=0.1, max_line_size=MAX_LINE_BYTES)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=certificate().context if tls else None)
        try:
            await site.start()
            self.url = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
            yield self
        finally:
            await _close(runner)
            await self.kubelet.close()
        if self.kubelet.defects:
            raise ExceptionGroup("defects of the server itself", self.kubelet.defects)

    def kubeconfig(self, path: Path, *, token: str = "worker-token", namespace: str = NAMESPACE) -> Path:
        """Write a kubeconfig for this server; returns its path."""
        cluster: Object = {"server": self.url}
        if self.url.startswith("https"):
            cluster["certificate-authority-data"] = base64.b64encode(certificate().pem).decode()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
        }
        path.write_text(json.dumps(config))
        path.chmod(0o600)
        return path

    def put_quota(self, name: str, hard: dict[str, str], *, priorities: list[str] | None = None) -> None:
        """Set a ResourceQuota, for pods of these priority classes only where they are given."""
        spec: Object = {"hard": hard}
        if priorities is not None:
            expression = {"scopeName": "PriorityClass", "operator": "In", "values": priorities}
            spec["scopeSelector"] = {"matchExpressions": [expression]}
        metadata = {"name": name, "namespace": NAMESPACE}
        thing = {"kind": "ResourceQuota", "apiVersion": "v1", "metadata": metadata, "spec": spec}
        self.rest.put(("resourcequotas", NAMESPACE, name), thing)

    def pod(self, name: str, namespace: str = NAMESPACE) -> Object:
        """The pod as it is now. Raises KeyError."""
        found = self.etcd.get(("pods", namespace, name))
        if found is None:
            raise KeyError(name)
        return found

    def compact(self) -> None:
        """Forget all changes and pages: who comes with an older revision is answered with 410."""
        self.etcd.compact()
        self.rest.forget_pages()

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[self._answer], client_max_size=4 * 1024 * 1024)
        router = app.router
        for path, body in (
            ("/version", discovery.VERSION),
            ("/api", discovery.CORE),
            ("/apis", discovery.GROUPS),
            ("/api/v1", discovery.core_resources()),
            ("/apis/authorization.k8s.io/v1", discovery.REVIEWS),
            ("/openapi/v3", discovery.OPENAPI_ROOT),
            ("/openapi/v3/api/v1", discovery.openapi()),
        ):
            router.add_get(path, _static(body))
        router.add_post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", self._review)
        for collection in ("/api/v1/namespaces/{namespace}/{resource}", "/api/v1/{resource}"):
            router.add_get(collection, self._allowed(self.rest.collection))
            router.add_post(collection, self._allowed(self.rest.create))
            one = collection + "/{name}"
            router.add_get(one, self._allowed(self.rest.get))
            router.add_put(one, self._allowed(self.rest.update))
            router.add_patch(one, self._allowed(self.rest.update))
            router.add_delete(one, self._allowed(self.rest.delete))
        for method in ("GET", "POST"):
            path = "/api/v1/namespaces/{namespace}/pods/{name}/exec"
            router.add_route(method, path, self._allowed(self._exec, "pods/exec"))
        return app

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Faults first, then who it is; refusals become Status objects."""
        self.requests.append((request.method, request.path_qs))
        fault = self.faults.for_request(request.method, request.path_qs)
        request[TAP] = Tap(request, fault)
        try:
            if fault:
                await self._strike(request, fault)
            request[ACCOUNT] = self._authenticate(request)
            response = await handler(request)
        except Refused as refused:
            return refused.answer()
        except web.HTTPException as error:
            return Refused(error.status, "the server could not find the requested resource").answer()
        except (ConnectionError, aiohttp.ClientError):  # the client went before it was answered
            raise
        except Exception as error:  # a defect of this server, told at its end
            self.kubelet.defects.append(error)
            raise
        if fault and fault.drop == "after":
            _abort(request)
        return response

    async def _strike(self, request: web.Request, fault: Fault) -> None:
        if fault.delay:
            await asyncio.sleep(fault.delay)
        if fault.drop == "before":
            _abort(request)
            raise Refused(500, "nobody reads this")
        if fault.status:
            raise fault.refusal()

    def _authenticate(self, request: web.Request) -> Account:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind != "Bearer" or token not in self.accounts:
            raise Refused(401, "Unauthorized")
        return self.accounts[token]

    def _allowed(self, handler: Handler, resource: str = "") -> Handler:
        async def authorized(request: web.Request) -> web.StreamResponse:
            name = resource or request.match_info["resource"]
            if name.partition("/")[0] not in RESOURCES:
                raise Refused(404, "the server could not find the requested resource")
            authorize(request[ACCOUNT], request, name)
            return await handler(request)

        return authorized

    async def _review(self, request: web.Request) -> web.Response:
        review = await read_body(request)
        asked = review["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
        return web.json_response(
            {**review, "status": {"allowed": request[ACCOUNT].may(asked["verb"], resource)}}, status=201
        )

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        pod = self.rest.found(request, "pods")
        command = check_exec(request, pod)
        session = Exec(request, self.kubelet, self.kubelet.worker(pod))
        return await session.serve(pod, command)


async def _close(runner: web.AppRunner) -> None:
    """Also what a client that does not read would keep open for the time-out of a TLS shutdown."""
    connections = runner.server.connections if runner.server else []
    transports = [connection.transport for connection in connections if connection.transport]
    await runner.cleanup()
    for transport in transports:
        transport.abort()
    await asyncio.sleep(0)


def _static(body: Object) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(body)

    return answer


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
