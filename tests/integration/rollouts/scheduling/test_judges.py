"""Judges that are stopped, and taken up again: as any rollout is, at a token boundary and by the table of recovery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from rollout.engine import OnUpdate
from rollout.events import Preempted, RolloutFinished, RolloutResumed
from rollout.policy import Policy
from rollout.request import JudgeReward, PolicyRule
from rollout.testing import ENGINE, Reply, ScriptedEngine

DONE = Reply(reasoning="Good.", content="Done.")
VERDICT = Reply(reasoning="word " * 20, calls=[("verdict", {"score": 0.5, "reason": "fair"})])
BEGUN_COUNT = 5
"""Tokens of a judge after which it is stopped."""


def judged(session: str, _turn: int) -> Reply:
    return VERDICT if "/judge." in session else DONE


async def stopped_while_judged(here: Any, service: Any, *, samples_count: int = 1, **policy: Any) -> list[str]:
    """A rollout that is preempted while its judges draw; they."""
    reward = JudgeReward(rubric="Be kind.", samples_count=samples_count, attempts_max=2)
    await here.submit("job", "one", reward=reward, policy=PolicyRule(**policy))
    judge_ids = [f"job/one.0/judge.{sample}" for sample in range(samples_count)]
    await here.until(lambda: here.sampled(judge_ids[0]) >= BEGUN_COUNT)
    assert await service.preempt() == ["job/one.0"]
    assert service.ledger.rollouts["job/one.0"].preempted is not None
    return judge_ids


async def test_judges_stop_at_a_token_and_go_on_over_their_states(world: Any) -> None:
    """Of three two draw and one waits for a slot: all stand, and what was drawn is in the log, once."""
    here = world(judged, concurrency=2)
    async with here.serving() as service:
        judge_ids = await stopped_while_judged(here, service, samples_count=3)
        drawn = {each: here.sampled(each) for each in judge_ids}
        assert sum(drawn.values()) + here.sampled("job/one.0") == here.engine.drawn_count
        stopped = {event.rollout_id for event in here.events if isinstance(event, Preempted)}
        assert stopped >= {"job/one.0", *judge_ids[:2]}
        service.resume()
        await service.wait("job")
        assert here.record("job/one.0").reward.value == 0.5
        assert here.record("job/one.0").finish_reason == "STOP"
        resumed = {event.rollout_id: event.kv for event in here.events if isinstance(event, RolloutResumed)}
        assert [resumed[each] for each in judge_ids[:2]] == ["restored"] * 2
        assert sum(map(here.sampled, [*judge_ids, "job/one.0"])) == here.engine.drawn_count


async def test_a_judge_that_other_weights_drew_is_refused_until_they_are_back(world: Any) -> None:
    here = world(judged)
    async with here.serving() as service:
        (judge_id,) = await stopped_while_judged(here, service)
        stood_at = here.sampled(judge_id)

    def with_others() -> ScriptedEngine:
        engine = ScriptedEngine(service.tokenizer, judged)
        engine._info = msgspec.structs.replace(ENGINE, weights_digest="1" * 64)
        return engine

    here.make_engine = with_others
    async with here.serving() as service:
        await service.wait("job")
        assert here.sampled(judge_id) == stood_at
        assert "other weights" in here.record("job/one.0").infra_failure["message"]
        assert here.record("job/one.0").reward.value is None
    here.make_engine = None
    async with here.serving() as service:
        await service.wait("job")
        assert here.record("job/one.0").reward.value == 0.5


async def test_a_judge_that_is_ended_where_it_stands_leaves_no_state_behind(world: Any) -> None:
    here = world(judged)
    async with here.serving() as service:
        (judge_id,) = await stopped_while_judged(here, service)
        assert list((here.directory / "kv").iterdir()) != []
        assert await service.cancel("job") == 1
        assert here.ended() == [judge_id, "job/one.0"]
        assert list((here.directory / "kv").iterdir()) == []


@pytest.mark.parametrize("on_update", ["keep", "pin"])
async def test_a_judge_whose_weights_were_replaced_goes_on_as_its_job_says(
    world: Any, tmp_path: Path, on_update: OnUpdate
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/weights").write_text("new")
    here = world(judged, checkpoints_root=tmp_path)
    async with here.serving() as service:
        (judge_id,) = await stopped_while_judged(here, service, on_update=on_update)
        await Policy(service).update(str(tmp_path / "new"), 1)
    async with here.serving() as service:
        await service.wait("job")
        record = here.record("job/one.0")
        ends = {e.rollout_id: e.reason for e in here.events if isinstance(e, RolloutFinished)}
        assert record.reward.value == 0.5
        assert ends[judge_id] == ("STALE" if on_update == "pin" else "TOOL_CALLS")
        assert record.reward.judge_rollout_ids == ((f"{judge_id}-1",) if on_update == "pin" else (judge_id,))
