"""Writing, listing and reading files of the workspace."""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from urllib.parse import quote

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from producers.intake import Call, open_session, parameter, read_body, reply, request_id
from producers.problems import TransferPending
from producers.publishing import publish
from producers.transfers import content, require_ready, transfer
from schemas.errors import Malformed, TooLarge
from schemas.events import FileItem, FileRequested, FilesPushed, WorkspacePath
from schemas.http import FileEntry, ListFilesResponse, ReadFileResponse, SyncFilesRequest, SyncFilesResponse
from schemas.ids import new_id
from schemas.lifecycle import SessionState
from schemas.limits import MAX_FILE_BYTES, MAX_FILES, MAX_PUSH_BYTES

PATH: TypeAdapter[str] = TypeAdapter(WorkspacePath)
BINARY = "application/octet-stream"


async def sync_files(call: Call) -> Response:
    """Write files into the workspace: 200 once they are there, 202 if that takes longer or there is no sandbox yet."""
    body = await read_body(call, SyncFilesRequest)
    items = _items(body.file_structure)
    session = await open_session(call, body.session_id)
    transfer_id = request_id(call, body.request_id)
    pending = False
    if items:
        event = FilesPushed(items=items, transfer_id=transfer_id)
        if session.state is SessionState.READY:
            pending = await transfer(call, body.session_id, event) is None
        else:
            await publish(call, event, session=body.session_id, name=f"transfer-{transfer_id}")
            pending = True
    answer = SyncFilesResponse(transfer_id=transfer_id, files=len(items), pending=pending)
    return reply(answer, status=202 if pending else 200)


def _items(entries: tuple[FileEntry, ...]) -> tuple[FileItem, ...]:
    if len(entries) > MAX_FILES:
        raise TooLarge(f"one call takes at most {MAX_FILES} files, this one has {len(entries)}")
    items = tuple(_item(entry) for entry in entries)
    if sum(len(item.data) for item in items) > MAX_PUSH_BYTES:
        raise TooLarge(f"one call takes at most {MAX_PUSH_BYTES} bytes of content")
    return items


def _item(entry: FileEntry) -> FileItem:
    data = _decoded(entry)
    if len(data) > MAX_FILE_BYTES:
        raise TooLarge(f"{entry.path}: a file has at most {MAX_FILE_BYTES} bytes")
    if data and entry.type != "file":
        raise Malformed(f"{entry.path}: only a file has content")
    return FileItem(path=entry.path, type=entry.type, data=data, mode=entry.mode)


def _decoded(entry: FileEntry) -> bytes:
    if entry.encoding == "utf-8":
        return entry.content.encode()
    try:
        return b64decode(entry.content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Malformed(f"{entry.path}: the content is not standard base64") from error


async def list_files(call: Call) -> Response:
    """The files below a directory of the workspace."""
    name = call.last_segment
    path = call.request.query_params.get("path", "")
    if path:
        parameter("path", PATH, path)
    data, _ = await _fetch(call, name, FileRequested(path=path, transfer_id=new_id(), what="listing"))
    return reply(ListFilesResponse.model_validate_json(data))


async def read_file(call: Call) -> Response:
    """A file of the workspace: JSON, or its bytes as they are if the Accept header asks for that."""
    name = call.last_segment
    path = parameter("path", PATH, call.request.query_params.get("path", ""))
    data, mode = await _fetch(call, name, FileRequested(path=path, transfer_id=new_id()))
    if _wants_bytes(call.request):
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(path.rpartition('/')[2], safe='')}"}
        return Response(data, headers=headers, media_type=BINARY)
    return reply(_as_json(path, data, mode))


async def _fetch(call: Call, session: str, event: FileRequested) -> tuple[bytes, int | None]:
    await require_ready(call, session)
    done = await transfer(call, session, event)
    if done is None:
        raise TransferPending("the sandbox has not answered yet")
    return await content(call, session, event.transfer_id, done.size), done.mode


def _wants_bytes(request: Request) -> bool:
    accepted = request.headers.get("accept", "").split(",")
    return BINARY in (media_type.partition(";")[0].strip().lower() for media_type in accepted)


def _as_json(path: str, data: bytes, mode: int | None) -> ReadFileResponse:
    try:
        return ReadFileResponse(path=path, content=data.decode(), encoding="utf-8", size=len(data), mode=mode)
    except UnicodeDecodeError:
        text = b64encode(data).decode()
        return ReadFileResponse(path=path, content=text, encoding="base64", size=len(data), mode=mode)
