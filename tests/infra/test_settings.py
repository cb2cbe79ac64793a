"""What a deployment sets, and what it is told when it sets it wrong."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
import pytest
from pydantic import SecretStr

from infra.local.keys import token_secret
from infra.settings import Settings
from infra.wiring import agent_secret, identity, notice
from producers.identity import sign_local_token
from schemas.errors import Malformed, Unauthenticated


def test_without_any_variable_it_is_the_embedded_profile() -> None:
    """`make up` needs no configuration."""
    settings = Settings.from_environment({})
    assert (settings.profile, settings.state, settings.network) == ("embedded", Path(".pigeon"), "none")
    assert notice(settings) == ""


def test_every_kind_of_value_is_read() -> None:
    """Paths, lists, JSON limits with ISO 8601 durations."""
    settings = Settings.from_environment(
        {
            "PIGEON_STATE": "/var/lib/pigeon",
            "PIGEON_ALLOWED_ORIGINS": "https://a.example, https://b.example",
            "PIGEON_LIMITS": '{"capacity": 4, "idle_timeout": "PT10M"}',
            "PIGEON_UNSAFE_NO_SANDBOX": "1",
            "PIGEON_KUBE": '{"namespace": "elsewhere", "runtime_class": "gvisor"}',
            "UNRELATED": "x",
        }
    )
    assert settings.state == Path("/var/lib/pigeon")
    assert settings.allowed_origins == ("https://a.example", "https://b.example")
    assert (settings.limits.capacity, settings.limits.idle_timeout) == (4, timedelta(minutes=10))
    assert settings.unsafe_no_sandbox
    assert (settings.kube.namespace, settings.kube.runtime_class) == ("elsewhere", "gvisor")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PIGEON_LIMITS", "not json"),
        ("PIGEON_LIMITS", '{"capacity": "many"}'),
        ("PIGEON_KUBE", '{"namespaces": "typo"}'),
        ("PIGEON_NETWORK", "everything"),
        ("PIGEON_PORT", "http"),
    ],
)
def test_a_wrong_value_names_its_variable(name: str, value: str) -> None:
    """Whoever set it knows which one to mend."""
    with pytest.raises(Malformed, match=name):
        Settings.from_environment({name: value})


def test_less_isolation_is_said_in_every_session() -> None:
    """The first line of a session warns of a shared network and of no sandbox at all."""
    assert "network" in notice(Settings(network="host"))
    assert "WARNING" in notice(Settings(unsafe_no_sandbox=True))


async def test_a_site_with_supabase_keeps_this_machines_own_way_in(tmp_path: Path) -> None:
    """The learning site's users are known, and so are the page and the command on the machine itself; nobody else."""
    secret, issuer = "s" * 32, "https://project.supabase.example/auth/v1"
    settings = Settings(state=tmp_path, supabase_jwt_secret=secret, supabase_issuer=issuer)
    claims = {"sub": "u-1", "aud": "authenticated", "iss": issuer, "exp": datetime.now(UTC) + timedelta(hours=1)}
    verifier = identity(settings)
    site = jwt.encode(claims, secret, algorithm="HS256")
    assert (await verifier.verify(site)).user == "u-1"
    own = sign_local_token(token_secret(tmp_path), "local", timedelta(hours=1))
    assert (await verifier.verify(own)).user == "local"
    with pytest.raises(Unauthenticated):
        await verifier.verify(jwt.encode(claims, "x" * 32, algorithm="HS256"))


async def test_in_the_cloud_only_the_sites_tokens_are_good(tmp_path: Path) -> None:
    """A token that some machine signed for itself opens nothing there, and no secret file is made."""
    secret, issuer = "s" * 32, "https://project.supabase.example/auth/v1"
    settings = Settings(profile="gcp", state=tmp_path, supabase_jwt_secret=secret, supabase_issuer=issuer)
    own = sign_local_token(token_secret(tmp_path / "elsewhere"), "local", timedelta(hours=1))
    with pytest.raises(Unauthenticated):
        await identity(settings).verify(own)
    assert not (tmp_path / "token.secret").exists()


def test_in_the_cloud_somebody_has_to_say_whose_tokens_are_good(tmp_path: Path) -> None:
    """A deployment that forgot it does not start with a way in of its own."""
    with pytest.raises(Malformed, match="PIGEON_SUPABASE_JWKS_URL"):
        identity(Settings(profile="gcp", state=tmp_path))


def test_all_workers_of_the_cloud_share_one_secret(tmp_path: Path) -> None:
    """Each could make one of its own, and none could then attach to another's sessions."""
    settings = Settings(profile="gcp", state=tmp_path)
    assert agent_secret(settings.model_copy(update={"worker_secret": SecretStr("ab" * 32)})) == b"\xab" * 32
    for text in ("", "ab" * 31, "no hexadecimal"):
        with pytest.raises(Malformed, match="PIGEON_WORKER_SECRET"):
            agent_secret(settings.model_copy(update={"worker_secret": SecretStr(text)}))


def test_off_the_cloud_a_secret_is_made_and_kept(tmp_path: Path) -> None:
    """`make up` needs none to be set; one that is set wins."""
    made = agent_secret(Settings(state=tmp_path))
    assert agent_secret(Settings(state=tmp_path)) == made
    assert agent_secret(Settings(state=tmp_path, worker_secret=SecretStr("cd" * 32))) == b"\xcd" * 32


def test_a_field_of_limits_and_pods_may_have_a_variable_of_its_own() -> None:
    """Each part of a deployment sets what it knows; such a variable wins over the object."""
    settings = Settings.from_environment(
        {
            "PIGEON_LIMITS": '{"capacity": 4, "sessions_per_user": 2}',
            "PIGEON_LIMITS_CAPACITY": "7",
            "PIGEON_LIMITS_IDLE_TIMEOUT": "PT10M",
            "PIGEON_KUBE_RUNTIME_CLASS": "gvisor",
            "PIGEON_KUBE_NAMESERVERS": '["169.254.20.10"]',
        }
    )
    assert (settings.limits.capacity, settings.limits.sessions_per_user) == (7, 2)
    assert settings.limits.idle_timeout == timedelta(minutes=10)
    assert (settings.kube.runtime_class, settings.kube.nameservers) == ("gvisor", ("169.254.20.10",))
    for name, value in (
        ("PIGEON_LIMITS_CAPACITY", "many"),
        ("PIGEON_KUBE_NAMESERVERS", "[oops"),
        ("PIGEON_KUBE", "[]"),
    ):
        with pytest.raises(Malformed, match=name):
            Settings.from_environment({name: value})
