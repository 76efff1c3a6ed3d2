"""Logs that are served with other weights than they were written with: what goes on, and what the records say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rollout.engine import Sampled, SampleRequest
from rollout.errors import EngineError, ForeignWeightsError
from rollout.events import PolicyUpdated
from rollout.main import load_tokenizer
from rollout.policy import Policy
from rollout.request import PolicyRule
from rollout.testing import ENGINE, Reply, ScriptedEngine
from wal.tokens import TokensAppended

TURN = Reply(reasoning="Good.", content="Done.")


def drawing_with(here: Any, digit: str, version: int = 0) -> Any:
    """A world whose engine has weights with this digest from here on."""

    def make() -> ScriptedEngine:
        engine = ScriptedEngine(here.service.tokenizer, lambda _session, _turn: TURN)
        engine._info = msgspec.structs.replace(ENGINE, weights_digest=digit * 64, policy_version=version)
        return engine

    here.make_engine = make
    return here


def drawn_by(here: Any, rollout_id: str) -> list[tuple[int, str]]:
    return [(run.version, run.weights_digest[0]) for run in here.record(rollout_id).policy_versions]


async def begun(here: Any) -> None:
    """One rollout has ended, and one stands in mid-turn, of the weights 0."""
    async with here.serving() as service:
        await here.ask("old", 1)
        await service.wait("old")
        await here.ask("cut", 1)
        await here.until(lambda: here.sampled("cut/0.0") == 2)
        await service.preempt()


async def test_a_log_is_not_served_with_weights_that_its_rollouts_could_not_go_on_with(world: Any) -> None:
    here = world()
    await begun(here)
    said = r"1 unfinished rollout .* cut/0\.0 was drawn by .* 000000000000, .* 111111111111, .*DSEC_NEWER_WEIGHTS=1:DIR"
    with pytest.raises(EngineError, match=said):
        async with drawing_with(here, "1").serving():
            pass
    async with drawing_with(here, "0").serving() as service:
        await service.wait("cut")
        assert (here.record("cut/0.0").finish_reason, drawn_by(here, "cut/0.0")) == ("STOP", [(0, "0")])
    async with drawing_with(here, "1").serving() as service:
        await here.ask("new", 1)
        await service.wait("new")
        assert [drawn_by(here, f"{job}/0.0") for job in ("old", "cut", "new")] == [[(0, "0")], [(0, "0")], [(0, "1")]]


async def test_who_says_that_other_weights_are_newer_has_them_go_on(world: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights").write_text("other")
    here = world()
    await begun(here)
    here.config["newer_weights"] = (1, tmp_path / "other")
    async with drawing_with(here, "1").serving() as service:
        await service.wait("cut")
        assert [version for version, _ in drawn_by(here, "cut/0.0")] == [0, 1]


async def test_a_log_goes_on_with_weights_that_are_newer_than_any_it_names(world: Any) -> None:
    here = world()
    await begun(here)
    async with drawing_with(here, "7", version=7).serving() as service:
        await service.wait("cut")
        assert here.record("cut/0.0").finish_reason == "STOP"
        assert [drawn_by(here, f"{job}/0.0") for job in ("old", "cut")] == [[(0, "0")], [(0, "0"), (7, "7")]]
        assert service.ledger.policy is None, "nobody could load them again"


async def test_newer_weights_that_an_engine_has_already_are_named_and_count(world: Any, tmp_path: Path) -> None:
    """A server that a trainer, or another service, gave weights."""
    here = world()
    async with here.serving() as service:
        for name, max_lag in (("stale", 0), ("cut", None)):
            await here.ask(name, 1, policy=PolicyRule(max_lag=max_lag))
            await here.until(lambda name=name: here.sampled(f"{name}/0.0") == 2)
            await service.preempt()
    make_engine = drawing_with(here, "7", version=7).make_engine

    def make() -> ScriptedEngine:
        engine = make_engine()
        engine.checkpoint = tmp_path / "seven"
        return engine

    here.make_engine = make
    async with here.serving() as service:
        await service.wait("cut")
        assert service.ledger.policy == PolicyUpdated(service.engine.info, str(tmp_path / "seven"))
        assert [here.record(f"{name}/0.0").finish_reason for name in ("stale", "cut")] == ["STALE", "STOP"]


async def test_a_first_token_that_is_logged_behind_an_update_is_as_stale_as_one_before(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "weights").write_text("new")
    here = world(checkpoints_root=tmp_path)
    async with here.serving() as service:
        gather, is_drawn, may_be_logged = service.journal.gather, asyncio.Event(), asyncio.Event()

        async def gather_late(event: TokensAppended, opened_lsn: int) -> asyncio.Future[int]:
            is_drawn.set()
            await may_be_logged.wait()
            return await gather(event, opened_lsn)

        monkeypatch.setattr(service.journal, "gather", gather_late)
        await here.ask("job", 1, policy=PolicyRule(max_lag=0))
        await is_drawn.wait()
        await Policy(service).update(str(tmp_path / "new"), 1)
        may_be_logged.set()
        await service.wait("job")
        assert here.record("job/0.0").finish_reason == "STALE"


async def test_what_nobody_knows_weights_drew_ends_as_stale_instead_of_going_on(world: Any) -> None:
    class Changed(ScriptedEngine):
        async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
            async with aclosing(super().sample(request)) as chunks:
                yield await anext(chunks)
            raise ForeignWeightsError("the weights were changed behind this service")

    here = world()
    here.make_engine = lambda: Changed(load_tokenizer(), lambda _session, _turn: TURN)
    async with here.serving() as service:
        await here.ask("cut", 1)
        await service.wait("cut")
        assert service.ledger.rollouts["cut/0.0"].failure.code == "FOREIGN_WEIGHTS"
        drawn = here.sampled("cut/0.0")
        assert drawn > 0
    async with drawing_with(here, "0").serving() as service:
        await service.wait("cut")
        assert (here.record("cut/0.0").finish_reason, here.sampled("cut/0.0")) == ("STALE", drawn)
