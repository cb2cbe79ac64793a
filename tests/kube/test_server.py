"""The API server of the tests behaves like one: objects, selectors, updates, deletion, admission, rights."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.kube.answers import Object
from tests.kube.client import PODS, Client, client, pod
from tests.kube.server import NAMESPACE, ApiServer

MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
JSON_PATCH = "application/json-patch+json"


@pytest.fixture
async def kube(api: ApiServer) -> AsyncIterator[Client]:
    """A worker's client of a server whose pods find no node, so that nothing is started."""
    api.faults.hold_pods("unschedulable", times=100)
    async with client(api) as found:
        yield found


async def test_a_created_pod_is_named_defaulted_and_pending(kube: Client) -> None:
    """The answer to a create is the whole object."""
    made = await kube.create("one")
    assert made["metadata"]["uid"]
    assert int(made["metadata"]["resourceVersion"]) > 0
    assert made["metadata"]["creationTimestamp"].endswith("Z")
    assert (made["status"]["phase"], made["spec"]["terminationGracePeriodSeconds"]) == ("Pending", 30)
    assert await kube.call("GET", f"{PODS}/none", expect=404)
    generated = {**pod("x"), "metadata": {"generateName": "some-"}}
    assert (await kube.call("POST", PODS, generated, expect=201))["metadata"]["name"].startswith("some-")


async def test_a_name_is_there_once(kube: Client) -> None:
    """The second create is told that the first was there."""
    await kube.create("one")
    refused = await kube.call("POST", PODS, pod("one"), expect=409)
    assert (refused["reason"], refused["details"]["name"]) == ("AlreadyExists", "one")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"metadata": {"name": "Not_A_Name"}}, 422),
        ({"metadata": {}}, 422),
        ({"metadata": {"name": "a", "labels": {"k": "not valid"}}}, 422),
        ({"metadata": {"name": "a", "namespace": "other"}}, 400),
        ({"metadata": {"name": "a", "resourceVersion": "5"}}, 400),
        ({"kind": "Job"}, 400),
        ({"spec": {"restartPolicy": "Never", "containers": []}}, 422),
        ({"spec": {"restartPolicy": "Never", "containers": [{"name": "a", "imge": "b"}]}}, 400),
        ({"spec": {"restartPolicy": "Never", "containers": [{"name": "a"}]}}, 422),
        ({"spec": {"containers": [{"name": "a", "image": "b"}]}}, 422),
        ({"spec": {"restartPolicy": "Never", "containers": [{"name": "a.b", "image": "b"}]}}, 422),
        (
            {
                "spec": {
                    "restartPolicy": "Never",
                    "containers": [{"name": "a", "image": "b", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
                }
            },
            422,
        ),
        (
            {
                "spec": {
                    "restartPolicy": "Never",
                    "containers": [
                        {
                            "name": "a",
                            "image": "b",
                            "resources": {"requests": {"memory": "2Gi"}, "limits": {"memory": "1G"}},
                        }
                    ],
                }
            },
            422,
        ),
    ],
)
async def test_what_is_no_pod_is_refused(kube: Client, change: Object, code: int) -> None:
    """What a real API server would not take is not taken here."""
    refused = await kube.call("POST", PODS, {**pod("one"), **change}, expect=code)
    assert (refused["kind"], refused["status"], refused["code"]) == ("Status", "Failure", code)


async def test_a_namespace_has_to_be_there(kube: Client) -> None:
    """A typo in the namespace is not a new namespace."""
    refused = await kube.call("POST", "/api/v1/namespaces/none/pods", pod("one"), expect=404)
    assert refused["message"] == 'namespaces "none" not found'


async def test_what_is_not_json_is_refused(kube: Client) -> None:
    """A body that cannot be read is the client's fault, not a crash."""
    url = kube.server.url + PODS
    for data, kind, code in ((b"{", "application/json", 400), (b"", "application/vnd.kubernetes.protobuf", 415)):
        async with kube.session.post(url, data=data, headers={"Content-Type": kind}) as answer:
            assert answer.status == code
    for body in ("[]", '"text"', "5", "null", "{}"):
        async with kube.session.post(url, data=body, headers={"Content-Type": "application/json"}) as answer:
            assert answer.status == 400


async def names(kube: Client, labels: str = "", fields: str = "") -> list[str]:
    """The names in a list."""
    answer = await kube.call("GET", PODS, labelSelector=labels, fieldSelector=fields)
    return [each["metadata"]["name"] for each in answer["items"]]


async def test_lists_are_selected(kube: Client) -> None:
    """Labels and fields choose, in each of their forms."""
    await kube.create("one")
    await kube.create("two")
    bare = pod("bare")
    bare["metadata"]["labels"] = {}
    await kube.call("POST", PODS, bare, expect=201)
    assert await names(kube) == ["bare", "one", "two"]
    assert await names(kube, "app=test,name==one") == ["one"]
    assert await names(kube, "name!=one") == ["bare", "two"]
    assert await names(kube, "name in (one,two),app") == ["one", "two"]
    assert await names(kube, "name notin (one)") == ["bare", "two"]
    assert await names(kube, "!app") == ["bare"]
    assert await names(kube, fields="metadata.name=two") == ["two"]
    assert await names(kube, fields="status.phase=Pending,metadata.name!=two") == ["bare", "one"]
    await kube.call("GET", PODS, expect=400, labelSelector="a b")
    await kube.call("GET", PODS, expect=400, fieldSelector="spec.other=a")
    await kube.call("GET", PODS, expect=400, limit="many")


async def test_lists_come_in_pages(kube: Client) -> None:
    """A page names the next one, until what it is a page of has been forgotten."""
    for name in ("a", "b", "c"):
        await kube.create(name)
    first = await kube.call("GET", PODS, limit="2")
    assert [each["metadata"]["name"] for each in first["items"]] == ["a", "b"]
    more = f"{PODS}?limit=2&continue={first['metadata']['continue']}"
    assert [each["metadata"]["name"] for each in (await kube.call("GET", more))["items"]] == ["c"]
    kube.server.compact()
    assert (await kube.call("GET", more, expect=410))["reason"] == "Expired"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (MERGE, {"metadata": {"labels": {"name": None, "new": "x"}}}),
        (STRATEGIC, {"metadata": {"labels": {"name": None, "new": "x"}}}),
        (
            JSON_PATCH,
            [
                {"op": "test", "path": "/metadata/labels/app", "value": "test"},
                {"op": "move", "from": "/metadata/labels/name", "path": "/metadata/labels/new"},
                {"op": "replace", "path": "/metadata/labels/new", "value": "x"},
            ],
        ),
    ],
)
async def test_a_pod_is_patched_in_each_way(kube: Client, kind: str, body: Any) -> None:
    """All three forms change what they name and nothing else."""
    made = await kube.create("one")
    changed = await kube.call("PATCH", PODS + "/one", body, kind=kind)
    assert changed["metadata"]["labels"] == {"app": "test", "new": "x"}
    assert {**changed["spec"], "nodeName": ""} == {**made["spec"], "nodeName": ""}
    assert changed["metadata"]["resourceVersion"] != made["metadata"]["resourceVersion"]


async def test_of_two_writers_with_one_version_one_wins(kube: Client) -> None:
    """A patch that names a version or a uid is made on that one only."""
    await kube.create("one")
    made = await kube.call("GET", PODS + "/one")
    version = made["metadata"]["resourceVersion"]
    body = {"metadata": {"resourceVersion": version, "labels": {"mine": "yes"}}}
    await kube.call("PATCH", PODS + "/one", body, kind=MERGE)
    assert (await kube.call("PATCH", PODS + "/one", body, kind=MERGE, expect=409))["reason"] == "Conflict"
    await kube.call("PATCH", PODS + "/one", {"metadata": {"uid": "another"}}, kind=MERGE, expect=409)
    admin: Object = {**made, "metadata": {**made["metadata"], "labels": {}}}
    async with client(kube.server, "admin-token") as other:
        await other.call("PUT", PODS + "/one", admin, expect=409)


async def test_a_patch_that_changes_nothing_is_no_change(kube: Client) -> None:
    """Watchers are told of changes only."""
    await kube.create("one")
    before = await kube.call("GET", PODS + "/one")
    after = await kube.call("PATCH", PODS + "/one", {"metadata": {"labels": {"app": "test"}}}, kind=MERGE)
    assert after == before


@pytest.mark.parametrize(
    ("kind", "body", "code"),
    [
        (MERGE, {"spec": {"priorityClassName": "high"}}, 422),
        (MERGE, {"metadata": {"labels": {"a": "not valid"}}}, 422),
        (MERGE, {"metadata": {"name": "two"}}, 400),
        (MERGE, [], 400),
        (JSON_PATCH, [{"op": "test", "path": "/metadata/name", "value": "two"}], 422),
        (JSON_PATCH, [{"op": "remove", "path": "/metadata/labels/none"}], 422),
        (JSON_PATCH, {"op": "add"}, 422),
        ("application/apply-patch+yaml", {}, 415),
    ],
)
async def test_a_patch_that_may_not_be_is_refused(kube: Client, kind: str, body: Any, code: int) -> None:
    """What of a pod is fixed stays so, and what makes no sense is told."""
    await kube.create("one")
    await kube.call("PATCH", PODS + "/one", body, kind=kind, expect=code)


async def test_a_status_is_not_the_clients_to_write(kube: Client) -> None:
    """Writing the pod leaves its status to the kubelet."""
    await kube.create("one")
    changed = await kube.call("PATCH", PODS + "/one", {"status": {"phase": "Failed"}}, kind=MERGE)
    assert changed["status"]["phase"] == "Pending"


async def test_deleting_needs_the_right_uid(kube: Client) -> None:
    """A late delete of an older incarnation does nothing."""
    made = await kube.create("one")
    refused = await kube.call("DELETE", PODS + "/one", {"preconditions": {"uid": "another"}}, expect=409)
    assert "Precondition failed" in refused["message"]
    await kube.call("DELETE", PODS + "/one", {"preconditions": {"resourceVersion": "1"}}, expect=409)
    await kube.call("DELETE", PODS + "/one", {"preconditions": {"uid": made["metadata"]["uid"]}})
    await kube.call("DELETE", PODS + "/one", expect=404)


async def test_a_quota_is_kept(kube: Client) -> None:
    """What is over is refused in the words of a real server; what is out of its scope, or has ended, does not count."""
    api = kube.server
    api.put_quota("sessions", {"pods": "2", "limits.memory": "1Gi"}, priorities=["session"])
    limits = {"limits": {"memory": "300Mi"}}
    container = {"name": "main", "image": "example:1", "resources": limits}
    wanted: Object = {"priorityClassName": "session", "containers": [container]}
    await kube.create("free")
    await kube.create("one", **wanted)
    await kube.create("two", **wanted)
    refused = await kube.call("POST", PODS, pod("three", **wanted), expect=403)
    assert refused["reason"] == "Forbidden"
    assert refused["message"] == (
        'pods "three" is forbidden: exceeded quota: sessions, requested: pods=1, used: pods=2, limited: pods=2'
    )
    await kube.call("DELETE", PODS + "/one")
    unsaid: Object = {"priorityClassName": "session"}
    refused = await kube.call("POST", PODS, pod("three", **unsaid), expect=403)
    assert "failed quota: sessions: must specify limits.memory" in refused["message"]
    large = {**container, "resources": {"limits": {"memory": "1000Mi"}}}
    refused = await kube.call("POST", PODS, pod("three", **{**wanted, "containers": [large]}), expect=403)
    assert "requested: limits.memory=0.9765625Gi, used: limits.memory=0.29296875Gi" in refused["message"]
    await kube.create("three", **wanted)


async def test_an_unsafe_pod_is_refused_where_the_namespace_says_so(kube: Client) -> None:
    """Pod Security `restricted` is enforced by the namespace's label."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    async with client(kube.server, "admin-token") as admin:
        path = f"/api/v1/namespaces/{NAMESPACE}"
        await admin.call("PATCH", path, {"metadata": {"labels": labels}}, kind=MERGE)
    refused = await kube.call("POST", PODS, pod("one"), expect=403)
    assert 'violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false' in refused["message"]
    safe = {
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    await kube.create("one", containers=[{"name": "main", "image": "example:1", "securityContext": safe}])


async def test_an_immutable_config_map_stays_as_it_is(api: ApiServer) -> None:
    """The agent's ConfigMap is named by its hash and never changes."""
    path = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
    thing = {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "c"}, "data": {"a": "b"}, "immutable": True}
    async with client(api, "admin-token") as admin:
        await admin.call("POST", path, thing, expect=201)
        assert (await admin.call("GET", f"{path}/c"))["data"] == {"a": "b"}
        await admin.call("PATCH", f"{path}/c", {"data": {"a": "c"}}, kind=MERGE, expect=422)
        assert (await admin.call("DELETE", f"{path}/c"))["status"] == "Success"


async def test_nobody_gets_in_without_a_token_that_is_known_now(api: ApiServer) -> None:
    """A token that was taken out is refused from then on."""
    async with client(api) as kube:
        assert await names(kube) == []
        del api.accounts["worker-token"]
        assert (await kube.call("GET", PODS, expect=401))["reason"] == "Unauthorized"


async def test_a_worker_may_do_what_its_role_says_and_nothing_else(kube: Client) -> None:
    """What the adapter needs beyond the Role shows here."""
    made = await kube.create("one")
    refused = await kube.call("PUT", PODS + "/one", made, expect=403)
    assert 'cannot update resource "pods" in API group "" in the namespace "pigeon-sandboxes"' in refused["message"]
    await kube.call("GET", f"/api/v1/namespaces/{NAMESPACE}/configmaps", expect=403)
    await kube.call("GET", "/api/v1/nodes", expect=404)
    await kube.call("GET", "/somewhere", expect=404)
    review = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    for verb, resource, subresource, allowed in (
        ("create", "pods", "", True),
        ("create", "pods", "exec", True),
        ("update", "pods", "", False),
    ):
        asked = {"verb": verb, "resource": resource, "subresource": subresource}
        body: Object = {"spec": {"resourceAttributes": asked}}
        assert (await kube.call("POST", review, body, expect=201))["status"]["allowed"] is allowed
