"""Who may do what with which collection: the whole table, asked of the emulator."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from infra.adapters.firestore import firestore_store
from schemas.documents import INDEXES
from tests.emulators.users import Caller, id_token, load_rules

OWNER, OTHER = "alice", "mallory"
PATHS = {
    "sessions": "sessions/s1",
    "commands": "sessions/s1/commands/c1",
    "chunks": "sessions/s1/chunks/0000000000000000",
    "transfers": "sessions/s1/transfers/t1",
    "transfer chunks": "sessions/s1/transfers/t1/chunks/0000000000000000",
    "cursors": "sessions/s1/cursors/alice",
    "users": "users/alice",
    "config": "config/rollout",
    "deadLetters": "deadLetters/m1",
    "elsewhere": "elsewhere/x",
}
READS = {"get", "list"}
OWN = {
    "sessions": {"get"},  # a list needs the owner in its query; see below
    "commands": READS,
    "chunks": READS,
    "transfers": READS,
    "transfer chunks": READS,
}
ALLOWED: dict[str, dict[str, set[str]]] = {
    "anonymous": {},
    "owner": OWN,
    "other user": {},
    "admin": {name: READS for name in PATHS if name != "elsewhere"},
}
OPERATIONS = ("get", "list", "create", "update", "delete")


@pytest.fixture
async def client(firestore_host: str, project: str) -> AsyncIterator[httpx.AsyncClient]:
    """The emulator's REST door, with our rules and a document in every collection."""
    async with firestore_store(project, indexes=INDEXES, emulator=firestore_host) as store:
        for path in PATHS.values():
            await store.create(path, {"userId": OWNER})
    async with httpx.AsyncClient(base_url=f"http://{firestore_host}", trust_env=False, timeout=30) as client:
        await load_rules(client, project)
        yield client


def caller(client: httpx.AsyncClient, project: str, who: str) -> Caller:
    """One of the four."""
    tokens = {
        "anonymous": None,
        "owner": id_token(project, OWNER),
        "other user": id_token(project, OTHER),
        "admin": id_token(project, "root", admin=True),
    }
    return Caller(client, project, tokens[who])


@pytest.mark.parametrize("who", ALLOWED)
async def test_the_table(client: httpx.AsyncClient, project: str, who: str) -> None:
    """Every operation on every collection is allowed exactly where the table says so; nobody writes."""
    user = caller(client, project, who)
    got = {
        (name, operation)
        for name, path in PATHS.items()
        for operation in OPERATIONS
        if await _may(user, operation, path)
    }
    assert got == {(name, operation) for name, operations in ALLOWED[who].items() for operation in operations}


async def _may(user: Caller, operation: str, path: str) -> bool:
    allowed: bool = await getattr(user, operation)(path)
    return allowed


@pytest.mark.parametrize(
    ("who", "whose", "allowed"),
    [
        ("owner", OWNER, True),
        ("other user", OTHER, True),  # of which there are none
        ("other user", OWNER, False),
        ("owner", OTHER, False),
        ("anonymous", OWNER, False),
        ("admin", OWNER, True),
    ],
)
async def test_a_list_names_its_owner(
    client: httpx.AsyncClient, project: str, who: str, whose: str, allowed: bool
) -> None:
    """Sessions are listed by the caller's own user id, and by no other."""
    assert await caller(client, project, who).list_own(PATHS["sessions"], whose) is allowed


async def test_a_missing_session_looks_like_somebody_elses(client: httpx.AsyncClient, project: str) -> None:
    """Nobody can find out which session ids exist."""
    user = caller(client, project, "other user")
    for path in ("sessions/missing", "sessions/missing/chunks/0000000000000000"):
        assert await user.get(path) is await user.get(path.replace("missing", "s1")) is False


async def test_a_claim_that_only_looks_true_is_none(client: httpx.AsyncClient, project: str) -> None:
    """A user called admin is no admin."""
    assert not await Caller(client, project, id_token(project, "admin")).get(PATHS["sessions"])
