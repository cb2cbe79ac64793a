"""files.pushed, file.requested: between the workspace and transfer documents."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal

from consumers import chunks
from consumers.agent.client import AgentControl
from consumers.context import Context
from consumers.send_input import patient, ready_control
from consumers.settlement import DONE, Later, Refuse, Settlement
from schemas.documents import Transfer, TransferState, transfer_path
from schemas.envelope import CloudEvent
from schemas.errors import AgentRefused, AgentUnreachable, AlreadyExists, SandboxGone
from schemas.events import FileItem, FileRequested, FilesPushed
from schemas.limits import MAX_CHUNK_BYTES, MAX_FILE_BYTES, MAX_LISTED_FILES, MIB
from schemas.transcript import Data

BATCH_BYTES = 4 * MIB  # of one write request to the agent, whose frames hold 8 MiB of base64 JSON
TRANSFER_LIFE = timedelta(days=1)

What = Literal["content", "listing", "push"]


async def push_files(context: Context, cloud_event: CloudEvent) -> Settlement:
    """Write the files into the workspace, in order; the first refusal ends the push and is named in its transfer."""
    event = cloud_event.event
    assert isinstance(event, FilesPushed)

    async def work(control: AgentControl) -> tuple[bytes, None]:
        return await _write(control, cloud_event.id, event)

    return await _transfer(context, cloud_event, event.transfer_id, "push", "", work)


async def send_file(context: Context, cloud_event: CloudEvent) -> Settlement:
    """Read a file, or list a directory, into a transfer."""
    event = cloud_event.event
    assert isinstance(event, FileRequested)
    read = _list if event.what == "listing" else _read
    return await _transfer(
        context, cloud_event, event.transfer_id, event.what, event.path, lambda control: read(control, event.path)
    )


async def fail_transfer(context: Context, cloud_event: CloudEvent, code: str, reason: str) -> None:
    """Record that a push or a request which nobody could handle has failed, if it is not recorded otherwise."""
    event = cloud_event.event
    assert isinstance(event, FilesPushed | FileRequested)
    what: What = event.what if isinstance(event, FileRequested) else "push"
    path = event.path if isinstance(event, FileRequested) else ""
    record = _Record(context, cloud_event.subject, event.transfer_id, what, path)
    await record.write(TransferState.FAILED, code=code, message=reason)


async def _transfer(
    context: Context, cloud_event: CloudEvent, transfer_id: str | None, what: What, path: str, work: Any
) -> Settlement:
    """Run `work` against the agent and record how it ended, content first, so that "done" means readable."""
    record = _Record(context, cloud_event.subject, transfer_id, what, path)
    if await record.settled():
        return DONE
    try:
        ready = await ready_control(context, cloud_event)
        if not isinstance(ready, AgentControl):
            return await record.unready(ready)
        content, mode = await work(ready)
    except SandboxGone:  # its session is about to be lost, which ends no transfer
        return await record.unready(DONE)
    except AgentUnreachable as error:
        return await record.unready(patient(context, cloud_event, error.code, str(error)))
    except AgentRefused as refusal:
        if refusal.code == "in_progress":  # an earlier delivery's write goes on
            return await record.unready(patient(context, cloud_event, refusal.code, str(refusal)))
        await record.write(TransferState.FAILED, code=refusal.code, message=str(refusal))
        return DONE
    if await record.content(content):
        await record.write(TransferState.DONE, size=len(content), mode=mode)
    else:
        await record.write(TransferState.FAILED, code="conflict", message="it changed while it was read; ask again")
    return DONE


class _Record:
    """The document of one transfer; without an id nothing is recorded."""

    def __init__(self, context: Context, session_id: str, transfer_id: str | None, what: What, path: str) -> None:
        self._context = context
        self._path = transfer_path(session_id, transfer_id) if transfer_id else ""
        self._what: What = what
        self._name = path
        self._at = context.now()

    async def settled(self) -> bool:
        """Whether an earlier delivery has done it all."""
        return bool(self._path) and await self._context.store.get(self._path) is not None

    async def unready(self, verdict: Settlement) -> Settlement:
        """What becomes of a transfer whose session has no agent to talk to: later, or it failed."""
        if isinstance(verdict, Later):
            return verdict
        code, reason = "session_ended", "the session has ended"
        if isinstance(verdict, Refuse):
            code, reason = verdict.code, verdict.reason
        await self.write(TransferState.FAILED, code=code, message=reason)
        return DONE

    async def content(self, data: bytes) -> bool:
        """Write the content as chunks, like any transcript; False where an earlier delivery wrote, and read, others."""
        for offset in range(0, len(data) if self._path else 0, MAX_CHUNK_BYTES):
            piece = Data(offset, data[offset : offset + MAX_CHUNK_BYTES])
            if await chunks.append(self._context, self._path, piece, self._at + TRANSFER_LIFE) != piece:
                return False
        return True

    async def write(self, state: TransferState, **fields: Any) -> None:
        """Create the document in its end state."""
        if not self._path:
            return
        transfer = Transfer(
            state=state,
            what=self._what,
            path=self._name,
            created_at=self._at,
            expire_at=self._at + TRANSFER_LIFE,
            **fields,
        )
        try:
            await self._context.store.create(self._path, transfer.fields())
        except AlreadyExists:
            return


async def _write(control: AgentControl, event_id: str, event: FilesPushed) -> tuple[bytes, None]:
    for number, batch in enumerate(batches(event.items)):
        await control.request("write", id=f"{event_id}:{number}", files=[_entry(item) for item in batch])
    return b"", None


def batches(items: tuple[FileItem, ...]) -> Iterator[list[FileItem]]:
    """Cut a push into requests that fit a frame, in order."""
    batch: list[FileItem] = []
    size = 0
    for item in items:
        if batch and size + len(item.data) > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += len(item.data)
    yield batch


def _entry(item: FileItem) -> dict[str, Any]:
    return {"path": item.path, "type": item.type, "data": base64.b64encode(item.data).decode(), "mode": item.mode}


async def _read(control: AgentControl, path: str) -> tuple[bytes, int]:
    reply = await control.request("read", path=path, limit=MAX_FILE_BYTES)
    return base64.b64decode(reply["data"]), int(reply["mode"])


async def _list(control: AgentControl, path: str) -> tuple[bytes, None]:
    reply = await control.request("list", path=path, limit=MAX_LISTED_FILES)
    listing = {"files": reply["files"], "truncated": reply["truncated"]}
    return json.dumps(listing, ensure_ascii=False, separators=(",", ":")).encode(), None
