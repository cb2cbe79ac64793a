"""A handler returns a verdict; the worker settles the message."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Done:
    """The event has had its effect, now or earlier: acknowledge it."""


@dataclass(frozen=True, slots=True)
class Later:
    """Not yet: try again after `delay` seconds."""

    delay: float


@dataclass(frozen=True, slots=True)
class Refuse:
    """It can never succeed: to the dead letters, with the reason."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Another worker holds what this message stands for: settle nothing, let the lease lapse."""


Settlement = Done | Later | Refuse | Leave
DONE = Done()
LEAVE = Leave()
