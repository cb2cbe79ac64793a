"""A small Kubernetes API server on 127.0.0.1 whose pods are local sandboxes.

It is a test double of one API server with one node. It knows pods, their exec, ConfigMaps, ResourceQuotas and
namespaces; refuses what a real one would refuse of them; and can be told to go wrong. What is proved on it still has to
be proved on a real cluster.
"""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.kube import discovery, pods, quota, statuses
from tests.kube.answers import Object, Refused, forbidden, invalid, modified, not_found, table, timestamp
from tests.kube.certificates import certificate
from tests.kube.discovery import RESOURCES
from tests.kube.etcd import Etcd, Key
from tests.kube.execs import Exec, check_exec
from tests.kube.faults import Fault, Faults
from tests.kube.kubelet import Kubelet, mark_deleted
from tests.kube.patches import patched
from tests.kube.rights import ADMIN, WORKER, Account, authorize
from tests.kube.selectors import field_selector, label_selector
from tests.kube.streams import Tap
from tests.kube.watches import DEFAULT_SECONDS, Watch

NAMESPACE = "pigeon-sandboxes"  # made beforehand, besides "default"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
FAULT: web.RequestKey[Fault | None] = web.RequestKey("fault", object)  # type: ignore[arg-type]
ACCOUNT = web.RequestKey("account", Account)


class ApiServer:
    """The server. `accounts` may be changed while it runs: a token that is taken out is refused from then on."""

    def __init__(self, root: Path, *, python: Path | None = None, history: int = 1_000) -> None:
        self.etcd = Etcd(history=history)
        self.faults = Faults()
        self.kubelet = Kubelet(self.etcd, self.faults, root, python)
        self.accounts: dict[str, Account] = {"admin-token": ADMIN, "worker-token": WORKER}
        self.requests: list[tuple[str, str]] = []  # method, path and query of all that came
        self.bookmark_every = 60.0  # seconds
        self.url = ""
        self._pages: dict[str, list[Object]] = {}
        for name in ("default", NAMESPACE):
            self._put(("namespaces", "", name), {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": name}})

    @asynccontextmanager
    async def serving(self, *, tls: bool = True) -> AsyncIterator[ApiServer]:
        """Serve on a free port; on the way out everything is ended and removed."""
        runner = web.AppRunner(self._app(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=certificate().context if tls else None)
        try:
            await site.start()
            self.url = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
            yield self
        finally:
            await self.kubelet.close()
            await runner.cleanup()

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
        self._put(("resourcequotas", NAMESPACE, name), thing)

    def pod(self, name: str, namespace: str = NAMESPACE) -> Object:
        """The pod as it is now. Raises KeyError."""
        found = self.etcd.get(("pods", namespace, name))
        if found is None:
            raise KeyError(name)
        return found

    def compact(self) -> None:
        """Forget all changes and pages: who comes with an older revision is answered with 410."""
        self.etcd.compact()
        self._pages.clear()

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
            router.add_get(collection, self._allowed(self._list))
            router.add_post(collection, self._allowed(self._create))
            one = collection + "/{name}"
            router.add_get(one, self._allowed(self._get))
            router.add_put(one, self._allowed(self._update))
            router.add_patch(one, self._allowed(self._update))
            router.add_delete(one, self._allowed(self._delete))
        for method in ("GET", "POST"):
            path = "/api/v1/namespaces/{namespace}/pods/{name}/exec"
            router.add_route(method, path, self._allowed(self._exec, "pods/exec"))
        return app

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Faults first, then who it is; refusals become Status objects."""
        self.requests.append((request.method, request.path_qs))
        fault = self.faults.for_request(request.method, request.path_qs)
        request[FAULT] = fault
        try:
            if fault:
                await self._strike(request, fault)
            request[ACCOUNT] = self._authenticate(request)
            response = await handler(request)
        except Refused as refused:
            return refused.answer()
        except web.HTTPException as error:
            return Refused(error.status, "the server could not find the requested resource").answer()
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
        review = await _body(request)
        asked = review["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
        return web.json_response(
            {**review, "status": {"allowed": request[ACCOUNT].may(asked["verb"], resource)}}, status=201
        )

    async def _list(self, request: web.Request) -> web.StreamResponse:
        resource, query = RESOURCES[request.match_info["resource"]], request.query
        matches, as_table = _matcher(request), _as_table(request)
        if query.get("watch", "").lower() in ("1", "true"):
            return await self._watch(request, matches, as_table=as_table)
        found, rest = self._page(request, matches)
        metadata: Object = {"resourceVersion": str(self.etcd.revision)}
        if rest:
            metadata.update({"continue": uuid.uuid4().hex, "remainingItemCount": len(rest)})
            self._pages[metadata["continue"]] = rest
        if as_table:
            answer = table(found, metadata["resourceVersion"])
            return web.json_response({**answer, "metadata": metadata})
        bare = [{key: value for key, value in each.items() if key not in ("kind", "apiVersion")} for each in found]
        return web.json_response(
            {"kind": f"{resource.kind}List", "apiVersion": "v1", "metadata": metadata, "items": bare}
        )

    def _page(self, request: web.Request, matches: Callable[[Object], bool]) -> tuple[list[Object], list[Object]]:
        """This page, and what is left."""
        if token := request.query.get("continue"):
            if token not in self._pages:
                raise Refused(410, "The provided continue parameter is too old to display a consistent list result.")
            found = self._pages[token]
        else:
            resource, namespace = request.match_info["resource"], request.match_info.get("namespace")
            found = [each for each in self.etcd.all(resource, namespace) if matches(each)]
        limit = int(request.query.get("limit", 0)) or len(found)
        return found[:limit], found[limit:]

    async def _watch(
        self, request: web.Request, matches: Callable[[Object], bool], *, as_table: bool
    ) -> web.StreamResponse:
        query, resource = request.query, RESOURCES[request.match_info["resource"]]
        if "sendInitialEvents" in query:
            raise Refused(422, "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled")
        if not query.get("resourceVersion", "0").isdigit():
            raise Refused(400, "invalid resource version")
        bookmarks = query.get("allowWatchBookmarks", "").lower() in ("1", "true")
        watch = Watch(
            self.etcd,
            resource.name,
            resource.kind,
            request.match_info.get("namespace"),
            matches,
            query.get("resourceVersion", ""),
            float(query.get("timeoutSeconds", DEFAULT_SECONDS)),
            self.bookmark_every if bookmarks else None,
            as_table,
        )
        return await watch.serve(request, Tap(request, request[FAULT]))

    async def _get(self, request: web.Request) -> web.Response:
        found = self._found(request)
        if _as_table(request):
            return web.json_response(table([found], found["metadata"]["resourceVersion"]))
        return web.json_response(found)

    async def _create(self, request: web.Request) -> web.Response:
        thing = await _body(request)
        resource = RESOURCES[request.match_info["resource"]]
        namespace = request.match_info.get("namespace", "")
        _check_new(thing, resource, namespace)
        if namespace and self.etcd.get(("namespaces", "", namespace)) is None:
            raise not_found("namespaces", namespace)
        name = thing["metadata"]["name"]
        key = (resource.name, namespace, name)
        if self.etcd.get(key) is not None:
            details = {"name": name, "kind": resource.name}
            raise Refused(409, f'{resource.name} "{name}" already exists', reason="AlreadyExists", details=details)
        if resource.name != "pods":
            return web.json_response(self._put(key, thing), status=201)
        pod = self._put(key, self._admitted(thing, namespace))
        self.kubelet.start(key, pod)
        return web.json_response(pod, status=201)

    def _admitted(self, pod: Object, namespace: str) -> Object:
        """The pod as it is stored, after all that may refuse it."""
        pod = pods.defaulted(pod)
        pods.check_pod(pod)
        labels = (self.etcd.get(("namespaces", "", namespace)) or {})["metadata"].get("labels", {})
        if labels.get(pods.RESTRICTED) == "restricted" and (found := pods.insecurities(pod["spec"])):
            why = f'violates PodSecurity "restricted:latest": {", ".join(found)}'
            raise forbidden("pods", pod["metadata"]["name"], why)
        quota.admit(pod, self.etcd.all("pods", namespace), self.etcd.all("resourcequotas", namespace))
        statuses.pending(pod)
        return pod

    def _put(self, key: Key, thing: Object) -> Object:
        metadata = {**thing["metadata"], "uid": str(uuid.uuid4()), "creationTimestamp": timestamp()}
        if key[1]:
            metadata["namespace"] = key[1]
        return self.etcd.put(key, {**thing, "metadata": metadata})

    async def _update(self, request: web.Request) -> web.Response:
        """PUT and PATCH."""
        body = await _body(request)
        old = self._found(request)  # after the body is there: from here to the write nothing else happens
        new = body if request.method == "PUT" else patched(old, request.content_type, body)
        resource, name = request.match_info["resource"], request.match_info["name"]
        metadata = new["metadata"]
        if metadata.get("name") != name:
            raise Refused(400, f"the name of the object ({metadata.get('name')}) does not match the name on the URL")
        if metadata.get("uid", old["metadata"]["uid"]) != old["metadata"]["uid"]:
            raise _other_uid(resource, name, metadata["uid"], old)
        if metadata.get("resourceVersion", "") not in ("", old["metadata"]["resourceVersion"]):
            raise modified(resource, name)
        for field in ("uid", "creationTimestamp", "namespace", "deletionTimestamp", "deletionGracePeriodSeconds"):
            metadata.pop(field, None)
            if field in old["metadata"]:
                metadata[field] = old["metadata"][field]
        pods.check_shape(new)
        pods.check_metadata(new)
        if resource == "pods":
            new["status"] = old["status"]
            pods.check_update(old, new)
        if resource == "configmaps" and old.get("immutable") and _data(old) != _data(new):
            raise invalid("ConfigMap", name, "data", "Forbidden: field is immutable when `immutable` is set")
        return web.json_response(self.etcd.put(self._key(request), new))

    async def _delete(self, request: web.Request) -> web.Response:
        options = await _body(request) if request.can_read_body else {}
        found, key = self._found(request), self._key(request)
        wanted = options.get("preconditions") or {}
        if wanted.get("uid", found["metadata"]["uid"]) != found["metadata"]["uid"]:
            raise _other_uid(key[0], key[2], wanted["uid"], found)
        if wanted.get("resourceVersion", found["metadata"]["resourceVersion"]) != found["metadata"]["resourceVersion"]:
            raise modified(key[0], key[2])
        if key[0] != "pods":
            self.etcd.remove(key)
            return web.json_response({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})
        return web.json_response(self._delete_pod(key, found, options, request.query.get("gracePeriodSeconds")))

    def _delete_pod(self, key: Key, pod: Object, options: Object, in_query: str | None) -> Object:
        """Gracefully: it goes from the API when the kubelet is done. At once where there is nothing to end."""
        asked = options.get("gracePeriodSeconds")
        if asked is None:
            asked = in_query if in_query is not None else pod["spec"]["terminationGracePeriodSeconds"]
        grace = int(asked)
        if "nodeName" not in pod["spec"] or pod["status"]["phase"] in quota.ENDED:
            grace = 0
        known = pod["metadata"].get("deletionGracePeriodSeconds")
        if known is not None and grace >= known > 0:
            return pod
        worker = self.kubelet.worker(pod)
        mark_deleted(pod, grace)
        if grace == 0:
            gone = self.etcd.remove(key)
            worker.terminate(0)
            return {**pod, "metadata": {**pod["metadata"], "resourceVersion": gone["metadata"]["resourceVersion"]}}
        pod = self.etcd.put(key, pod)
        worker.terminate(grace)
        return pod

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        pod = self._found(request, "pods")
        command = check_exec(request, pod)
        session = Exec(request, self.kubelet, self.kubelet.worker(pod), Tap(request, request[FAULT]))
        return await session.serve(pod, command)

    def _key(self, request: web.Request, resource: str = "") -> Key:
        path = request.match_info
        return (resource or path["resource"], path.get("namespace", ""), path["name"])

    def _found(self, request: web.Request, resource: str = "") -> Object:
        key = self._key(request, resource)
        found = self.etcd.get(key)
        if found is None:
            raise not_found(key[0], key[2])
        return found


def _static(body: Object) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(body)

    return answer


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


async def _body(request: web.Request) -> Any:
    if "json" not in request.content_type and request.content_type != "application/octet-stream":
        raise Refused(415, f"this server reads JSON only, not {request.content_type}")
    try:
        return json.loads(await request.read() or b"{}")
    except ValueError as error:
        raise Refused(400, f"the object provided is unrecognized: {error}") from error


def _as_table(request: web.Request) -> bool:
    return "as=Table" in request.headers.get("Accept", "").partition(",")[0]


def _matcher(request: web.Request) -> Callable[[Object], bool]:
    labels = label_selector(request.query.get("labelSelector", ""))
    fields = field_selector(request.query.get("fieldSelector", ""))
    return lambda thing: labels(thing["metadata"].get("labels") or {}) and fields(thing)


def _other_uid(resource: str, name: str, wanted: str, found: Object) -> Refused:
    have = found["metadata"]["uid"]
    why = f"Precondition failed: UID in precondition: {wanted}, UID in object meta: {have}"
    message = f'Operation cannot be fulfilled on {resource} "{name}": {why}'
    return Refused(409, message, details={"name": name, "kind": resource})


def _data(thing: Object) -> tuple[Any, Any]:
    return thing.get("data"), thing.get("binaryData")


def _check_new(thing: Object, resource: discovery.Resource, namespace: str) -> None:
    """Fill in the name where it is to be generated. Raises Refused with 400 or 422."""
    if (thing.get("kind"), thing.get("apiVersion")) != (resource.kind, "v1"):
        raise Refused(400, f"the object provided is unrecognized (must be of type {resource.kind})")
    metadata = thing.setdefault("metadata", {})
    if metadata.get("namespace", namespace) != namespace:
        raise Refused(400, "the namespace of the provided object does not match the namespace sent on the request")
    if "resourceVersion" in metadata:
        raise Refused(400, "resourceVersion should not be set on objects to be created")
    if "name" not in metadata and "generateName" in metadata:
        metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
    if not metadata.get("name"):
        raise invalid(resource.kind, "", "metadata.name", "Required value: name or generateName is required")
    pods.check_shape(thing)
    pods.check_metadata(thing)
