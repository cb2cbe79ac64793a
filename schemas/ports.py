"""Every port of the system, with its promises. Adapters are siblings named by technology; one contract suite
runs on each of them (tests/contracts)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeVar

T = TypeVar("T")

Value = Any  # None, bool, int, float, str, bytes, aware datetime, and lists or string-keyed dicts of these
Fields = Mapping[str, Value]


class Clock(Protocol):
    """Time as an argument. A simulation brings its own."""

    def now(self) -> datetime:
        """The current time, aware, in UTC."""

    async def sleep(self, seconds: float) -> None:
        """Return after that many seconds of this clock."""


# Documents ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A document as it was at one moment.

    `path` alternates collections and ids ("sessions/s1/chunks/0000"); `version` is opaque, compares equal only
    for the same write, and is what a precondition names.
    """

    path: str
    data: Fields
    version: str

    @property
    def id(self) -> str:
        """The last segment of the path."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Where:
    """One condition of a query."""

    field: str
    op: Literal["==", "<=", ">="]
    value: Value


@dataclass(frozen=True, slots=True)
class Query:
    """At most `limit` documents of one collection, ordered by `order_by` (None: by id).

    Equalities first, then at most one range, which must be on `order_by`. The combination must be declared in
    `schemas.documents.INDEXES`; anything else raises ValueError, as a cloud store without the index would.
    Documents in which `order_by` is None or missing are not in the index and not in the result.
    `after` is the id of the last document seen and goes with order by id only.
    """

    collection: str
    where: tuple[Where, ...] = ()
    order_by: str | None = None
    descending: bool = False
    limit: int = 100
    after: str = ""


class Transaction(Protocol):
    """Reads first, then writes; all writes commit together or not at all."""

    async def get(self, path: str) -> Snapshot | None:
        """Read within the transaction. Raises RuntimeError after the first write."""

    def create(self, path: str, data: Fields) -> None:
        """On commit: AlreadyExists if there is such a document."""

    def update(self, path: str, fields: Fields) -> None:
        """On commit: merge top-level fields; NotFound if there is no such document."""

    def delete(self, path: str) -> None:
        """On commit: remove the document if it is there."""


class Store(Protocol):
    """Documents with the promises of Firestore, and never kinder than it.

    A write that returned is durable and seen by every later read, here or in another process. A document over
    MAX_DOCUMENT_BYTES or a commit over MAX_COMMIT_BYTES raises TooLarge. Any call may raise StoreUnavailable,
    after which nothing of that call has been written, or, where the answer got lost, all of it.
    """

    async def get(self, path: str) -> Snapshot | None:
        """The document, or None."""

    async def create(self, path: str, data: Fields) -> str:
        """Write a document that must not exist yet; returns its version. Raises AlreadyExists."""

    async def update(self, path: str, fields: Fields, *, expect: str | None = None) -> str:
        """Replace top-level fields, keep the others; returns the new version.

        Raises NotFound; raises Conflict if `expect` is given and is not the current version.
        """

    async def delete(self, path: str) -> None:
        """Remove the document; nothing happens if there is none."""

    async def transact(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """Run `work` and commit what it wrote, isolated from other writers.

        `work` may run more than once and must have no effects of its own. Raises what `work` raises (nothing is
        committed then), AlreadyExists or NotFound of its writes, or Conflict when contention did not end.
        """

    async def query(self, query: Query) -> list[Snapshot]:
        """The documents that match now."""

    def watch(self, path: str) -> AsyncIterator[Snapshot | None]:
        """The document now (None where there is none), then again after changes; states in between may be
        skipped, the latest never is. Endless; close the iterator (aclose) to stop."""

    def follow(self, collection: str, *, after: str = "", limit: int = 32) -> AsyncIterator[list[Snapshot]]:
        """Every document of the collection whose id is greater than `after`, in id order, in non-empty batches
        of at most `limit`; then new ones as they are created. For collections that only grow at the end.

        The cost of the first batch does not depend on how many documents precede `after`. Endless.
        """


# Messages ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """What travels on a topic. Attributes are strings; the ordering key "" means unordered."""

    data: bytes
    attributes: Mapping[str, str] = field(default_factory=dict)
    ordering_key: str = ""


@dataclass(frozen=True, slots=True)
class Subscription:
    """A subscription's policy. Times are in seconds."""

    name: str
    topic: str
    ordered: bool = False
    ack_deadline: float = 10.0  # how soon a dead worker's message is given to another
    max_lease: float = 600.0  # how long one delivery is extended at the most
    max_outstanding: int = 1_000  # messages held by one subscriber
    max_attempts: int = 10  # deliveries before the bus moves the message to dead letters
    retry_min: float = 1.0  # back-off of an unordered message after a nack
    retry_max: float = 60.0
    retention: float = 7 * 24 * 3600.0  # how long an unacked message is kept


class Delivery(Protocol):
    """One delivery of one message. Its lease is extended until it is settled, released or `max_lease` is over."""

    @property
    def message(self) -> Message:
        """The message as published."""

    @property
    def message_id(self) -> str:
        """The bus's id of the message, the same at every delivery."""

    @property
    def attempt(self) -> int:
        """1 at the first delivery."""

    @property
    def published_at(self) -> datetime:
        """When the bus accepted it."""

    async def ack(self) -> None:
        """Done: it is not delivered again (best effort: duplicates stay possible)."""

    async def nack(self) -> None:
        """Give it back now; it comes again after the subscription's back-off."""

    def release(self) -> None:
        """Stop extending the lease and settle nothing; it comes again after its deadline."""

    async def lost(self) -> None:
        """Return when the lease is over without being settled: another worker may hold the message now."""


class Bus(Protocol):
    """Topics and subscriptions with the promises of Pub/Sub: at least once, ordered by key where asked.

    In an ordered subscription a key's next message is delivered only after the one before it was acked (or
    dead-lettered), and a redelivered message is followed by its successors again.
    """

    async def publish(self, topic: str, message: Message) -> str:
        """Returns the message's id once it is durable. Raises BusUnavailable, TooLarge, or NotFound (topic)."""

    def pull(self, subscription: Subscription) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """Open a subscriber. On leaving the context it takes no more messages; what is held and unsettled then
        comes again at its deadline, or at once where the bus can give it back."""


# Sandboxes ---------------------------------------------------------------------------------------


class Phase(StrEnum):
    """How far a sandbox is."""

    STARTING = "starting"
    RUNNING = "running"  # its agent can be connected to
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What to create. `session` is None for a warm sandbox of the pool."""

    name: str
    session: str | None
    memory_bytes: int
    workspace_bytes: int
    processes: int
    file_bytes: int
    lifetime_seconds: int
    image: str = ""  # "" is the deployment's default


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A sandbox as its runtime sees it. `uid` names this one incarnation: a name may be used again, a uid never.

    `reason` says in plain words why it ended, or what it is waiting for. `outdated`: a new one would be made of another
    image or agent, so a warm one is not given to a session any more.
    """

    name: str
    uid: str
    session: str | None
    phase: Phase
    created_at: datetime
    reason: str = ""
    outdated: bool = False


class ByteStream(Protocol):
    """A duplex connection to a sandbox's agent, as bytes. Either side may end it at any byte."""

    async def read(self, limit: int) -> bytes:
        """At least one byte and at most `limit`; b"" at the end of the stream."""

    async def write(self, data: bytes) -> None:
        """Returns once the data is accepted (back-pressure included). Raises AgentUnreachable."""

    async def close(self) -> None:
        """End the connection; never raises."""


class Sandboxes(Protocol):
    """Where user code runs. Nothing a sandbox does reaches the host, a neighbour or a credential."""

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """Create it; returns as soon as it is named, before it runs. One of that name and session that is there
        already is returned instead. Raises NoCapacity, SandboxFailed or Unavailable."""

    async def claim(self, name: str, uid: str, session: str) -> Sandbox:
        """Give a warm sandbox to a session, at most once. Raises Conflict if it was claimed, SandboxGone,
        or NoCapacity where one more session is more than there is room for."""

    async def get(self, name: str) -> Sandbox | None:
        """The sandbox of that name (ended ones included while the runtime remembers them), or None."""

    async def find(self, session: str) -> list[Sandbox]:
        """Every sandbox of that session, read consistently with earlier creates and claims."""

    async def list(self) -> list[Sandbox]:
        """All of them, warm ones included, read as consistently."""

    async def delete(self, name: str, uid: str) -> None:
        """End and remove it, if it is still that incarnation; returns when nothing of it runs any more."""

    async def running(self, name: str, uid: str) -> Sandbox:
        """Wait until its agent can be connected to. Raises SandboxGone, SandboxFailed, or NoCapacity where the runtime
        took it and then found no place for it."""

    async def gone(self, name: str, uid: str) -> Sandbox:
        """Wait until it has ended; returns it with its `reason`."""

    async def connect(self, name: str, uid: str) -> ByteStream:
        """A new connection to its agent. Raises SandboxGone or AgentUnreachable."""


# People ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling, as a verified token says."""

    user: str
    admin: bool = False


class Identity(Protocol):
    """Verifies access tokens."""

    async def verify(self, token: str) -> Principal:
        """Raises Unauthenticated: bad shape, algorithm, signature, audience, issuer or time. Raises Unavailable
        when the keys cannot be fetched."""


class Minter(Protocol):
    """Mints the tokens with which a browser listens to the store directly."""

    async def mint(self, principal: Principal) -> str:
        """A short-lived custom token for the same user id."""
