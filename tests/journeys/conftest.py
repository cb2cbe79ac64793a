"""One stack for the journeys that leave it as they found it, and a fresh one for those that do not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol

import pytest

from tests.journeys.stack import Stack, User


class MakeStack(Protocol):
    def __call__(self, **environment: str) -> Stack: ...


@pytest.fixture
async def make_stack(tmp_path: Path, python: Path) -> AsyncIterator[Callable[..., Stack]]:
    """Stacks with settings of their own; whatever of them still runs at the end is stopped as Ctrl-C would."""
    made: list[Stack] = []

    def make(**environment: str) -> Stack:
        state = tmp_path / f"stack{len(made)}" / "state"
        state.mkdir(parents=True, mode=0o700)
        made.append(Stack(state, {"PIGEON_PYTHON": str(python), **environment}))
        return made[-1]

    yield make
    for stack in made:
        await stack.stop()


@pytest.fixture
async def stack(make_stack: MakeStack) -> Stack:
    """A whole stack, started."""
    whole = make_stack()
    await whole.start()
    return whole


@pytest.fixture
async def alice(stack: Stack) -> AsyncIterator[User]:
    """A signed-in user."""
    async with AsyncExitStack() as exit_stack:
        yield await exit_stack.enter_async_context(stack.user("alice"))
