"""The one table of states and events, and its picture."""

from pathlib import Path

import pytest

from dsec.errors import SandboxLostError, StateError
from dsec.lifecycle import TRANSITIONS, Happening, State, after, diagram

PAGE = Path(__file__).resolve().parents[3] / "docs/lifecycle.md"


def test_the_diagram_in_the_documentation_is_the_table() -> None:
    assert f"```mermaid\n{diagram()}\n```" in PAGE.read_text()


def test_what_ended_stays_ended() -> None:
    assert {following for (state, _), following in TRANSITIONS.items() if state is State.ENDED} == {State.ENDED}


@pytest.mark.parametrize("state", [State.CREATING, State.RUNNING, State.PAUSED])
def test_everything_that_lives_can_be_stopped(state: State) -> None:
    assert after(after(state, Happening.STOP), Happening.GONE) is State.ENDED


def test_every_state_is_reached_from_the_first() -> None:
    reached = {State.CREATING}
    while more := {to for (state, _), to in TRANSITIONS.items() if state in reached} - reached:
        reached |= more
    assert reached == set(State)


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("happening", list(Happening))
def test_what_the_table_does_not_have_is_a_typed_refusal(state: State, happening: Happening) -> None:
    if (state, happening) in TRANSITIONS:
        assert after(state, happening) is TRANSITIONS[state, happening]
        return
    expected = SandboxLostError if state in (State.STOPPING, State.ENDED) else StateError
    with pytest.raises(expected, match="box"):
        after(state, happening, "box")
