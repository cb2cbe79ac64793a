"""Secrets that are files, and tickets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.local.keys import MAX_TICKETS, TICKET_LIFETIME, InsecureSecret, Tickets, token_secret, worker_secret


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


def test_a_secret_is_made_once_and_is_nobody_elses(tmp_path: Path) -> None:
    """The same secret for every process, in a file that only its owner can read; each purpose has its own."""
    state = tmp_path / "state"
    assert token_secret(state) == token_secret(state)
    assert len(token_secret(state)) == 32
    assert token_secret(state) != worker_secret(state)
    assert {file.stat().st_mode & 0o777 for file in state.iterdir()} == {0o600}
    assert state.stat().st_mode & 0o777 == 0o700
    assert len(list(state.iterdir())) == 2, "drafts are left behind"


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    """Whoever makes the secret first has made it for all."""
    with ThreadPoolExecutor(16) as pool:
        secrets = set(pool.map(lambda _: token_secret(tmp_path), range(64)))
    assert len(secrets) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_secret_that_others_can_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    """The error names the file and what to do."""
    token_secret(tmp_path)
    file = tmp_path / "token.secret"
    file.chmod(mode)
    with pytest.raises(InsecureSecret, match=r"token\.secret can be read by others: chmod 600"):
        token_secret(tmp_path)


def test_a_folder_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    """Where anybody can put files, a secret may be anybody's."""
    tmp_path.chmod(0o777)
    with pytest.raises(InsecureSecret, match="can be written by everybody"):
        token_secret(tmp_path)


@pytest.mark.parametrize("text", [b"", b"\n", b"00" * 31, b"00" * 33, b"zz" * 32, b"\xff" * 64])
def test_a_file_that_holds_no_secret_is_refused(tmp_path: Path, text: bytes) -> None:
    """A short or empty key is never signed with."""
    token_secret(tmp_path)
    (tmp_path / "token.secret").write_bytes(text)
    with pytest.raises(InsecureSecret, match="does not hold a secret"):
        token_secret(tmp_path)


def test_a_secret_is_not_read_through_a_link(tmp_path: Path) -> None:
    """A symbolic link in the secret's place is an error, whatever it points to."""
    other = tmp_path / "other"
    token_secret(other)
    state = tmp_path / "state"
    state.mkdir()
    (state / "token.secret").symlink_to(other / "token.secret")
    with pytest.raises(OSError, match="symbolic links"):
        token_secret(state)


def test_a_ticket_is_good_once() -> None:
    """The second use gets nothing, and neither does a guess."""
    tickets = Tickets(Clock())
    ticket = tickets.issue("alice")
    assert tickets.redeem("guess") is None
    assert tickets.redeem("") is None
    assert tickets.redeem("\udcff") is None
    assert tickets.redeem(ticket) == "alice"
    assert tickets.redeem(ticket) is None


def test_a_ticket_does_not_last() -> None:
    """It is good right up to its last moment, and not in it."""
    clock = Clock()
    tickets = Tickets(clock)
    young, old = tickets.issue("alice"), tickets.issue("bob")
    clock.time += TICKET_LIFETIME - timedelta(microseconds=1)
    assert tickets.redeem(young) == "alice"
    clock.time += timedelta(microseconds=1)
    assert tickets.redeem(old) is None


def test_tickets_do_not_pile_up() -> None:
    """However many are asked for, only so many are remembered: the newest."""
    tickets = Tickets(Clock())
    all_of_them = [tickets.issue(str(number)) for number in range(MAX_TICKETS + 1)]
    assert tickets.redeem(all_of_them[0]) is None
    assert tickets.redeem(all_of_them[1]) == "1"
    assert tickets.redeem(all_of_them[-1]) == str(MAX_TICKETS)
