"""Bells: who is rung, who hears of what was lost, and what dead processes leave."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from infra.local.doorbell import MAX_HASHES, RING_ALL, Bells, Doorbell, Rings, bell_hash
from tests.contracts.waiting import soon
from tests.waiting import until

Open = Callable[[Path], tuple[Bells, Doorbell]]


@pytest.fixture
async def ring_up() -> AsyncIterator[Open]:
    """Opens doorbells and closes them at the end."""
    doorbells: list[Doorbell] = []

    def open_one(directory: Path) -> tuple[Bells, Doorbell]:
        bells = Bells()
        doorbell = Doorbell(directory, bells)
        doorbell.open()
        doorbells.append(doorbell)
        return bells, doorbell

    yield open_one
    for doorbell in doorbells:
        doorbell.close()


def rings(before: int, last: int, *names: str) -> Rings:
    """A commit that rang these bells."""
    return Rings(before, last, frozenset(map(bell_hash, names)))


def test_a_ring_survives_its_datagram() -> None:
    """What is sent is what is heard."""
    sent = rings(7, 2**60, "a", "b")
    assert Rings.decode(sent.encode()) == sent


def test_too_many_bells_ring_all() -> None:
    """A datagram stays small however much one commit changed."""
    sent = rings(0, 1, *map(str, range(MAX_HASHES + 1)))
    assert Rings.decode(sent.encode()).hashes == {RING_ALL}


@pytest.mark.parametrize("datagram", [b"", b"short", bytes(17), bytes(23)])
def test_noise_is_no_ring(datagram: bytes) -> None:
    """Anything else that arrives is refused."""
    with pytest.raises(ValueError, match="not a ring"):
        Rings.decode(datagram)


def test_only_the_bell_that_is_rung_rings() -> None:
    """A waiter for another name sleeps on."""
    bells = Bells()
    with bells.bell("a") as a, bells.bell("b") as b:
        bells.ring(rings(0, 1, "a"))
        assert (a.is_set(), b.is_set()) == (True, False)


def test_audit_is_silent_while_nothing_is_lost() -> None:
    """Rings that overtook each other on the way are all heard of in the end."""
    bells = Bells()
    bells.start(10)
    with bells.bell("a") as a:
        for before, last in ((12, 13), (11, 12), (13, 15), (10, 11)):
            bells.ring(rings(before, last))
        bells.audit(15)
        bells.audit(15)
        assert not a.is_set()


def test_audit_rings_all_after_a_loss() -> None:
    """A commit that nobody announced wakes everybody at the second look, once."""
    bells = Bells()
    bells.start(10)
    with bells.bell("a") as a:
        bells.ring(rings(11, 12))
        bells.audit(12)
        assert not a.is_set()  # its ring may be on its way
        bells.audit(12)
        assert a.is_set()
        a.clear()
        bells.audit(12)
        bells.audit(12)
        assert not a.is_set()


def test_bells_are_forgotten() -> None:
    """A waiter that left is not kept."""
    bells = Bells()
    with bells.bell("a"):
        pass
    assert not bells._waiting


async def test_a_ring_reaches_the_others(tmp_path: Path, ring_up: Open) -> None:
    """Everybody but the one who rang."""
    (bells_1, bell_1), (bells_2, _), (bells_3, _) = (ring_up(tmp_path / "bells") for _ in range(3))
    with bells_1.bell("a") as own, bells_2.bell("a") as second, bells_3.bell("a") as third:
        bell_1.announce(rings(0, 1, "a"))
        await soon(asyncio.gather(second.wait(), third.wait()))
        assert not own.is_set()


async def test_a_long_path_is_no_hindrance(tmp_path: Path, ring_up: Open) -> None:
    """Sockets work in folders whose names are longer than a socket's address."""
    folder = tmp_path / ("deep" * 30) / "bells"
    (_, first), (bells, _) = ring_up(folder), ring_up(folder)
    with bells.bell("a") as bell:
        first.announce(rings(0, 1, "a"))
        await soon(bell.wait())


async def test_sockets_of_the_dead_are_removed(tmp_path: Path, ring_up: Open) -> None:
    """A process that was killed leaves a socket; the next ring takes it away."""
    _, doorbell = ring_up(tmp_path / "bells")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        dead.bind(str(tmp_path / "bells" / "1-dead"))
    doorbell.announce(rings(0, 1, "a"))
    assert not (tmp_path / "bells" / "1-dead").exists()


async def test_a_full_queue_is_served_later(tmp_path: Path, ring_up: Open) -> None:
    """A process that did not look for a while still hears every ring."""
    (_, first), (bells, _) = ring_up(tmp_path / "bells"), ring_up(tmp_path / "bells")
    with bells.bell("last") as last:
        for number in range(1, 50):
            first.announce(rings(number - 1, number, f"bell {number}"))
        first.announce(rings(49, 50, "last"))
        assert first.flush()

        async def all_sent() -> bool:
            return not first.flush()

        await until(all_sent, "the queue has room")
        await soon(last.wait())


async def test_a_vanished_folder_does_not_hurt(tmp_path: Path, ring_up: Open) -> None:
    """Ringing never fails a commit; the audit is there for the others."""
    _, doorbell = ring_up(tmp_path / "bells")
    for path in (tmp_path / "bells").iterdir():
        path.unlink()
    (tmp_path / "bells").rmdir()
    doorbell.announce(rings(0, 1, "a"))
