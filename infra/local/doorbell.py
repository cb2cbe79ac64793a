"""Who waits for a change is woken by a ring, in this process and across processes.

Every process binds one Unix datagram socket in a directory next to the database file and sends a datagram to all
the others after a commit. It names the span of the database's counter that was committed and the bells rung, as
hashes. A ring may get lost (a process killed between its commit and its ring, a full queue): spans that nobody
announced show in `audit`, and then every bell rings.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

logger = logging.getLogger(__name__)

HASH_BYTES = 8
SPAN = struct.Struct("!QQ")
MAX_HASHES = 256  # in one datagram; beyond it the receiver rings every bell
MAX_OWED = 64  # datagrams kept for a peer whose queue is full
MAX_SOCKET_PATH = 100  # bytes; the kernel takes 107
MTIME_GRAIN = 0.05  # seconds; changes of a directory closer than this may share its time stamp
RING_ALL = b"*" * HASH_BYTES


@dataclass(frozen=True, slots=True)
class Rings:
    """What one commit announces: it moved the counter from `before` to `last`, and these bells ring."""

    before: int
    last: int
    hashes: frozenset[bytes]

    def encode(self) -> bytes:
        """As a datagram."""
        hashes = self.hashes if len(self.hashes) <= MAX_HASHES else [RING_ALL]
        return SPAN.pack(self.before, self.last) + b"".join(hashes)

    @classmethod
    def decode(cls, datagram: bytes) -> Rings:
        """Read a datagram; ValueError if it is none of ours."""
        hashes, rest = divmod(len(datagram) - SPAN.size, HASH_BYTES)
        if hashes < 0 or rest:
            raise ValueError("not a ring")
        starts = range(SPAN.size, len(datagram), HASH_BYTES)
        before, last = SPAN.unpack_from(datagram)
        return cls(before, last, frozenset(datagram[at : at + HASH_BYTES] for at in starts))


def bell_hash(name: str) -> bytes:
    """The same in every process, unlike hash()."""
    return blake2b(name.encode(), digest_size=HASH_BYTES).digest()


class Bells:
    """The bells of one process, and which commits it has heard of. Lives on the event loop."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, set[asyncio.Event]] = {}
        self._heard = 0
        self._ahead: dict[int, int] = {}
        self._audited = 0

    def start(self, counter: int) -> None:
        """Nothing before this value of the counter needs to be heard of."""
        self._heard = self._audited = counter

    @contextmanager
    def bell(self, name: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever `name` rings, and now and then without need. Clear it before you look."""
        event = asyncio.Event()
        key = bell_hash(name)
        self._waiting.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            self._waiting[key].discard(event)
            if not self._waiting[key]:
                del self._waiting[key]

    def ring(self, rings: Rings) -> None:
        """Set the events of these bells and note the span as heard of."""
        if rings.before > self._heard:
            self._ahead[rings.before] = rings.last
        else:
            self._heard = max(self._heard, rings.last)
            self._catch_up()
        if RING_ALL in rings.hashes:
            self.ring_all()
        for key in rings.hashes:
            for event in self._waiting.get(key, ()):
                event.set()

    def ring_all(self) -> None:
        """Set every event."""
        for events in self._waiting.values():
            for event in events:
                event.set()

    def audit(self, counter: int) -> None:
        """Ring every bell if a commit seen at the last audit has still not been heard of."""
        if self._heard < self._audited:
            logger.debug("rings up to %d were lost", self._audited)
            self._heard = self._audited
            self._catch_up()
            self.ring_all()
        self._audited = max(self._audited, counter)

    def _catch_up(self) -> None:
        for before in sorted(self._ahead):
            if before > self._heard:
                return
            self._heard = max(self._heard, self._ahead.pop(before))


class Doorbell:
    """The sockets: `announce` is called by the thread that commits, everything else on the event loop."""

    def __init__(self, directory: Path, bells: Bells) -> None:
        self._directory = directory
        self._bells = bells
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._peers: list[str] = []
        self._listed = (0, 0.0)  # the directory's time stamp and when it was read
        self._owed: dict[str, deque[bytes]] = {}

    def open(self) -> None:
        """Bind this process's socket and start to listen. Raises OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        self._receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._receiver.bind(self._address(self._name))
        except OSError:
            self._close_sockets()
            raise
        asyncio.get_running_loop().add_reader(self._receiver, self._receive)

    def close(self) -> None:
        """Stop listening and take the socket away."""
        asyncio.get_running_loop().remove_reader(self._receiver)
        self._remove(self._name)
        self._close_sockets()

    def announce(self, rings: Rings) -> bool:
        """Tell every other process of a commit; returns as `flush` does. Never raises and never blocks."""
        datagram = rings.encode()
        with suppress(OSError):
            self._list_peers()
        for peer in self._peers:
            self._owed.setdefault(peer, deque(maxlen=MAX_OWED)).append(datagram)
        return self.flush()

    def flush(self) -> bool:
        """Send what is owed; whether something still is, because a peer's queue is full."""
        self._owed = {peer: owed for peer, owed in self._owed.items() if not self._send(peer, owed)}
        return bool(self._owed)

    def _send(self, peer: str, owed: deque[bytes]) -> bool:
        """Whether we are done with this peer: all sent, or it is gone."""
        try:
            while owed:
                self._sender.sendto(owed[0], self._address(peer))
                owed.popleft()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:  # its process died without taking the socket away
                self._remove(peer)
        return True

    def _receive(self) -> None:
        for _ in range(64):  # then give the loop a turn; it calls again while there is more
            try:
                self._bells.ring(Rings.decode(self._receiver.recv(65_536)))
            except BlockingIOError:
                return
            except ValueError:
                logger.warning("a datagram in %s was not a ring", self._directory)

    def _list_peers(self) -> None:
        stamp = os.stat(self._folder).st_mtime_ns
        known, read_at = self._listed
        if stamp != known or read_at < stamp / 1e9 + MTIME_GRAIN:
            self._listed = (stamp, time.time())
            self._peers = [name for name in os.listdir(self._folder) if name != self._name]

    def _address(self, name: str) -> str:
        direct = str(self._directory / name)
        if len(os.fsencode(direct)) <= MAX_SOCKET_PATH:
            return direct
        return f"/proc/self/fd/{self._folder}/{name}"

    def _remove(self, name: str) -> None:
        with suppress(OSError):
            os.unlink(name, dir_fd=self._folder)

    def _close_sockets(self) -> None:
        self._receiver.close()
        self._sender.close()
        os.close(self._folder)
