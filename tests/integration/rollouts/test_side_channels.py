"""Routes and hidden states from the engine over log and shards to a trainer, by reference; also after a crash."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import aclosing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout.engine import Sampling
from rollout.engines.embedded.batching import Limits as EngineLimits
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.errors import RequestError
from rollout.export.exporter import export
from rollout.ledger import Ledger
from rollout.loader import Dataset, read_side_channel
from rollout.main import load_tokenizer
from rollout.request import Limits
from rollout.testing import Reply, ScriptedEngine, hidden_row, routes_row

HEAVY: Any = ("tokens", "logprobs", "topk", "routes", "hidden")
LONG = Reply(content="word " * 60)
ONE_BY_ONE = EngineLimits(rounds_max=1)
ASKED: Any = {"fields": HEAVY, "top_logprobs_count": 1, "limits": Limits(turn_tokens_count_max=1000)}


def check(token_ids: Any, loss_mask: Any, channels: dict[str, Any]) -> None:
    """Every row is that of its token, as the double tells it; nobody read the last token."""
    ids = np.asarray(token_ids)
    routes = np.stack([np.frombuffer(routes_row(int(i)), np.uint8).reshape(2, 2) for i in ids])
    routes[-1] = 0
    assert channels["routes_valid"].tolist() == [1] * (len(ids) - 1) + [0]
    assert np.array_equal(channels["routes"], routes)
    drawn = [np.frombuffer(hidden_row(int(i)), np.uint16) for i in ids[np.asarray(loss_mask, bool)]]
    assert np.array_equal(channels["hidden"], np.stack(drawn))


def has_sampled(setting: Any, count: int) -> bool:
    return any(state.sampled_count >= count for state in setting.service.ledger.rollouts.values())


async def test_side_channels_come_by_reference_with_the_end_of_a_rollout(serving: Any, tmp_path: Path) -> None:
    async with asyncio.timeout(60), serving(tmp_path / "run", exports_shards=True) as setting:
        updates = await setting.job(**{**ASKED, "fields": HEAVY})
        ended = [update.trajectory for update in updates if update.trajectory is not None]
        assert len(ended) == 6
        for said in ended:
            references = {each.name: each for each in said.record.side_channels}
            assert list(references) == ["routes_version", "hidden", "routes", "routes_valid"]
            assert references["routes"].layer_ids == (0, 3)
            found = {name: read_side_channel(each) for name, each in references.items()}
            check(said.token_ids, said.loss_mask, found)
            again = await setting.client.get(said.rollout_id, ["routes"])
            assert [each.name for each in again.record.side_channels] == ["routes_version", "routes", "routes_valid"]
            assert (await setting.client.get(said.rollout_id)).record.side_channels == ()
        ids = [said.rollout_id for said in ended]
        assert await setting.client.ack(ids) == 6  # the log may let go of them: they are in the shards
    dataset = Dataset.open(tmp_path / "run/shards")
    assert len(dataset) == 6
    for row in range(6):
        offsets, top_ids, logprobs = dataset.topk(row)
        assert (len(offsets), len(top_ids), len(logprobs)) == (len(said.token_ids) + 1, offsets[-1], offsets[-1])
        assert dataset.side_channel(row, "routes").shape == (len(said.token_ids), 2, 2)


async def test_rows_of_a_rollout_that_was_cut_short_again_and_again_are_there_once(
    serving: Any, pausing: Any, tmp_path: Path
) -> None:
    async with asyncio.timeout(120):
        for start, stop in pairwise((0, 5, 17, 18, 40)):
            engine = pausing(ScriptedEngine(load_tokenizer(), lambda _session, _turn: LONG), stop - start)
            async with serving(tmp_path / "run", engine=engine, exports_shards=True) as setting:
                asking = asyncio.create_task(setting.groups("one", **ASKED))
                await setting.until(partial(has_sampled, setting, stop))
                asking.cancel()
        async with serving(tmp_path / "run", reply=LONG, exports_shards=True) as setting:
            ((group,)) = await setting.groups("one", **ASKED)
            (said,) = group.trajectories
            assert said.record.lineage.attempt == 5
            check(
                said.token_ids,
                said.loss_mask,
                {each.name: read_side_channel(each) for each in said.record.side_channels},
            )
            tokenizer = setting.service.tokenizer
    log = tmp_path / "run/wal"
    assert export(log, Ledger.read(log, tokenizer), tmp_path / "again") == 1
    first, again = (Dataset.open(each) for each in (tmp_path / "run/shards", tmp_path / "again"))
    for name in ("routes", "routes_valid", "hidden"):
        assert np.array_equal(first.side_channel(0, name), again.side_channel(0, name))


async def test_a_server_without_shards_refuses_what_would_come_in_them(setting: Any) -> None:
    for name in ("routes", "hidden"):
        with pytest.raises(RequestError, match=f"{name} come in the files of shards: serve with DSEC_EXPORTS_SHARDS=1"):
            await setting.job(fields=("tokens", name))
    assert setting.service.ledger.jobs == {}


async def test_the_embedded_engine_tells_the_same_rows_after_a_crash_bit_for_bit(
    serving: Any, pausing: Any, tmp_path: Path
) -> None:
    sampling, limits = Sampling(temperature=5.0, seed=3), Limits(turn_tokens_count_max=400)
    asked: Any = {**ASKED, "fields": (*HEAVY, "live_tokens"), "sampling": sampling, "limits": limits}

    async def run(directory: Path, stop: int) -> tuple[int, dict[str, Any]]:
        """Which attempt ended it, and what came of it; the service goes once it drew from position `stop` on."""
        engine = pausing(EmbeddedEngine(limits=ONE_BY_ONE), stop + 1)
        async with serving(directory, engine=engine, exports_shards=True) as setting:
            updates = setting.client.submit([setting.ask("one")], request_id="job", **asked)
            async with aclosing(updates):
                async for update in updates:
                    if (said := update.trajectory) is not None:
                        record = said.record
                        return record.lineage.attempt, {c.name: read_side_channel(c) for c in record.side_channels}
                    if update.what == "tokens" and update.fields["start"] >= stop:
                        break
        return 0, {}

    async with asyncio.timeout(120):
        _, whole = await run(tmp_path / "a", 1 << 20)
        assert await run(tmp_path / "b", 1) == (0, {})
        attempt, cut = await run(tmp_path / "b", 1 << 20)
    assert attempt == 2
    assert whole["routes"].shape[1:] == (6, 2)
    assert whole["hidden"].shape[1:] == (256,)
    assert whole["routes_valid"][:-1].all()
    for name, rows in whole.items():
        assert np.array_equal(cut[name], rows), name


async def test_a_rollout_that_is_preempted_and_goes_on_over_its_saved_state_has_all_rows(
    serving: Any, pausing: Any, tmp_path: Path
) -> None:
    """Two halves by two versions: each row says whose router it was, and the rows of the first are not told again."""
    asked = {**ASKED, "sampling": Sampling(temperature=5.0, seed=3), "limits": Limits(turn_tokens_count_max=400)}
    engine = pausing(EmbeddedEngine(limits=ONE_BY_ONE), 20)
    async with asyncio.timeout(120), serving(tmp_path / "run", engine=engine, exports_shards=True) as setting:
        asking = asyncio.create_task(setting.groups("one", **asked))
        await setting.until(partial(has_sampled, setting, 20))
        assert await setting.client.preempt(request_id="job") == ("job/one.0",)
        await engine.resume()
        (state,) = setting.service.ledger.rollouts.values()
        await setting.client.update_policy(str(shutil.copytree(DEFAULT_CHECKPOINT, tmp_path / "new")), 3)
        await setting.client.resume(request_id="job")
        ((group,)) = await asking
        ((said,)) = group.trajectories
        assert [each.cause for each in said.record.kv_breaks] == ["restored"]
        found = {each.name: read_side_channel(each) for each in said.record.side_channels}
        assert found["routes_valid"].tolist() == [1] * (len(said.token_ids) - 1) + [0]
        halves = [0] * (state.tokens_count - 1) + [3] * (len(said.token_ids) - state.tokens_count) + [0]
        assert found["routes_version"].tolist() == halves
        assert len(found["hidden"]) == sum(said.loss_mask)
        assert found["hidden"].any(axis=1).all()
