"""The control connections of one worker: one to each session it serves, kept while in use."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from weakref import WeakValueDictionary

from consumers.agent.client import AgentControl, connect, session_key
from schemas.documents import Session
from schemas.ports import Sandboxes

MAX_CONTROLS = 256  # open control connections a worker; the one unused longest is closed first


class Controls:
    """Hands out control connections and closes them when they are spent."""

    def __init__(self, sandboxes: Sandboxes, secret: bytes) -> None:
        self._sandboxes = sandboxes
        self._secret = secret
        self._open: OrderedDict[str, AgentControl] = OrderedDict()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def key(self, session_id: str, session: Session) -> str:
        """The key of this session's agent."""
        return session_key(self._secret, session_id, session.pod_uid)

    def peek(self, session_id: str) -> AgentControl | None:
        """The session's connection if there is a live one: saves reading the session for every keystroke."""
        control = self._open.get(session_id)
        if control is None or not control.alive:
            return None
        self._open.move_to_end(session_id)
        return control

    async def get(self, session_id: str, session: Session) -> AgentControl:
        """A live connection to the session's agent. Raises SandboxGone, AgentUnreachable or AgentRefused."""
        control = self.peek(session_id)
        if control is not None:
            return control
        lock = self._locks.setdefault(session_id, asyncio.Lock())
        async with lock:
            control = self._open.get(session_id)
            if control is None or not control.alive:
                await self._close(session_id)
                control = await self._connect(session_id, session)
                self._open[session_id] = control
                await self._evict()
            return control

    async def drop(self, session_id: str) -> None:
        """Close the session's connection, if there is one."""
        await self._close(session_id)

    async def close(self) -> None:
        """Close them all."""
        for session_id in list(self._open):
            await self.drop(session_id)

    async def _connect(self, session_id: str, session: Session) -> AgentControl:
        connection = await connect(await self._sandboxes.connect(session.pod_name, session.pod_uid))
        control = AgentControl(connection)
        try:
            await control.start(self.key(session_id, session))
        except BaseException:
            await control.close()
            raise
        return control

    async def _close(self, session_id: str) -> None:
        control = self._open.pop(session_id, None)
        if control is not None:
            await control.close()

    async def _evict(self) -> None:
        spent = [session_id for session_id, control in self._open.items() if not control.alive]
        for session_id in spent or list(self._open)[: max(0, len(self._open) - MAX_CONTROLS)]:
            await self._close(session_id)
