"""What a session costs: writes and messages are billed, and every document goes away by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from infra.local.bus import LocalBus
from infra.local.store import LocalStore
from schemas.envelope import decode, encode, wrap
from schemas.events import CloseReason, FileItem, FilesPushed, SessionClosed, SessionRequested
from schemas.lifecycle import SessionState
from schemas.ports import Fields, Message, Transaction
from schemas.topics import SESSION_EVENTS
from schemas.transcript import Pacer
from tests.consumers.house import House, house
from tests.pace import in_a_breath
from tests.waiting import until

T = TypeVar("T")

WRITES, MESSAGES = 6, 4  # for a short command, everything counted
SHORT_SECONDS = 0.02
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class CountedTransaction:
    """Tells its store of each document that it writes."""

    def __init__(self, own: Transaction, tell: Callable[[str, Fields], None]) -> None:
        self.get, self.delete = own.get, own.delete
        self._own, self._tell = own, tell

    def create(self, path: str, data: Fields) -> None:
        self._own.create(path, data)
        self._tell(path, data)

    def update(self, path: str, fields: Fields) -> None:
        self._own.update(path, fields)
        self._tell(path, {})


class CountedStore(LocalStore):
    """The store, with a list of every document that was written, and those that were created."""

    written: list[str]
    created: dict[str, Fields]

    async def create(self, path: str, data: Fields) -> str:
        version = await super().create(path, data)
        self._wrote(path, data)
        return version

    async def update(self, path: str, fields: Fields, *, expect: str | None = None) -> str:
        version = await super().update(path, fields, expect=expect)
        self._wrote(path, {})
        return version

    async def transact(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        wrote: list[tuple[str, Fields]] = []

        async def counted(transaction: Transaction) -> T:
            wrote.clear()
            return await work(CountedTransaction(transaction, lambda path, data: wrote.append((path, data))))

        result = await super().transact(counted)
        for path, data in wrote:
            self._wrote(path, data)
        return result

    def _wrote(self, path: str, data: Fields) -> None:
        self.written.append(path)
        if data:
            self.created[path] = data


class CountedBus(LocalBus):
    """The bus, with every message that was published."""

    published: list[Message]

    async def publish(self, topic: str, message: Message) -> str:
        self.published.append(message)
        return await super().publish(topic, message)


@dataclass
class Accounts:
    """A staffed deployment whose writes and messages are counted."""

    house: House
    store: CountedStore
    bus: CountedBus

    def clear(self) -> None:
        self.store.written.clear()
        self.bus.published.clear()


@pytest.fixture
async def accounts(tmp_path: Path, python: Path) -> AsyncIterator[Accounts]:
    """One worker, counted."""
    async with house(tmp_path / "state", python) as opened:
        own: Any = opened.context
        store = CountedStore(own.store._database, indexes=own.store._indexes)
        store.written, store.created = [], {}
        bus = CountedBus(
            own.bus._database, topics=own.bus._topics, subscriptions=own.bus._subscriptions.values(), clock=opened.clock
        )
        bus.published = []
        counted = House(replace(opened.context, store=store, bus=bus), opened.clock, opened.hired)
        await counted.hire()
        yield Accounts(counted, store, bus)
        await opened.hired.aclose()


async def _quiet(accounts: Accounts, session: str) -> None:
    """The prompt is in the transcript: what is written next is the next command's."""

    async def prompted() -> bool:
        return (await accounts.house.transcript(session)).endswith(b"$ ")

    await until(prompted, "the prompt shows")


async def test_a_short_command_costs_six_writes_and_four_messages_at_most(accounts: Accounts) -> None:
    """Its record and number, its output, its end: whatever it is that the user waits for."""
    session = await accounts.house.ready()
    await _quiet(accounts, session)
    for text in ("true", "echo hello", "ls -la /; false"):
        await until(lambda text=text: _was_short(accounts, session, text), f"{text!r} takes no longer than it should")  # type: ignore[misc]
        assert len(accounts.store.written) <= WRITES, Counter(accounts.store.written)
        assert len(accounts.bus.published) <= MESSAGES


async def _was_short(accounts: Accounts, session: str, text: str) -> bool:
    """Run it and say whether it was short: on a busy machine it may not be."""
    accounts.clear()
    record, _ = await accounts.house.run(session, text)
    await _quiet(accounts, session)
    chunks = sum("/chunks/" in path for path in accounts.store.written)
    at_once = await in_a_breath(accounts.house.context.store, session, chunks)
    return record.seconds is not None and record.seconds < SHORT_SECONDS and at_once


def test_a_burst_that_a_program_prints_is_not_written_piece_by_piece() -> None:
    """Right after a key everything is urgent: a flood of it is two chunks at once, then few."""
    pacer, written = Pacer(), []
    for millisecond in range(50):
        now = millisecond / 1000
        if pacer.ready_at(urgent=True, full=False) <= now:
            pacer.wrote(now)
            written.append(millisecond)
    assert written[:2] == [0, 1]
    assert len(written) <= 4


def test_keys_are_echoed_at_once() -> None:
    """As fast as anybody types, and as a held key repeats."""
    pacer = Pacer()
    for number in range(200):
        now = number / 24
        assert pacer.ready_at(urgent=True, full=False) <= now
        pacer.wrote(now)


async def test_every_document_names_when_it_may_go(accounts: Accounts) -> None:
    """But for the user's count, which must not go while a session lives."""
    session = await accounts.house.ready()
    await accounts.house.run(session, "echo hello")
    await accounts.house.publish(FilesPushed(items=(FileItem(path="a"),), transfer_id="t"), session)
    await accounts.house.context.bus.publish(SESSION_EVENTS, Message(b"nonsense", {"a": "b"}, session))
    await accounts.house.publish(SessionClosed(reason=CloseReason.USER), session)
    await accounts.house.until_state(session, SessionState.CLOSED)

    async def buried() -> bool:
        return any(path.startswith("deadLetters/") for path in accounts.store.created)

    await until(buried, "the message is buried")
    kinds = {path.split("/")[-2] for path in accounts.store.created}
    assert kinds == {"sessions", "users", "commands", "chunks", "transfers", "deadLetters"}
    assert not [
        path for path, data in accounts.store.created.items() if "expireAt" not in data and not path.startswith("users")
    ]


async def test_an_answer_carries_the_trace_of_what_it_answers(accounts: Accounts) -> None:
    """From the request to the session's start: one trace, through every message in between."""
    session = await accounts.house.record()
    accounts.clear()
    clock = accounts.house.clock
    request = wrap(SessionRequested(user_id="alice"), subject=session, source="/", time=clock.now(), traceparent=TRACE)
    await accounts.bus.publish(SESSION_EVENTS, encode(request))
    await accounts.house.until_state(session, SessionState.READY)

    async def started() -> bool:
        return len(accounts.bus.published) == 3

    await until(started, "the start is told")
    answers = [decode(message) for message in accounts.bus.published]
    assert [(answer.event.type, answer.traceparent) for answer in answers] == [
        (kind, TRACE) for kind in ("session.requested.v1", "session.opened.v1", "session.started.v1")
    ]
