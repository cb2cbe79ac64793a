"""session.opened: one worker tends the session for as long as it holds this message."""

from __future__ import annotations

import asyncio
import logging
import signal
from datetime import datetime, timedelta
from typing import Any

from consumers import chunks
from consumers.admission import admit
from consumers.agent.client import AgentConnection, attach, connect, open_shell
from consumers.commands import deliver_waiting, settle_all, settle_left
from consumers.context import Context
from consumers.pool import fill
from consumers.pump import Pump
from consumers.sessions import Held, change, end, idle_deadline, load, sentence
from consumers.settlement import DONE, LEAVE, Settlement
from schemas.documents import Session, session_path
from schemas.errors import (
    AgentRefused,
    Diverged,
    NoCapacity,
    PigeonError,
    SandboxFailed,
    SandboxGone,
    Superseded,
    Unavailable,
)
from schemas.events import SessionOpened, SessionStarted
from schemas.ids import new_id
from schemas.lifecycle import CommandState, SessionState
from schemas.ports import Phase, Sandbox
from schemas.transcript import TranscriptWriter

RECONNECT_MIN_SECONDS, RECONNECT_MAX_SECONDS = 0.05, 2.0
AGENT_ENDED = "its agent ended"  # with nothing left to do: how a runtime tells of a sandbox whose shell has ended
CAUSE_SECONDS = 10.0  # that the sandbox of a hung-up shell may take to end, and to say why, once its agent may go
SAY_STARTED_AGAIN = timedelta(minutes=5)  # after a step to ready; a dead worker's session is taken over long before

log = logging.getLogger(__name__)


async def tend_session(
    context: Context, session_id: str, event: SessionOpened, *, message_id: str, attempt: int, stopping: asyncio.Event
) -> Settlement:
    """Take the session over and tend it to its end, or until `stopping` is set: then a fresh message hands it on."""
    if attempt > 1:  # its holder died; a fresh message keeps the attempts from adding up
        await _say_again(context, session_id, event, message_id)
        return DONE
    session = await _take_over(context, session_id, event, message_id)
    if session is None:
        return DONE
    tending = asyncio.create_task(Tender(context, session_id, session).run())
    stopped = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait((tending, stopped), return_when=asyncio.FIRST_COMPLETED)
        if tending.done():
            return tending.result()
        await context.publish(SessionOpened(epoch=session.epoch), session_id)
        return DONE
    finally:
        tending.cancel()
        stopped.cancel()
        await asyncio.gather(tending, stopped, return_exceptions=True)


async def _say_again(context: Context, session_id: str, event: SessionOpened, message_id: str) -> None:
    current = await load(context, session_id)
    if current is None:
        return
    if not current.session.live:  # whose end its former holder may not have finished
        await settle_left(context, session_id, current.session.state, current.session.reason)
    elif _vacant(context, current.session, event, message_id):
        await context.publish(SessionOpened(epoch=current.session.epoch), session_id)


def _vacant(context: Context, session: Session, event: SessionOpened, message_id: str) -> bool:
    """Whether nobody else tends the session: no epoch was taken since this message was published, or only by its
    own former holder, or by a tender that has gone silent."""
    if event.epoch >= session.epoch or session.tender == message_id or session.tended_at is None:
        return True
    return context.now() - session.tended_at >= context.limits.tended_stale


async def _take_over(context: Context, session_id: str, event: SessionOpened, message_id: str) -> Session | None:
    def decide(session: Session) -> dict[str, Any] | None:
        if not session.live or not session.pod_uid or not _vacant(context, session, event, message_id):
            return None
        return {"epoch": session.epoch + 1, "tender": message_id, "tended_at": context.now()}

    return await change(context, session_id, decide)


class Tender:
    """Brings one session from its sandbox's start to the end that its document will show."""

    def __init__(self, context: Context, session_id: str, session: Session) -> None:
        self._context = context
        self._id = session_id
        self._session = session
        self._owner = session_path(session_id)
        self._size: tuple[int, int] | None = None  # that the shell was last given; None: by another tender, perhaps

    async def run(self) -> Settlement:
        """Tend to the end; every way out is either an end state in the document or a verdict for the message."""
        try:
            return await self._tend()
        except Superseded as error:
            log.info("session %s: %s", self._id, error)
            return LEAVE
        except NoCapacity as error:
            await self._back_to_queue(str(error))
        except SandboxFailed as error:
            await self._end(SessionState.FAILED, sentence(error), await self._committed())
        except SandboxGone as error:
            await self._gone(sentence(error))
        except Diverged as error:
            log.critical("session %s: the transcript diverged: %s", self._id, error)
            await self._lost(f"The transcript diverged: {error}.")
        return DONE

    async def _tend(self) -> Settlement:
        delay = RECONNECT_MIN_SECONDS
        while True:
            started = asyncio.get_running_loop().time()
            try:
                return await self._tend_once()
            except NoCapacity:
                raise
            except (Unavailable, TimeoutError) as error:
                log.info("session %s: %s", self._id, error)
            if asyncio.get_running_loop().time() - started > RECONNECT_MAX_SECONDS:
                delay = RECONNECT_MIN_SECONDS
            try:
                await self._check_sandbox()
            except Unavailable as error:  # whoever knows is away, for this worker and for any other
                log.info("session %s: nobody can say how its sandbox is: %s", self._id, error)
            await self._context.clock.sleep(delay)
            delay = min(2 * delay, RECONNECT_MAX_SECONDS)

    async def _check_sandbox(self) -> None:
        sandbox = await self._context.sandboxes.get(self._session.pod_name)
        if sandbox is None or sandbox.uid != self._session.pod_uid:
            raise SandboxGone("the sandbox vanished")
        if sandbox.phase is Phase.ENDED:
            raise SandboxGone(sandbox.reason or "the sandbox ended")

    async def _tend_once(self) -> Settlement:
        await self._until_running()
        await self._refresh()
        if self._closed_unopened():
            return await self._close_unopened()
        connection = await self._connect()
        try:
            return await self._attend(connection)
        finally:
            await connection.close()

    async def _until_running(self) -> None:
        """Wait for the sandbox, and sign the session meanwhile: a cluster may need minutes to find it a place."""
        starting = self._context.sandboxes.running(self._session.pod_name, self._session.pod_uid)
        waiting = asyncio.create_task(starting)
        try:
            while not waiting.done():
                await asyncio.wait({waiting}, timeout=self._context.limits.tended_every.total_seconds())
                if not waiting.done():
                    await self._sign()
            await waiting
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    async def _sign(self) -> None:
        signature = {"tended_at": self._context.now()}
        await change(self._context, self._id, lambda session: signature if self._ours(session) else None)
        await self._refresh()

    def _ours(self, session: Session) -> bool:
        return session.live and session.epoch == self._session.epoch

    async def _back_to_queue(self, why: str) -> None:
        """The cluster took the sandbox and has no place for it. No shell was ever opened in it, so the session waits
        for another one, in the place that it had."""
        log.info("session %s waits: %s", self._id, why)
        await self._context.sandboxes.delete(self._session.pod_name, self._session.pod_uid)

        def requeue(session: Session) -> dict[str, Any] | None:
            if not self._ours(session) or session.state is not SessionState.STARTING:
                return None
            cleared = {"pod_name": "", "pod_uid": "", "tended_at": None, "deadline": session.expires_at}
            return {"state": SessionState.QUEUED, **cleared}

        if await change(self._context, self._id, requeue) is None:
            await self._gone(why)

    def _closed_unopened(self) -> bool:
        return self._session.state is SessionState.CLOSING and not self._session.agent_boot_id

    async def _close_unopened(self) -> Settlement:
        """Closed before it was ready: nothing of what its shell may have said is in the transcript."""
        await self._end(SessionState.CLOSED, self._session.reason, 0)
        return DONE

    async def _refresh(self) -> None:
        current = await load(self._context, self._id)
        if current is None or not current.session.live:
            raise Superseded("the session has ended")
        if current.session.epoch != self._session.epoch:
            raise Superseded(f"epoch {current.session.epoch} took over from {self._session.epoch}")
        self._session = current.session

    async def _connect(self) -> AgentConnection:
        session = self._session
        connection = await connect(await self._context.sandboxes.connect(session.pod_name, session.pod_uid))
        try:
            if session.agent_boot_id not in ("", connection.boot_id):
                raise SandboxGone("the sandbox's agent was restarted; what it held is lost")
            await self._open(connection)
        except AgentRefused as refusal:
            await connection.close()
            raise SandboxGone(f"the sandbox's agent refuses its worker: {refusal}") from refusal
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _open(self, connection: AgentConnection) -> None:
        limits = self._context.limits
        self._size = None if connection.opened else _size(self._session)
        await open_shell(
            connection,
            self._context.controls.key(self._id, self._session),
            rows=self._session.rows,
            cols=self._session.cols,
            notice=self._context.notice,
            outputBytes=limits.output_bytes,
            spoolBytes=limits.spool_bytes,
        )

    async def _attend(self, connection: AgentConnection) -> Settlement:
        offset = await self._committed()
        key = self._context.controls.key(self._id, self._session)
        await attach(connection, key, epoch=self._session.epoch, offset=offset)
        await self._become_ready(connection.boot_id)
        if self._closed_unopened():
            return await self._close_unopened()
        pump = Pump(self._context, self._id, self._session, connection, TranscriptWriter(offset))
        pumping = asyncio.create_task(pump.run())
        refilling = asyncio.create_task(self._refill())
        try:
            await self._catch_up()
            ended = await pumping
        finally:
            for task in (pumping, refilling):
                task.cancel()
            await asyncio.gather(pumping, refilling, return_exceptions=True)
        if ended is None:
            raise Superseded("the transcript was sealed by the sweep")
        await self._shell_ended(ended, pump)
        return DONE

    async def _refill(self) -> None:
        """Its sandbox may have come from the pool; only now, when nobody waits for the processor, is another made."""
        try:
            await fill(self._context)
        except PigeonError as error:
            log.info("the pool is filled at the next tick: %s", error)

    async def _committed(self) -> int:
        newest = await chunks.last(self._context, self._owner)
        if newest is not None and newest.kind == "gap" and newest.length is None:
            if self._session.state is SessionState.READY:  # whoever sealed it died before the session's end
                raise SandboxGone(newest.reason)
            raise Superseded("the transcript was sealed by the sweep")
        return newest.end if newest is not None else 0

    async def _become_ready(self, boot_id: str) -> None:
        while (ready := await change(self._context, self._id, lambda now: self._ready_step(now, boot_id))) is None:
            await self._refresh()
            if self._session.state is not SessionState.STARTING:  # ready already, or closed since it was read
                break
            await self._resize()
        else:
            self._session = ready
        ready_at = self._session.ready_at
        if ready_at is not None and self._context.now() - ready_at < SAY_STARTED_AGAIN:
            await self._say_started(ready_at)

    async def _resize(self) -> None:
        """Its window was resized while the shell was opened; from the step to ready on the agent is told of that."""
        rows, cols = size = _size(self._session)
        try:
            control = await self._context.controls.get(self._id, self._session)
            await control.request("resize", id=f"{self._id}-{new_id()}", rows=rows, cols=cols)
        except AgentRefused as refusal:  # the shell is gone already, and its last mark on the way
            log.info("session %s cannot be resized: %s", self._id, refusal)
        self._size = size

    async def _say_started(self, ready_at: datetime) -> None:
        """Also of a session that was ready already, since its former tender may have died before saying so; the event's
        id is the same."""
        seconds = (ready_at - self._session.created_at).total_seconds()
        event = SessionStarted(user_id=self._session.user_id, seconds=seconds)
        await self._context.publish(event, self._id, id=f"{self._id}-started")

    def _ready_step(self, session: Session, boot_id: str) -> dict[str, Any] | None:
        if session.epoch != self._session.epoch:
            raise Superseded(f"epoch {session.epoch} took over from {self._session.epoch}")
        if session.state is not SessionState.STARTING or _size(session) != self._size:
            return None
        now = self._context.now()
        return {
            "state": SessionState.READY,
            "agent_boot_id": boot_id,
            "ready_at": now,
            "last_activity_at": now,
            "deadline": idle_deadline(self._context, session, now),
        }

    async def _catch_up(self) -> None:
        """Do what was to be done while nobody could reach the agent: hand over what waits, or stop the shell."""
        current = await load(self._context, self._id)
        try:
            if current is not None and current.session.state is SessionState.CLOSING:
                control = await self._context.controls.get(self._id, current.session)
                await control.request("stop")
            elif current is not None:
                await deliver_waiting(self._context, current)
        except PigeonError as error:  # commands are tried again at every signature, a close is forced by the sweep
            log.info("session %s: what waits is done later: %s", self._id, error)

    async def _shell_ended(self, mark: dict[str, Any], pump: Pump) -> None:
        """Every byte and mark is durable: write the final offset first, so that a crash from here on loses nothing. The
        agent may go then: whoever takes its sandbox away may be waiting for that."""
        told, usage = await self._told(mark), await pump.usage()
        words = told or _words(mark)

        def decide(session: Session) -> dict[str, Any]:
            fields: dict[str, Any] = {"final_offset": mark["offset"], "usage": usage}
            if session.state is SessionState.READY:
                deadline = self._context.now() + self._context.limits.closing_grace
                fields |= {"state": SessionState.CLOSING, "reason": words, "deadline": deadline, "warning": None}
            return fields

        closing = await change(self._context, self._id, decide)
        if closing is None:
            return
        await pump.ack_end()
        reason = closing.reason
        if reason == words and not told and mark.get("signal") == signal.SIGHUP:
            reason = await self._cause_of_hang_up() or words
        await self._end(SessionState.CLOSED, reason, mark["offset"])

    async def _told(self, mark: dict[str, Any]) -> str:
        """Whoever takes a sandbox away gives it time to hang up its shell: the cause is theirs then, not the signal. ""
        where nothing is known of that."""
        if not mark.get("signal"):
            return ""
        try:
            sandbox = await self._context.sandboxes.get(self._session.pod_name)
        except Unavailable as error:
            log.info("session %s: why its shell was killed is not known: %s", self._id, error)
            return ""
        return _cause(sandbox) if sandbox is not None and sandbox.uid == self._session.pod_uid else ""

    async def _cause_of_hang_up(self) -> str:
        """A node that evicts a sandbox, or shuts down, says so only once that has ended; "" if it was not the cause."""
        gone = self._context.sandboxes.gone(self._session.pod_name, self._session.pod_uid)
        try:
            async with asyncio.timeout(CAUSE_SECONDS):
                return _cause(await gone)
        except (TimeoutError, Unavailable) as error:
            log.info("session %s: why its shell was hung up is not known: %r", self._id, error)
            return ""

    async def _gone(self, why: str) -> None:
        """The sandbox is gone: a session that was closing and had said its last byte is closed, any other is lost."""
        current = await load(self._context, self._id)
        if current is None or not current.session.live:
            return
        session = current.session
        if session.epoch != self._session.epoch:
            return
        if session.final_offset is not None:
            await self._end(SessionState.CLOSED, session.reason, session.final_offset)
        elif not session.agent_boot_id:
            await self._unopened(session, why)
        elif session.state is SessionState.CLOSING:
            offset = await chunks.seal(self._context, self._owner, why, session.expire_at)
            await finish(self._context, current, SessionState.CLOSED, session.reason, offset, sealed=True)
        else:
            await self._lost(why)

    async def _unopened(self, session: Session, why: str) -> None:
        """One that was taken away before any shell was opened in it, perhaps by a tender that was giving its place
        back and died, costs nobody anything; one that ended by itself would do so again."""
        if session.state is SessionState.STARTING and await self._vanished():
            await self._back_to_queue(why)
            return
        closing = session.state is SessionState.CLOSING
        state = SessionState.CLOSED if closing else SessionState.LOST
        await self._end(state, session.reason if closing else why, 0)

    async def _vanished(self) -> bool:
        there = await self._context.sandboxes.find(self._id)
        return all(sandbox.uid != self._session.pod_uid for sandbox in there)

    async def _lost(self, why: str) -> None:
        offset = await chunks.seal(self._context, self._owner, why, self._session.expire_at)
        await self._end(SessionState.LOST, why, offset)

    async def _end(self, state: SessionState, reason: str, final_offset: int) -> None:
        await finish(self._context, Held(self._id, self._session, ""), state, reason, final_offset)


async def finish(
    context: Context, current: Held, state: SessionState, reason: str, final_offset: int, *, sealed: bool = False
) -> None:
    """Leave nothing of a session: no sandbox, no connection, no open command, no place taken.

    `sealed` says that the transcript ends in a gap, so that the last marks may be missing, too. Whatever is done
    already is skipped, so a crash half way is made good by calling it again.
    """
    session = current.session
    await context.controls.drop(current.id)
    if session.pod_uid:
        await context.sandboxes.delete(session.pod_name, session.pod_uid)
    if sealed:  # nobody knows whether a command that waits in the documents has run
        await settle_all(context, current.id, CommandState.LOST, reason)
    await settle_left(context, current.id, state, reason)
    if await end(context, current.id, state, reason, final_offset=final_offset):
        await settle_left(context, current.id, state, reason)
    await admit(context)
    await fill(context)


def _size(session: Session) -> tuple[int, int]:
    return session.rows, session.cols


def _cause(sandbox: Sandbox) -> str:
    """Why somebody else takes the sandbox away, or did; "" if nobody does."""
    reason = sandbox.reason
    return sentence(SandboxGone(reason)) if reason and not reason.startswith(AGENT_ENDED) else ""


def _words(mark: dict[str, Any]) -> str:
    if mark.get("signal"):
        return f"The shell was killed by signal {mark['signal']}."
    return f"The shell exited with code {mark.get('exitCode')}."
