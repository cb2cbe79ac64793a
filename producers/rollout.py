"""Who may use the terminal: config/rollout, read at most twice a minute by each process."""

from __future__ import annotations

from datetime import datetime, timedelta

from schemas.documents import ROLLOUT_PATH, Rollout
from schemas.errors import Forbidden
from schemas.ports import Clock, Principal, Store

MAX_AGE = timedelta(seconds=30)


class RolloutCache:
    """The last rollout document that was read."""

    def __init__(self) -> None:
        self._rollout = Rollout()
        self._read_at: datetime | None = None

    async def check(self, store: Store, clock: Clock, principal: Principal) -> None:
        """Raises Forbidden if the terminal is switched off, or is not for this user yet."""
        now = clock.now()
        if self._read_at is None or now - self._read_at >= MAX_AGE:
            snapshot = await store.get(ROLLOUT_PATH)
            self._rollout = Rollout.of(snapshot) if snapshot is not None else Rollout()
            self._read_at = now
        if not self._rollout.enabled:
            raise Forbidden("the terminal is switched off at the moment")
        if self._rollout.users is not None and principal.user not in self._rollout.users:
            raise Forbidden("the terminal is not open to this user yet")
