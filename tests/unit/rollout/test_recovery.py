"""The recovery table: every combination of what a process can find, and what must never be decided."""

from itertools import product

from rollout.recovery import UNOPENED, Action, Found, Kv, Pending, Recovery, Run, Tail, Weights, decide, decide_run
from rollout.state import Phase

TAILS: tuple[Tail, ...] = (UNOPENED, *Phase)
EVERY = [
    Found(tail, is_cancelled, weights, on_update, has_saved_kv, pending)
    for tail, is_cancelled, weights, on_update, has_saved_kv, pending in product(
        TAILS, (False, True), Weights, ("keep", "cut", "pin"), (False, True), Pending
    )
]
SAMPLED = (Phase.SAMPLE, Phase.TOOLS)
IDLE = (Kv.NOT_NEEDED, Run.NOTHING)
RUNS = {
    Pending.NEW: Run.RUN,
    Pending.FINISHED: Run.ANSWER,
    Pending.RUNNING: Run.COLLECT,
    Pending.UNKNOWN: Run.REBUILD,
    Pending.LOST: Run.REBUILD,
    Pending.LOST_OUTSIDE: Run.REFUSE,
}


def expected(found: Found) -> Recovery:
    """The same decisions, written down one tail at a time."""
    if found.tail is Phase.DONE:
        return Recovery(Action.NOTHING, *IDLE)
    if found.is_cancelled:
        return Recovery(Action.END_CANCELLED, *IDLE)
    run = RUNS[found.pending]
    saved = Kv.RESTORE if found.has_saved_kv and found.weights is Weights.SAME else Kv.PREFILL
    stale = found.weights is Weights.UNKNOWN or (found.weights is Weights.UPDATED and found.on_update == "pin")
    unknown = found.weights is Weights.OTHER
    match found.tail:
        case Phase.PREPARE:
            return Recovery(Action.REFUSE, *IDLE) if unknown else Recovery(Action.GO_ON, Kv.NOT_NEEDED, run)
        case Phase.SAMPLE | Phase.TOOLS if unknown:
            return Recovery(Action.REFUSE, *IDLE)
        case Phase.SAMPLE | Phase.TOOLS if stale:
            return Recovery(Action.END_STALE, *IDLE)
        case Phase.SAMPLE:
            return Recovery(Action.GO_ON, saved, Run.NOTHING)
        case Phase.TOOLS:
            return Recovery(Action.GO_ON, saved, run)
        case Phase.SOLVE | Phase.JUDGE:
            return Recovery(Action.GO_ON, Kv.NOT_NEEDED, run)
        case Phase.FINISH:
            return Recovery(Action.GO_ON, *IDLE)
        case _:
            return Recovery(Action.OPEN, *IDLE)


def test_every_combination_is_decided_as_written_down() -> None:
    assert len(EVERY) == 8 * 2 * 4 * 3 * 2 * 6
    assert [(found, decide(found)) for found in EVERY] == [(found, expected(found)) for found in EVERY]


def test_every_decision_is_reached() -> None:
    decided = [decide(found) for found in EVERY]
    assert {each.action for each in decided} == set(Action)
    assert {each.kv for each in decided} == set(Kv)
    assert {each.run for each in decided} == set(Run)


def test_what_is_not_done_is_gone_on_with_or_ended_or_refused_and_never_dropped() -> None:
    assert {found.tail for found in EVERY if decide(found).action is Action.NOTHING} == {Phase.DONE}


def test_a_state_of_other_weights_is_never_restored_and_a_command_never_repeated_where_it_ran() -> None:
    for found in EVERY:
        plan = decide(found)
        if plan.kv is Kv.RESTORE:
            assert found.weights is Weights.SAME
            assert found.has_saved_kv
        if plan.run is Run.RUN:
            assert found.pending is Pending.NEW
        if plan.run is Run.REBUILD:
            assert found.pending in {Pending.UNKNOWN, Pending.LOST}
        if plan.action in {Action.OPEN, Action.NOTHING, Action.END_STALE, Action.END_CANCELLED, Action.REFUSE}:
            assert (plan.kv, plan.run) == IDLE
    assert {decide_run(pending) for pending in Pending} == set(Run) - {Run.NOTHING}
