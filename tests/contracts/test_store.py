"""Every store keeps the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from infra.adapters.firestore import firestore_store
from infra.local.database import Database
from infra.local.store import LocalStore
from schemas.documents import INDEXES
from schemas.ports import Store
from tests.contracts.query_contract import QueryContract
from tests.contracts.store_contract import StoreContract

Pair = tuple[Store, Store]


@asynccontextmanager
async def local_pair(folder: Path) -> AsyncIterator[Pair]:
    """Two databases on one file are as far from each other as two processes."""
    async with Database(folder / "pigeon.db") as one, Database(folder / "pigeon.db") as other:
        yield LocalStore(one, indexes=INDEXES), LocalStore(other, indexes=INDEXES)


@asynccontextmanager
async def firestore_pair(host: str, project: str) -> AsyncIterator[Pair]:
    """Two clients with connections of their own."""
    one = firestore_store(project, indexes=INDEXES, emulator=host)
    other = firestore_store(project, indexes=INDEXES, emulator=host)
    async with one as left, other as right:
        yield left, right


@pytest.fixture(params=["local", "firestore"])
def opening(request: pytest.FixtureRequest, tmp_path: Path, project: str) -> AbstractAsyncContextManager[Pair]:
    """A pair of clients that is still to be opened, for each implementation."""
    if request.param == "local":
        return local_pair(tmp_path)
    return firestore_pair(request.getfixturevalue("firestore_host"), project)


@pytest.fixture
async def pair(opening: AbstractAsyncContextManager[Pair]) -> AsyncIterator[Pair]:
    """Two clients of one empty store."""
    async with opening as pair:
        yield pair


@pytest.fixture
def store(pair: Pair) -> Store:
    """A client."""
    return pair[0]


@pytest.fixture
def peer(pair: Pair) -> Store:
    """Another client of the same documents."""
    return pair[1]


class TestStore(StoreContract):
    """The contract, on each of them."""


class TestQueries(QueryContract):
    """Likewise."""
