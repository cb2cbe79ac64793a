"""The official client works with the API server of the tests: what it can read and do is in the real format."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException

from tests.kube.client import BEGINNING, pod
from tests.kube.server import NAMESPACE, ApiServer


@pytest.fixture
async def core(api: ApiServer, tmp_path: Path) -> AsyncIterator[client.CoreV1Api]:
    """The official client, configured by a kubeconfig."""
    path = api.kubeconfig(tmp_path / "kubeconfig", token="admin-token")
    opened = await asyncio.to_thread(config.new_client_from_config, str(path))
    yield client.CoreV1Api(opened)
    opened.rest_client.pool_manager.clear()
    opened.close()


async def call(method: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The client blocks."""
    return await asyncio.to_thread(method, *args, **options)


def until(core: client.CoreV1Api, condition: Callable[[Any, Any], bool]) -> Any:
    """Watch the namespace until an event is as wanted; returns its pod."""
    watching: Any = watch.Watch()  # type: ignore[no-untyped-call]
    options = {"timeout_seconds": 30, "resource_version": BEGINNING}
    with contextlib.closing(watching.stream(core.list_namespaced_pod, NAMESPACE, **options)) as events:
        for event in events:
            if condition(event["type"], event["object"]):
                return event["object"]
    raise AssertionError("the watch ended")


async def test_a_pod_is_made_watched_patched_and_deleted(core: client.CoreV1Api) -> None:
    """A whole life, typed."""
    made = await call(core.create_namespaced_pod, NAMESPACE, pod("one"))
    running = await call(until, core, lambda _, pod: pod.status.phase == "Running")
    assert running.metadata.uid == made.metadata.uid
    assert running.status.container_statuses[0].state.running.started_at is not None
    labels = {"metadata": {"labels": {"mine": "yes"}}}
    changed = await call(core.patch_namespaced_pod, "one", NAMESPACE, labels)
    assert changed.metadata.labels == {"app": "test", "name": "one", "mine": "yes"}
    found = await call(core.list_namespaced_pod, NAMESPACE, label_selector="mine in (yes, no)")
    assert [each.metadata.name for each in found.items] == ["one"]
    wanted = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=made.metadata.uid), grace_period_seconds=5)
    await call(core.delete_namespaced_pod, "one", NAMESPACE, body=wanted)
    gone = await call(until, core, lambda kind, _: kind == "DELETED")
    assert gone.status.container_statuses[0].state.terminated.finished_at is not None


async def test_refusals_are_what_the_client_expects(core: client.CoreV1Api) -> None:
    """Status, reason and message arrive where they always are."""
    with pytest.raises(ApiException) as missing:
        await call(core.read_namespaced_pod, "none", NAMESPACE)
    assert (missing.value.status, '"reason": "NotFound"' in str(missing.value.body)) == (404, True)
    with pytest.raises(ApiException) as wrong:
        await call(core.create_namespaced_pod, NAMESPACE, {**pod("one"), "kind": "Job"})
    assert wrong.value.status == 400


async def test_config_maps_and_quotas_can_be_made(core: client.CoreV1Api) -> None:
    """A quota that was made through the API counts."""
    await call(core.create_namespaced_config_map, NAMESPACE, {**_named("ConfigMap", "c"), "data": {"a": "b"}})
    assert (await call(core.read_namespaced_config_map, "c", NAMESPACE)).data == {"a": "b"}
    await call(
        core.create_namespaced_resource_quota,
        NAMESPACE,
        {**_named("ResourceQuota", "q"), "spec": {"hard": {"count/pods": "0"}}},
    )
    with pytest.raises(ApiException) as over:
        await call(core.create_namespaced_pod, NAMESPACE, pod("one"))
    assert "exceeded quota: q" in str(over.value.body)


def _named(kind: str, name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}}
