"""session.requested: the session gets a sandbox, or a place in the queue."""

from __future__ import annotations

from consumers.admission import admit
from consumers.context import Context
from consumers.sessions import change, load
from consumers.settlement import DONE, Refuse, Settlement
from schemas.documents import Session
from schemas.lifecycle import SessionState


async def open_session(context: Context, session_id: str) -> Settlement:
    """Put the session into the queue, whose head is admitted at once; every arrival goes this way."""

    def enqueue(session: Session) -> dict[str, object] | None:
        if session.state is not SessionState.REQUESTED:
            return None
        return {"state": SessionState.QUEUED, "queued_at": context.now(), "deadline": session.expires_at}

    if await change(context, session_id, enqueue) is None and await load(context, session_id) is None:
        return Refuse("unknown_session", "no document of this session")
    await admit(context)
    return DONE
