"""What a deployment sets, and what it is told when it sets it wrong."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from infra.settings import Settings
from infra.wiring import notice
from schemas.errors import Malformed


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
            "UNRELATED": "x",
        }
    )
    assert settings.state == Path("/var/lib/pigeon")
    assert settings.allowed_origins == ("https://a.example", "https://b.example")
    assert (settings.limits.capacity, settings.limits.idle_timeout) == (4, timedelta(minutes=10))
    assert settings.unsafe_no_sandbox


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PIGEON_LIMITS", "not json"),
        ("PIGEON_LIMITS", '{"capacity": "many"}'),
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
