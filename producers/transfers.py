"""Waiting for what a sandbox was asked for: a transfer document says how it went, its chunks hold the content."""

from __future__ import annotations

from producers.intake import Call, open_session
from producers.problems import NotReady
from producers.publishing import publish
from producers.reading import Tape
from producers.waiting import departure, first, merge, within
from schemas.documents import Transfer, TransferState, transfer_path
from schemas.errors import AgentRefused, Unavailable
from schemas.events import FileRequested, FilesPushed
from schemas.lifecycle import SessionState
from schemas.limits import MIB
from schemas.ports import Snapshot
from schemas.transcript import Data

WAIT_SECONDS = 20.0
PAGE_BYTES = 1 * MIB


async def transfer(call: Call, session: str, event: FileRequested | FilesPushed) -> Transfer | None:
    """Ask for a transfer and wait until it is done; None if that takes longer than WAIT_SECONDS.

    Raises AgentRefused, with the sandbox's own code, if it failed.
    """
    assert event.transfer_id is not None
    await publish(call, event, session=session, name=f"transfer-{event.transfer_id}")
    changes = call.services.store.watch(transfer_path(session, event.transfer_id))
    news = first(merge(changes, departure(call.request)), lambda item: _is_settled(item[1]))
    found = await within(call.services.clock, WAIT_SECONDS, news)
    if found is None:
        return None
    settled = Transfer.of(found[1])
    if settled.state is TransferState.FAILED:
        raise AgentRefused(settled.code or "rejected", settled.message or "the sandbox refused it")
    return settled


def _is_settled(snapshot: Snapshot | None) -> bool:
    return snapshot is not None and Transfer.of(snapshot).state is not TransferState.PENDING


async def require_ready(call: Call, session: str) -> None:
    """Raises NotReady if the caller's session has no sandbox yet; UnknownSession or SessionEnded."""
    found = await open_session(call, session)
    if found.state is not SessionState.READY:
        raise NotReady(f"the session is {found.state}; its files can be read once it is ready")


async def content(call: Call, session: str, transfer_id: str, size: int | None) -> bytes:
    """What a finished transfer holds. Raises Unavailable if bytes of it are missing."""
    tape = Tape(call.services.store, transfer_path(session, transfer_id))
    parts, complete = list[bytes](), False
    while not complete:
        pieces, complete = await tape.page(PAGE_BYTES)
        parts += [piece.data for piece in pieces if isinstance(piece, Data)]
    data = b"".join(parts)
    if len(data) != tape.position or (size is not None and len(data) != size):
        raise Unavailable(f"transfer {transfer_id} holds {len(data)} bytes of {size}")
    return data
