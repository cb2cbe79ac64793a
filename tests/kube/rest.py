"""What can be done with objects: list, watch, get, create, update and delete, as HTTP handlers."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tests.kube import discovery, pods, quota, statuses
from tests.kube.answers import Object, Refused, forbidden, invalid, modified, not_found, table, timestamp
from tests.kube.discovery import RESOURCES
from tests.kube.etcd import Etcd, Key
from tests.kube.kubelet import Kubelet, mark_deleted
from tests.kube.patches import patched
from tests.kube.selectors import field_selector, label_selector
from tests.kube.watches import DEFAULT_SECONDS, Watch

KEPT = ("uid", "creationTimestamp", "namespace", "deletionTimestamp", "deletionGracePeriodSeconds")  # by any update


class Rest:
    """The handlers of one server. Between reading an object and writing it none of them waits for anything."""

    def __init__(self, etcd: Etcd, kubelet: Kubelet) -> None:
        self.bookmark_every = 60.0  # seconds
        self._etcd = etcd
        self._kubelet = kubelet
        self._pages: dict[str, list[Object]] = {}

    def put(self, key: Key, thing: Object) -> Object:
        """Write a new object."""
        metadata = {**thing["metadata"], "uid": str(uuid.uuid4()), "creationTimestamp": timestamp()}
        if key[1]:
            metadata["namespace"] = key[1]
        return self._etcd.put(key, {**thing, "metadata": metadata})

    def forget_pages(self) -> None:
        """Who comes with an older `continue` is answered with 410."""
        self._pages.clear()

    async def collection(self, request: web.Request) -> web.StreamResponse:
        """GET of a collection: list or watch."""
        resource, query = RESOURCES[request.match_info["resource"]], request.query
        matches, as_table = _matcher(request), _as_table(request)
        if query.get("watch", "").lower() in ("1", "true"):
            return await self._watch(request, matches, as_table=as_table)
        found, rest = self._page(request, matches)
        metadata: Object = {"resourceVersion": str(self._etcd.revision)}
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
            found = [each for each in self._etcd.all(resource, namespace) if matches(each)]
        limit = _number(request, "limit") or len(found)
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
            self._etcd,
            resource.name,
            resource.kind,
            request.match_info.get("namespace"),
            matches,
            query.get("resourceVersion", ""),
            _number(request, "timeoutSeconds") or DEFAULT_SECONDS,
            self.bookmark_every if bookmarks else None,
            as_table,
        )
        return await watch.serve(request)

    async def get(self, request: web.Request) -> web.Response:
        """GET of one object."""
        found = self.found(request)
        if _as_table(request):
            return web.json_response(table([found], found["metadata"]["resourceVersion"]))
        return web.json_response(found)

    async def create(self, request: web.Request) -> web.Response:
        """POST to a collection."""
        thing = await read_body(request)
        resource = RESOURCES[request.match_info["resource"]]
        namespace = request.match_info.get("namespace", "")
        _check_new(thing, resource, namespace)
        if namespace and self._etcd.get(("namespaces", "", namespace)) is None:
            raise not_found("namespaces", namespace)
        name = thing["metadata"]["name"]
        key = (resource.name, namespace, name)
        admitted = (
            self._admitted(thing, namespace) if resource.name == "pods" else thing
        )  # before its name is looked up
        if self._etcd.get(key) is not None:
            details = {"name": name, "kind": resource.name}
            raise Refused(409, f'{resource.name} "{name}" already exists', reason="AlreadyExists", details=details)
        if request.query.get("dryRun") == "All":
            return web.json_response(admitted, status=201)
        made = self.put(key, admitted)
        if resource.name == "pods":
            self._kubelet.start(key, made)
        return web.json_response(made, status=201)

    def _admitted(self, pod: Object, namespace: str) -> Object:
        """The pod as it is stored, after all that may refuse it."""
        pod = pods.defaulted(pod)
        pods.check_pod(pod)
        labels = (self._etcd.get(("namespaces", "", namespace)) or {})["metadata"].get("labels", {})
        if labels.get(pods.RESTRICTED) == "restricted" and (found := pods.insecurities(pod["spec"])):
            why = f'violates PodSecurity "restricted:latest": {", ".join(found)}'
            raise forbidden("pods", pod["metadata"]["name"], why)
        quota.admit(pod, self._etcd.all("pods", namespace), self._etcd.all("resourcequotas", namespace))
        statuses.pending(pod)
        return pod

    async def update(self, request: web.Request) -> web.Response:
        """PUT and PATCH."""
        body = await read_body(request)
        old = self.found(request)  # after the body is there: from here to the write nothing else happens
        new = body if request.method == "PUT" else patched(old, request.content_type, body)
        resource, name = request.match_info["resource"], request.match_info["name"]
        _check_kind(new, RESOURCES[resource])
        metadata = new["metadata"]
        if metadata.get("name") != name:
            raise Refused(400, f"the name of the object ({metadata.get('name')}) does not match the name on the URL")
        if metadata.get("uid", old["metadata"]["uid"]) != old["metadata"]["uid"]:
            raise _other_uid(resource, name, metadata["uid"], old)
        if metadata.get("resourceVersion", "") not in ("", old["metadata"]["resourceVersion"]):
            raise modified(resource, name)
        for field in KEPT:
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
        return web.json_response(self._etcd.put(self._key(request), new))

    async def delete(self, request: web.Request) -> web.Response:
        """DELETE of one object."""
        options = await read_body(request) if request.can_read_body else {}
        found, key = self.found(request), self._key(request)
        wanted = options.get("preconditions") or {}
        if wanted.get("uid", found["metadata"]["uid"]) != found["metadata"]["uid"]:
            raise _other_uid(key[0], key[2], wanted["uid"], found)
        if wanted.get("resourceVersion", found["metadata"]["resourceVersion"]) != found["metadata"]["resourceVersion"]:
            raise modified(key[0], key[2])
        if key[0] != "pods":
            self._etcd.remove(key)
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
        worker = self._kubelet.worker(pod)
        mark_deleted(pod, grace)
        if grace == 0:
            gone = self._etcd.remove(key)
            worker.terminate(0)
            return {**pod, "metadata": {**pod["metadata"], "resourceVersion": gone["metadata"]["resourceVersion"]}}
        pod = self._etcd.put(key, pod)
        worker.terminate(grace)
        return pod

    def _key(self, request: web.Request, resource: str = "") -> Key:
        path = request.match_info
        return (resource or path["resource"], path.get("namespace", ""), path["name"])

    def found(self, request: web.Request, resource: str = "") -> Object:
        """The object that the path names. Raises Refused with 404."""
        key = self._key(request, resource)
        found = self._etcd.get(key)
        if found is None:
            raise not_found(key[0], key[2])
        return found


async def read_body(request: web.Request) -> Any:
    """The JSON of the request. Raises Refused with 400 or 415."""
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


def _number(request: web.Request, parameter: str) -> int:
    """A parameter of the query, 0 where it is missing. Raises Refused with 400."""
    text = request.query.get(parameter, "0")
    if not text.isdigit():
        raise Refused(400, f"{parameter} must be a number, not {text!r}")
    return int(text)


def _data(thing: Object) -> tuple[Any, Any]:
    return thing.get("data"), thing.get("binaryData")


def _check_kind(thing: Any, resource: discovery.Resource) -> None:
    known = isinstance(thing, dict) and (thing.get("kind"), thing.get("apiVersion")) == (resource.kind, "v1")
    if not known or not isinstance(thing.setdefault("metadata", {}), dict):
        raise Refused(400, f"the object provided is unrecognized (must be of type {resource.kind})")


def _check_new(thing: Object, resource: discovery.Resource, namespace: str) -> None:
    """Fill in the name where it is to be generated. Raises Refused with 400 or 422."""
    _check_kind(thing, resource)
    metadata = thing["metadata"]
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
