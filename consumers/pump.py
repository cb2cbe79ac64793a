"""From the sandbox's agent to chunk and command documents, until the stream ends or the connection does."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, TypeVar

import consumers.agent.agent as wire
from consumers import chunks, commands
from consumers.agent.client import KEEPALIVE_SECONDS, SILENCE_SECONDS, AgentConnection
from consumers.context import Context
from consumers.sessions import change, load, sign_of_use
from schemas.documents import ChangedFile, Session, session_path
from schemas.errors import AgentUnreachable, PigeonError, Superseded, Unavailable
from schemas.events import Usage
from schemas.lifecycle import CommandState
from schemas.transcript import Data, Gap, Pacer, TranscriptWriter

RETRY_MIN_SECONDS, RETRY_MAX_SECONDS = 0.05, 2.0  # while the store is away; the program in the sandbox just blocks

T = TypeVar("T")
log = logging.getLogger(__name__)


class Pump:
    """One attachment's way into the store.

    Bytes become chunks, one commit in flight; a mark is recorded after every byte before it is committed, and acked
    after it is recorded. So whoever attaches next gets exactly what is not durable yet.
    """

    def __init__(
        self, context: Context, session_id: str, session: Session, connection: AgentConnection, writer: TranscriptWriter
    ) -> None:
        self._context = context
        self._id = session_id
        self._session = session
        self._epoch = session.epoch
        self._connection = connection
        self._writer = writer
        self._pacer = Pacer()
        self._marks: deque[tuple[int, dict[str, Any]]] = deque()
        self._wake = asyncio.Event()
        self._urgent = False
        self._ended: dict[str, Any] | None = None
        self._last_mark = 0
        self._running: tuple[int, str, asyncio.Task[None]] | None = None
        self._finished = 0  # the highest number among finished commands
        self._chunks = session.usage.writes
        self._activity = session.last_activity_at
        self._signed_activity = session.last_activity_at
        self._sign_now = asyncio.Event()

    async def run(self) -> dict[str, Any] | None:
        """Pump until the shell's end is recorded; returns its mark, or None where somebody sealed the transcript.

        Raises AgentUnreachable when the connection ends, Superseded when a newer tender took over, Diverged for a
        defect.
        """
        tasks = [asyncio.create_task(work()) for work in (self._commit, self._receive, self._sign, self._keep_alive)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:  # in this order: an end that is recorded counts more than the connection's end after it
                if task in done:
                    task.result()
                    return self._ended
            raise AssertionError("asyncio.wait returned without a result")
        finally:
            await _cancel([*tasks, *([self._running[2]] if self._running else [])])

    async def usage(self) -> Usage:
        """What the session has used by now."""
        current = await load(self._context, self._id)
        return self._usage(current.session if current else self._session)

    async def ack_end(self) -> None:
        """Tell the agent that its last mark is recorded: it has nothing left to serve, and exits."""
        with suppress(AgentUnreachable):  # nothing depends on it, and it is only asked to go
            await self._connection.send(wire.ACKMARK, self._last_mark)

    async def _receive(self) -> None:
        while True:
            async with asyncio.timeout(SILENCE_SECONDS):
                kind, argument, payload = await self._connection.receive()
            self._take_in(kind, argument, payload)

    def _take_in(self, kind: int, argument: int, payload: bytes) -> None:
        if kind in (wire.OUT, wire.ECHO):
            self._writer.feed(Data(argument, payload))
            self._urgent = self._urgent or kind == wire.ECHO
        elif kind == wire.GAP:
            gap = json.loads(payload)
            self._writer.feed(Gap(argument, gap["length"], gap["reason"]))
        elif kind == wire.MARK:
            self._marks.append((argument, json.loads(payload)))
            self._urgent = True  # somebody may be waiting for this command's end
        elif kind == wire.STATUS:
            self._note_activity(json.loads(payload))
            return
        self._wake.set()

    async def _commit(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._writer.sealed:
            await self._record_marks()
            if self._ended is not None:
                return
            if self._writer.idle:
                await self._wake.wait()
                self._wake.clear()
                continue
            hold = self._pacer.ready_at(urgent=self._urgent, full=self._writer.full) - loop.time()
            if hold > 0:
                await self._wait_for_more(hold)
                continue
            self._urgent = False
            await self._write_chunk()
            self._pacer.wrote(loop.time())

    async def _wait_for_more(self, seconds: float) -> None:
        self._wake.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _write_chunk(self) -> None:
        piece = self._writer.take()
        assert piece is not None
        there = await self._persist(
            lambda: chunks.append(self._context, session_path(self._id), piece, self._expire_at)
        )
        if there is piece:
            self._writer.committed()
            self._chunks += 1
        else:
            self._writer.lost_to(there)
        await self._connection.send(wire.ACK, self._writer.committed_offset)

    @property
    def _expire_at(self) -> datetime:
        return self._session.expire_at

    async def _record_marks(self) -> None:
        while self._marks and self._marks[0][1]["offset"] <= self._writer.committed_offset:
            sequence, mark = self._marks.popleft()
            if mark["kind"] == "started":
                self._started(sequence, mark)
                continue
            if mark["kind"] == "finished":
                await self._record_finished(mark)
            else:
                self._ended, self._last_mark = mark, sequence
                return  # acked by `ack_end`, once the session's end is recorded
            await self._connection.send(wire.ACKMARK, sequence)

    def _started(self, sequence: int, mark: dict[str, Any]) -> None:
        """A short command is never written as running: wait a little before it is, and with the ack too."""
        self._running = (sequence, mark["commandId"], asyncio.create_task(self._run_on(sequence, mark)))

    async def _run_on(self, sequence: int, mark: dict[str, Any]) -> None:
        await self._context.clock.sleep(self._context.limits.command_running_after.total_seconds())
        await self._persist(
            lambda: commands.change(
                self._context, self._id, mark["commandId"], CommandState.RUNNING, start_offset=mark["offset"]
            )
        )
        await self._connection.send(wire.ACKMARK, sequence)

    async def _record_finished(self, mark: dict[str, Any]) -> None:
        if self._running is not None and self._running[1] == mark["commandId"]:
            await _cancel([self._running[2]])
            self._running = None
        fields = {
            "reason": mark.get("reason") or "",
            "exit_code": mark.get("exitCode"),
            "cwd": mark.get("cwd") or "",
            "start_offset": mark.get("startOffset"),
            "end_offset": mark["offset"],
            "seconds": mark.get("seconds"),
            "changed_files": tuple(ChangedFile.model_validate(file) for file in mark.get("changed") or ()),
            "changed_files_truncated": bool(mark.get("changedTruncated")),
            "ended_at": self._context.now(),
        }
        state = CommandState.EXITED if mark["outcome"] == "exited" else CommandState.KILLED
        await self._persist(lambda: commands.change(self._context, self._id, mark["commandId"], state, **fields))
        self._finished = max(self._finished, mark["number"])

    def _note_activity(self, status: dict[str, Any]) -> None:
        now = self._context.now()
        unused = 0.0 if status["busy"] else float(status["lastInputSeconds"] or 0.0)
        self._activity = max(self._activity, now - timedelta(seconds=unused))
        limits = self._context.limits
        warned = now >= self._signed_activity + limits.idle_timeout - limits.idle_warning
        if warned and self._activity > self._signed_activity:
            self._sign_now.set()

    async def _sign(self) -> None:
        """Write now and then that the session is tended, what it used, and when the sweep must look at it."""
        while True:
            try:
                async with asyncio.timeout(self._context.limits.tended_every.total_seconds()):
                    await self._sign_now.wait()
            except TimeoutError:
                pass
            self._sign_now.clear()
            try:
                await self._sign_once()
            except Unavailable as error:
                log.warning("session %s could not be signed: %s", self._id, error)

    async def _sign_once(self) -> None:
        activity = self._activity
        signed = await change(self._context, self._id, lambda session: self._signature(session, activity))
        if signed is None:
            raise Superseded("the session has ended")
        self._signed_activity = activity
        if signed.next_command - 1 > self._finished:
            await self._deliver_waiting()

    def _signature(self, session: Session, activity: datetime) -> dict[str, Any] | None:
        if session.epoch != self._epoch:
            raise Superseded(f"epoch {session.epoch} took over from {self._epoch}")
        if not session.live:
            return None
        fields: dict[str, Any] = {"tended_at": self._context.now(), "usage": self._usage(session)}
        return fields | (sign_of_use(self._context, session, activity) or {})

    def _usage(self, session: Session) -> Usage:
        since = session.ready_at or self._context.now()
        return Usage(
            pod_seconds=round((self._context.now() - since).total_seconds(), 3),
            commands=session.next_command - 1,
            bytes=self._writer.committed_offset,
            writes=self._chunks,
        )

    async def _deliver_waiting(self) -> None:
        current = await load(self._context, self._id)
        try:
            if current is not None:
                await commands.deliver_waiting(self._context, current)
        except PigeonError as error:
            log.info("session %s: waiting commands are delivered later: %s", self._id, error)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(KEEPALIVE_SECONDS)
            await self._connection.send(wire.PING)

    async def _persist(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do it until the store takes it: the spool holds what comes meanwhile, and then the program blocks."""
        delay = RETRY_MIN_SECONDS
        while True:
            try:
                return await work()
            except Unavailable as error:
                if isinstance(error, AgentUnreachable):
                    raise
                log.warning("session %s: the store is away, trying again: %s", self._id, error)
            await self._context.clock.sleep(delay)
            delay = min(2 * delay, RETRY_MAX_SECONDS)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
