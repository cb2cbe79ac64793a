"""Ids, paths and lifecycles."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import errors
from schemas.documents import (
    chunk_path,
    chunks_of,
    command_path,
    commands_of,
    cursor_path,
    quote_id,
    session_path,
    transfer_path,
    user_path,
)
from schemas.errors import AgentRefused, IllegalStep, PigeonError
from schemas.http import PROBLEMS
from schemas.ids import UserId, chunk_id, is_session_id, new_id, sandbox_name, session_id
from schemas.lifecycle import (
    COMMAND_STEPS,
    ENDED,
    LIVE,
    SESSION_STEPS,
    TAKES_INPUT,
    UNSETTLED,
    CommandState,
    SessionState,
    check_command_step,
    check_session_step,
)
from schemas.topics import ORDERED_TOPICS, SUBSCRIPTIONS, TOPICS

any_text = st.text(st.characters(exclude_categories=["Cs"]))


@given(any_text, any_text)
def test_a_session_id_is_a_dns_label_that_its_request_determines(user: str, request: str) -> None:
    """It names a pod; a repeated request finds it again."""
    name = session_id(UserId(user), request)
    assert is_session_id(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", sandbox_name(name))
    assert session_id(UserId(user), request) == name


def test_users_cannot_meet_in_one_session_id() -> None:
    """Whatever they put into their request ids; a user's id holds no NUL, which is what separates the two."""
    assert session_id(UserId("a"), "b") != session_id(UserId("ab"), "")
    assert session_id(UserId("a"), "b") != session_id(UserId("b"), "a")


@pytest.mark.parametrize(
    "text", ["", "s", "S" + "a" * 25, "s" + "a" * 24, "s" + "a" * 26, "s" + "1" * 25, "s" + "a" * 25 + "\n"]
)
def test_what_is_no_session_id_is_told_apart(text: str) -> None:
    """Before it becomes a path."""
    assert not is_session_id(text)


@given(st.lists(st.integers(0, 10**16 - 1)))
def test_chunk_ids_sort_as_offsets_do(offsets: list[int]) -> None:
    """Stores order documents by id, as text."""
    assert sorted(map(chunk_id, offsets)) == [chunk_id(offset) for offset in sorted(offsets)]
    assert {len(chunk_id(offset)) for offset in offsets} <= {16}


@given(any_text, any_text)
def test_a_quoted_id_stays_one_segment_and_names_one_user(one: str, other: str) -> None:
    """A user's id is whatever an identity provider says; it must not climb out of users/."""
    assert re.fullmatch(r"[A-Za-z0-9%-]*", quote_id(one))
    assert (quote_id(one) == quote_id(other)) == (one == other)
    assert user_path("../sessions/x").count("/") == 1
    assert user_path("..") == "users/%2e%2e"


def test_paths_alternate_collections_and_ids() -> None:
    """As a document store wants them."""
    for path in (
        session_path("s"),
        command_path("s", "c"),
        chunk_path(session_path("s"), 5),
        transfer_path("s", "t"),
        chunk_path(transfer_path("s", "t"), 0),
        cursor_path("s", "a/b"),
        user_path("u"),
    ):
        assert len(path.split("/")) % 2 == 0
        assert all(path.split("/"))
    assert chunk_path("sessions/s", 5) == "sessions/s/chunks/0000000000000005"
    assert chunk_path("sessions/s", 5).startswith(chunks_of("sessions/s") + "/")
    assert command_path("s", "c").startswith(commands_of("s") + "/")


def test_new_ids_may_be_used_wherever_clients_choose_their_own() -> None:
    """They obey the same pattern, and differ."""
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", new_id())
    assert new_id() != new_id()


@pytest.mark.parametrize("old", SessionState)
@pytest.mark.parametrize("new", SessionState)
def test_a_session_takes_only_the_steps_of_its_table(old: SessionState, new: SessionState) -> None:
    """An end state is never left, and nothing becomes what it is."""
    if new in SESSION_STEPS[old]:
        check_session_step(old, new)
        assert old in LIVE
        assert old is not new
    else:
        with pytest.raises(IllegalStep, match=f"from {old} to {new}"):
            check_session_step(old, new)


@pytest.mark.parametrize("old", CommandState)
@pytest.mark.parametrize("new", CommandState)
def test_a_command_takes_only_the_steps_of_its_table(old: CommandState, new: CommandState) -> None:
    """As for sessions."""
    if new in COMMAND_STEPS[old]:
        check_command_step(old, new)
        assert old in UNSETTLED
    else:
        with pytest.raises(IllegalStep, match=f"from {old} to {new}"):
            check_command_step(old, new)


def test_every_live_session_can_fail_or_be_lost_and_none_comes_back() -> None:
    """Whatever happens to a sandbox, its session can say so."""
    assert set(SessionState) == LIVE | ENDED
    assert {SessionState.CLOSED, SessionState.FAILED, SessionState.LOST} == ENDED
    for state in LIVE:
        assert {SessionState.FAILED, SessionState.LOST} <= SESSION_STEPS[state]
    assert {SessionState.CLOSING} == LIVE - TAKES_INPUT


def test_every_state_can_be_reached() -> None:
    """A state that cannot is one that nobody tests."""
    reached = {SessionState.REQUESTED}
    for _ in SessionState:
        reached |= {step for state in reached for step in SESSION_STEPS[state]}
    assert reached == set(SessionState)


def codes(error: type[PigeonError]) -> set[str]:
    return {error.code}.union(*(codes(kind) for kind in error.__subclasses__() if kind.__module__ == errors.__name__))


def test_every_error_has_a_problem_document() -> None:
    """Whatever is raised, a caller gets a status that fits; what can be retried says so by 429 or 503."""
    assert codes(PigeonError) <= PROBLEMS.keys()
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, PigeonError) and kind is not AgentRefused:
            assert (PROBLEMS[kind.code][0] == 503) >= kind.retryable


def test_subscriptions_read_topics_that_exist() -> None:
    """And are ordered exactly where the topic is."""
    for subscription in SUBSCRIPTIONS:
        assert subscription.topic in TOPICS
        assert subscription.ordered == (subscription.topic in ORDERED_TOPICS)
