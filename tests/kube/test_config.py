"""How an API server is found, and how we prove who we are."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from infra.adapters import kube_config
from infra.adapters.kube_config import Access, NoCluster, load
from infra.adapters.kube_settings import KubeSettings
from schemas.errors import Unavailable
from tests.contracts.waiting import soon
from tests.kube.certificates import certificate

PEM = certificate().pem


def kubeconfig(path: Path, user: dict[str, Any], **cluster: Any) -> KubeSettings:
    """Settings that name a kubeconfig with this user."""
    authority = base64.b64encode(PEM).decode()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "first",
        "clusters": [
            {
                "name": "one",
                "cluster": {"server": "https://api.example:6443/", "certificate-authority-data": authority, **cluster},
            },
            {"name": "two", "cluster": {"server": "http://127.0.0.1:8001"}},
        ],
        "users": [{"name": "me", "user": user}],
        "contexts": [
            {"name": "first", "context": {"cluster": "one", "user": "me"}},
            {"name": "second", "context": {"cluster": "two", "user": "me"}},
        ],
    }
    path.write_text(json.dumps(config))
    return KubeSettings(access="kubeconfig", kubeconfig=path)


async def test_a_kubeconfig_gives_address_token_and_trust(tmp_path: Path) -> None:
    """What kubectl reaches, a worker reaches."""
    access = await load(kubeconfig(tmp_path / "config", {"token": "abc"}, **{"tls-server-name": "kubernetes"}))
    assert access.host == "https://api.example:6443"
    assert access.server_name == "kubernetes"
    assert access.proxy is None
    assert await access.headers() == {"Authorization": "Bearer abc"}
    assert access.tls is not None
    assert access.tls.verify_mode is ssl.CERT_REQUIRED
    assert access.tls.check_hostname
    assert len(access.tls.get_ca_certs()) == 1


async def test_a_context_can_be_chosen(tmp_path: Path) -> None:
    """One kubeconfig names several clusters."""
    settings = kubeconfig(tmp_path / "config", {}).model_copy(update={"context": "second"})
    access = await load(settings)
    assert (access.host, access.tls) == ("http://127.0.0.1:8001", None)
    assert await access.headers() == {}


async def test_a_proxy_of_the_environment_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the kubeconfig can say that the way to a cluster leads through a proxy."""
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://proxy.example:3128")
    assert (await load(kubeconfig(tmp_path / "one", {}))).proxy is None
    named = await load(kubeconfig(tmp_path / "two", {}, **{"proxy-url": "http://other.example:3128"}))
    assert named.proxy == "http://other.example:3128"


async def test_a_plugin_is_asked_again_when_its_token_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of clouds live for an hour, workers for weeks."""
    monkeypatch.setattr(kube_config, "TOKEN_SECONDS", 0.0)
    plugin, counter = tmp_path / "plugin.py", tmp_path / "counter"
    plugin.write_text(
        "import json, pathlib, datetime\n"
        f"counter = pathlib.Path({str(counter)!r})\n"
        "count = int(counter.read_text()) + 1 if counter.exists() else 1\n"
        "counter.write_text(str(count))\n"
        "life = datetime.timedelta(hours=-1 if count == 1 else 1)\n"
        "until = (datetime.datetime.now(datetime.timezone.utc) + life).strftime('%Y-%m-%dT%H:%M:%SZ')\n"
        "print(json.dumps({'apiVersion': 'client.authentication.k8s.io/v1', 'kind': 'ExecCredential',"
        " 'status': {'token': f'token-{count}', 'expirationTimestamp': until}}))\n"
    )
    command = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": sys.executable,
        "args": [str(plugin)],
        "interactiveMode": "Never",
    }
    access = await load(kubeconfig(tmp_path / "config", {"exec": command}))
    assert await access.headers() == {"Authorization": "Bearer token-2"}
    assert await access.headers() == {"Authorization": "Bearer token-2"}
    access.refused()
    assert await access.headers() == {"Authorization": "Bearer token-3"}


def _shell_plugin(path: Path, words: str) -> dict[str, Any]:
    """A plugin that gives what these shell words print, and no time."""
    version = "client.authentication.k8s.io/v1"
    status = f'{{"apiVersion": "{version}", "kind": "ExecCredential", "status": {{"token": "%s"}}}}'
    path.write_text(f"token=$({words}) && printf '{status}' \"$token\"\n")
    return {"exec": {"apiVersion": version, "command": "sh", "args": [str(path)], "interactiveMode": "Never"}}


async def test_a_token_that_was_refused_is_not_had_from_memory(tmp_path: Path) -> None:
    """Its file was replaced, or the plugin does not say how long it lives: only the server knows that it is over."""
    source = tmp_path / "token"
    users: list[dict[str, Any]] = [{"tokenFile": str(source)}, _shell_plugin(tmp_path / "plugin", f"cat {source}")]
    for user in users:
        source.write_text("first")
        access = await load(kubeconfig(tmp_path / "config", user))
        assert await access.headers() == {"Authorization": "Bearer first"}
        source.write_text("second\n")
        access.refused()
        assert await access.headers() == {"Authorization": "Bearer second"}


async def test_a_plugin_that_hangs_from_the_start_is_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker says at its start that it has none; it does not stand there."""
    monkeypatch.setattr(kube_config, "REFRESH_SECONDS", 0.2)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    settings = kubeconfig(tmp_path / "config", _shell_plugin(tmp_path / "plugin", f"cat {gate}"))
    try:
        with pytest.raises(NoCluster, match="too long"):
            await soon(load(settings))
    finally:
        await soon(asyncio.to_thread(gate.write_text, "late"))


async def test_a_plugin_that_fails_makes_nobody_of_us(tmp_path: Path) -> None:
    """Without a token requests would be made as anybody: it is unavailable, until the plugin works again."""
    source = tmp_path / "token"
    source.write_text("first")
    access = await load(kubeconfig(tmp_path / "config", _shell_plugin(tmp_path / "plugin", f"cat {source}")))
    assert await access.headers() == {"Authorization": "Bearer first"}
    source.unlink()
    access.refused()
    for _ in range(2):
        with pytest.raises(Unavailable, match="none any more"):
            await access.headers()
    source.write_text("second")
    assert await access.headers() == {"Authorization": "Bearer second"}


async def test_in_a_pod_the_account_of_the_pod_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is read anew: the kubelet replaces it under way."""
    token, authority = tmp_path / "token", tmp_path / "ca.crt"
    token.write_text("first")
    authority.write_bytes(PEM)
    from kubernetes.config import incluster_config

    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(authority))
    monkeypatch.setattr(kube_config, "ACCOUNT", token)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    access = await load(KubeSettings())
    assert access.host == "https://10.0.0.1:443"
    assert await access.headers() == {"Authorization": "Bearer first"}
    token.write_text("second\n")
    assert await access.headers() == {"Authorization": "Bearer first"}
    monkeypatch.setattr(kube_config, "TOKEN_SECONDS", 0.0)
    access.refused()
    for given in ("second", "third"):
        token.write_text(f"{given}\n")
        assert await access.headers() == {"Authorization": f"Bearer {given}"}


async def test_googles_credentials_are_refreshed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker outside of the cluster needs neither gcloud nor a kubeconfig."""
    import google.auth

    class Credentials:
        """Like google.auth's, valid for one use."""

        def __init__(self) -> None:
            self.count = 0
            self.valid = False

        @property
        def token(self) -> str:
            """The current token."""
            return f"g{self.count}"

        def refresh(self, request: Any) -> None:
            """A new token."""
            self.count += 1

    credentials = Credentials()
    monkeypatch.setattr(google.auth, "default", lambda scopes: (credentials, "project"))
    settings = KubeSettings(access="google", server="203.0.113.1", server_ca=base64.b64encode(PEM).decode())
    access = await load(settings)
    assert access.host == "https://203.0.113.1"
    assert await access.headers() == {"Authorization": "Bearer g1"}
    assert await access.headers() == {"Authorization": "Bearer g1"}
    access.refused()
    assert await access.headers() == {"Authorization": "Bearer g2"}


@pytest.mark.parametrize(
    "settings",
    [
        KubeSettings(access="kubeconfig", kubeconfig=Path("/nowhere/config")),
        KubeSettings(access="in-cluster"),
        KubeSettings(access="google"),
        KubeSettings(access="google", server="203.0.113.1", server_ca="no base64"),
    ],
    ids=lambda settings: f"{settings.access}-{settings.server}",
)
async def test_no_cluster_is_said_in_our_words(settings: KubeSettings) -> None:
    """A deployment that is not complete fails at its start, and says what it looked for."""
    with pytest.raises(NoCluster, match=settings.access):
        await load(settings)


async def test_a_broken_kubeconfig_is_no_cluster(tmp_path: Path) -> None:
    """Not the parser's own errors, whatever they are."""
    for number, text in enumerate(("", "a: [", "[]", "clusters: 7", '{"current-context": "x", "contexts": []}')):
        path = tmp_path / str(number)
        path.write_text(text)
        with pytest.raises(NoCluster):
            await load(KubeSettings(access="kubeconfig", kubeconfig=path))


async def test_one_refresh_at_a_time() -> None:
    """Hundreds of sessions that start at once ask for one token."""
    asked = 0

    def token(_: bool) -> str:
        nonlocal asked
        asked += 1
        return "Bearer t"

    access = Access("http://x", None, token)
    assert await asyncio.gather(*(access.headers() for _ in range(50))) == [{"Authorization": "Bearer t"}] * 50
    assert asked == 1


async def test_a_token_that_cannot_be_had_is_unavailable() -> None:
    """It may be there the next time."""
    answers: list[Any] = [ValueError("no identity"), "Bearer t"]

    def token(_: bool) -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    access = Access("http://x", None, token)
    with pytest.raises(Unavailable, match="no identity"):
        await access.headers()
    assert await access.headers() == {"Authorization": "Bearer t"}


async def test_a_plugin_that_hangs_costs_nobody_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks hears that no token can be had, and all else that works in threads goes on."""
    monkeypatch.setattr(kube_config, "REFRESH_SECONDS", 0.01)
    released = threading.Event()

    def token(_: bool) -> str:
        released.wait()
        return "Bearer late"

    access = Access("http://x", None, token)
    try:
        for _ in range(100):
            with pytest.raises(Unavailable, match="too long"):
                await access.headers()
        assert await soon(asyncio.to_thread(lambda: "done")) == "done"
    finally:
        released.set()
