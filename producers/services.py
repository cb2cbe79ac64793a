"""What the functions need from outside, handed to them by the composition root."""

from __future__ import annotations

from dataclasses import dataclass, field

from producers.rollout import RolloutCache
from schemas.limits import Limits
from schemas.ports import Bus, Clock, Identity, Minter, Store


@dataclass(frozen=True)
class Services:
    """The ports and settings of one deployment.

    `minter` is None where there is no Firestore to sign in to; `allowed_origins` are the web origins that may call
    ("https://terminal.example"); `source` is the CloudEvents source of what is published; `images` are the sandbox
    images a caller may ask for, "" being the deployment's default.
    """

    store: Store
    bus: Bus
    identity: Identity
    clock: Clock
    limits: Limits
    minter: Minter | None
    allowed_origins: frozenset[str]
    source: str
    images: frozenset[str] = frozenset({""})
    rollout: RolloutCache = field(default_factory=RolloutCache)
