"""Workers on Google's emulators whose machines' clocks are minutes apart: Firestore's commits tell them the time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest

from infra.adapters.push import PushIdentity
from infra.clock import ServiceClock
from infra.profiles import Ports, emulators
from infra.settings import Settings
from schemas.errors import Unauthenticated
from schemas.ports import Principal
from tests.consumers.clocks import AHEAD, PATIENT, SECOND, ClocksApart, ClocksApartIdle, Offices, WrongClock
from tests.consumers.house import House, house
from tests.emulators.pushing import Issuer


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch, firestore_host: str, pubsub_host: str) -> None:
    """The profile uses the emulators that run."""
    monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", firestore_host)
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", pubsub_host)


def ports(project: str, ahead: timedelta) -> Any:
    """A process of the deployment, on a machine whose clock is off by so much."""
    return emulators(Settings(profile="emulators", project=project), WrongClock(ahead))


@asynccontextmanager
async def machines(state: Path, python: Path, project: str, **limits: Any) -> AsyncIterator[Offices]:
    """Two, with clients of their own."""
    async with house(state, python, **limits) as shared, AsyncExitStack() as opened:

        async def office(ahead: timedelta) -> House:
            own: Ports = await opened.enter_async_context(ports(project, ahead))
            context = replace(shared.fellow(), store=own.store, bus=own.bus, clock=own.clock)
            return House(context, shared.clock, shared.hired)

        yield Offices(await office(AHEAD), await office(-AHEAD))


@pytest.fixture
async def offices(tmp_path: Path, python: Path, project: str) -> AsyncIterator[Offices]:
    """Times are short by no clock but one that is minutes off."""
    async with machines(tmp_path / "state", python, project, **PATIENT) as both:
        yield both


@pytest.fixture
async def impatient(tmp_path: Path, python: Path, project: str) -> AsyncIterator[Offices]:
    """Closed after seconds."""
    async with machines(tmp_path / "state", python, project, idle_timeout=6 * SECOND, idle_warning=3 * SECOND) as both:
        yield both


@pytest.mark.slow
class TestOnEmulators(ClocksApart, ClocksApartIdle):
    """As on the embedded stack."""


@pytest.mark.parametrize("ahead", [AHEAD, -AHEAD], ids=str)
async def test_a_process_knows_the_time_from_its_start(project: str, ahead: timedelta) -> None:
    """Before it has handled anything; and a custom token that it mints is of this time."""
    async with ports(project, ahead) as own:
        assert abs(own.clock.now() - datetime.now(UTC)) < AHEAD / 3
        token = await own.minter.mint(Principal("alice"))
        claims = jwt.decode(token, options={"verify_signature": False})
        assert abs(claims["iat"] - datetime.now(UTC).timestamp()) < AHEAD.total_seconds() / 3


async def test_a_clock_that_jumps_is_set_right_by_the_next_commit(project: str) -> None:
    """As when a machine that slept asks its time server again."""
    machine = WrongClock(timedelta(0))
    async with emulators(Settings(profile="emulators", project=project), machine) as own:
        machine.ahead = -AHEAD
        await own.store.create("sessions/s1", {})
        assert abs(own.clock.now() - datetime.now(UTC)) < AHEAD / 3


@pytest.mark.parametrize(("ahead", "believed"), [(timedelta(0), True), (AHEAD, False), (-AHEAD, False)], ids=str)
async def test_a_push_token_is_judged_by_the_clock_that_is_given(ahead: timedelta, believed: bool) -> None:
    """Not by the machine's, which would refuse every push while it is off."""
    issuer, clock = Issuer(), ServiceClock(WrongClock(-ahead))
    if believed:
        clock = ServiceClock(WrongClock(AHEAD))
        clock.told(datetime.now(UTC), clock.asked())
    async with issuer.identity(clock) as identity:
        assert isinstance(identity, PushIdentity)
        token = issuer.token(exp=datetime.now(UTC) + timedelta(minutes=1))
        if believed:
            await identity.verify(token)
            return
        with pytest.raises(Unauthenticated):
            await identity.verify(token)
