"""Every store keeps the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

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


PAIRS: dict[str, Callable[[Path], AbstractAsyncContextManager[Pair]]] = {"local": local_pair}


@pytest.fixture(params=PAIRS)
async def pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    """Two clients of one empty store, for each implementation."""
    async with PAIRS[request.param](tmp_path) as pair:
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
