"""Who gets a sandbox next. A full cluster is a queue, fair by user, never an error."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from datetime import timedelta

from consumers.commands import settle_left
from consumers.context import Context
from consumers.sessions import Held, change, end, load, readable, sentence, write
from schemas.documents import Session, User, user_path
from schemas.errors import Conflict, NoCapacity, NotFound, SandboxFailed, SandboxGone, Unavailable
from schemas.events import SessionOpened
from schemas.ids import SessionId, sandbox_name
from schemas.lifecycle import SessionState
from schemas.ports import Phase, Query, Sandbox, SandboxSpec, Where

QUEUE_PAGE = 200  # queued sessions looked at in one round
CLOSING_MARGIN = timedelta(minutes=10)  # that a sandbox outlives its session by, so that it is closed and not lost
POOL_LIFE = timedelta(hours=1)  # that a sandbox may have been warm for when a session gets it

log = logging.getLogger(__name__)


async def admit(context: Context) -> None:
    """Give sandboxes to queued sessions while there is room; called at every arrival, end and tick."""
    await context.admission.run(lambda: _round(context))


async def _round(context: Context) -> None:
    for candidate in await fair_queue(context):
        if not await start(context, candidate):
            return


async def fair_queue(context: Context) -> list[Held]:
    """The head of the queue in the order of admission.

    A session's turn comes after as many rounds as its user has sandboxes, so a user with many sessions waits behind one
    with none; within a round, who came first goes first.
    """
    query = Query("sessions", (Where("state", "==", SessionState.QUEUED.value),), order_by="queuedAt", limit=QUEUE_PAGE)
    queue = readable(await context.store.query(query))
    turns = await _sandboxes_of(context, queue)
    order: list[tuple[int, int, Held]] = []
    for arrival, candidate in enumerate(queue):
        user = candidate.session.user_id
        order.append((turns[user], arrival, candidate))
        turns[user] += 1
    return [candidate for _, _, candidate in sorted(order, key=lambda entry: entry[:2])]


async def _sandboxes_of(context: Context, queue: list[Held]) -> dict[str, int]:
    """For each user in the queue, how many of their live sessions are past it."""
    queued = Counter(candidate.session.user_id for candidate in queue)
    turns: dict[str, int] = defaultdict(int)
    if len(queued) < 2:
        return turns  # one user's sessions are in order as they are
    for user, waiting in queued.items():
        snapshot = await context.store.get(user_path(user))
        live = User.of(snapshot).live_sessions if snapshot else waiting
        turns[user] = max(0, live - waiting)
    return turns


async def start(context: Context, candidate: Held) -> bool:
    """Step one queued session to starting and give it a sandbox; False where there is no room for any."""
    step = {
        "state": SessionState.STARTING,
        "deadline": context.now() + context.limits.request_timeout,
    }
    try:
        session = await write(context, candidate, step)
    except (Conflict, NotFound):
        return True  # another worker, or its user, moved it
    return await give_sandbox(context, candidate.id, session)


async def give_sandbox(context: Context, session_id: str, session: Session) -> bool:
    """Find, claim or create the sandbox of a starting session and have it tended; False where there is no room."""
    try:
        sandbox = await _obtain(context, session_id, session)
    except (NoCapacity, Unavailable) as error:
        await _back_to_queue(context, session_id, str(error))
        return False
    except SandboxFailed as error:
        await end_unstarted(context, session_id, SessionState.FAILED, sentence(error))
        return True
    named = await change(context, session_id, lambda now: _name(context, now, sandbox))
    if named is not None:
        await context.publish(SessionOpened(epoch=named.epoch), session_id)
        return True
    current = await load(context, session_id)
    if current is None or not current.session.live or current.session.pod_uid != sandbox.uid:
        await context.sandboxes.delete(sandbox.name, sandbox.uid)  # closed meanwhile, or given another one
    return True


def _name(context: Context, session: Session, sandbox: Sandbox) -> dict[str, object] | None:
    """Also for a session that another starter, who found no room, took back to the queue: its sandbox is there."""
    if session.state not in (SessionState.QUEUED, SessionState.STARTING) or session.pod_uid not in ("", sandbox.uid):
        return None
    return {
        "state": SessionState.STARTING,
        "position": None,  # only now: who goes back to the queue keeps the place that was shown
        "pod_name": sandbox.name,
        "pod_uid": sandbox.uid,
        "tended_at": context.now(),  # from here on a silent tender is noticed
        "deadline": context.now() + context.limits.start_timeout,
    }


async def end_unstarted(context: Context, session_id: str, state: SessionState, reason: str) -> None:
    """End a session that has no sandbox, and its commands; if one is being created for it its creator deletes it."""
    await settle_left(context, session_id, state, reason)
    if await end(context, session_id, state, reason, final_offset=0):
        await settle_left(context, session_id, state, reason)


async def _back_to_queue(context: Context, session_id: str, why: str) -> None:
    log.info("session %s waits: %s", session_id, why)

    def requeue(session: Session) -> dict[str, object] | None:
        if session.state is not SessionState.STARTING or session.pod_uid:  # another starter found room
            return None
        return {"state": SessionState.QUEUED, "deadline": session.expires_at}

    await change(context, session_id, requeue)


async def _obtain(context: Context, session_id: str, session: Session) -> Sandbox:
    sandboxes = await context.sandboxes.list()
    for own in (each for each in sandboxes if each.session == session_id):
        if own.phase is not Phase.ENDED:
            return own
        await context.sandboxes.delete(own.name, own.uid)  # nobody was in it, and it has the name of the next
    taken = sum(each.session is not None and each.phase is not Phase.ENDED for each in sandboxes)
    if taken >= context.limits.capacity:  # warm ones count only from the claim on
        raise NoCapacity(f"{taken} of {context.limits.capacity} sandboxes are in use")
    warm = [each for each in sandboxes if each.session is None]
    claimed = None if session.image else await _claim(context, session_id, warm)  # the pool is of the default image
    return claimed or await context.sandboxes.create(spec(context, session_id, session))


async def _claim(context: Context, session_id: str, warm: list[Sandbox]) -> Sandbox | None:
    for each in warm:
        if each.phase is Phase.RUNNING and not stale(context, each):
            try:
                return await context.sandboxes.claim(each.name, each.uid, session_id)
            except (Conflict, SandboxGone):
                continue
    return None


def stale(context: Context, warm: Sandbox) -> bool:
    """Whether a warm sandbox is of an older image, or has waited so long that it might not outlive a session."""
    return warm.outdated or context.now() - warm.created_at >= POOL_LIFE


def spec(context: Context, session_id: str | None, session: Session | None, name: str = "") -> SandboxSpec:
    """What to create for a session, or for the pool."""
    limits = context.limits
    return SandboxSpec(
        name=name or sandbox_name(SessionId(session_id or "")),
        session=session_id,
        memory_bytes=limits.memory_bytes,
        workspace_bytes=limits.workspace_bytes,
        processes=limits.processes,
        file_bytes=limits.file_bytes,
        lifetime_seconds=int((limits.session_lifetime + POOL_LIFE + CLOSING_MARGIN).total_seconds()),
        image=session.image if session else "",
    )


async def write_positions(context: Context) -> None:
    """Tell each queued session its place, where it has changed."""
    for place, candidate in enumerate(await fair_queue(context), start=1):
        if candidate.session.position != place:
            try:
                await write(context, candidate, {"position": place})
            except (Conflict, NotFound):
                continue
