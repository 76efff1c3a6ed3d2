"""Versions of the weights in the embedded engine: what a kept state is, what is freed, what is bounded."""

import json
import shutil
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.engine import KvBreak, OnUpdate, SampleRequest, Sampling
from rollout.engines.embedded.batching import Limits
from rollout.engines.embedded.binding import Chunk, Drawn, Model, State, Stream
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT, load_checkpoint
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.engines.embedded.jobs import Job, Outcome, Scoring
from rollout.engines.embedded.mailbox import Mailbox
from rollout.engines.embedded.versions import Versions
from rollout.engines.kept_state import KeptState
from rollout.errors import EngineError, PreemptedError, RequestError

PROMPT = tuple(json.loads((Path(__file__).parents[2] / "golden/embedded_prompts.json").read_text())[0]["token_ids"])
WARM = Sampling(temperature=1.5, top_p=0.95, seed=11)


def tensor_bytes(path: Path, name: str) -> tuple[int, int]:
    data = path.read_bytes()
    start = 8 + struct.unpack_from("<Q", data)[0]
    begin, end = json.loads(data[8:start])[name]["data_offsets"]
    return start + begin, start + end


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint with its first layer's keys in another order."""
    folder = Path(shutil.copytree(DEFAULT_CHECKPOINT, tmp_path_factory.mktemp("weights") / "checkpoint"))
    path = folder / "model.safetensors"
    begin, end = tensor_bytes(path, "model.layers.0.self_attn.kv_proj.weight")
    data = path.read_bytes()
    path.write_bytes(data[:begin] + data[begin + 512 : end] + data[begin : begin + 512] + data[end:])
    return folder


@pytest.fixture
def versions() -> Iterator[Versions]:
    versions = Versions(Model(load_checkpoint()), Limits(versions_max=2))
    yield versions
    versions.close()


def job(count: int, on_update: OnUpdate = "keep", session: str = "s", token_ids: tuple[int, ...] = PROMPT) -> Job:
    return Job(
        SampleRequest(
            session=session,
            token_ids=token_ids,
            sampling=WARM,
            stream_key=5,
            tokens_count_max=count,
            stop_ids=frozenset(),
            on_update=on_update,
        )
    )


def drain(versions: Versions) -> list[Outcome]:
    told = []
    while not versions.stands:
        told += versions.turn()
    return told


def until_drawn(versions: Versions, running: Job) -> None:
    versions.add(running)
    while running.drawn_count == 0:
        versions.turn()


def ids(told: list[Outcome]) -> list[int]:
    return [token.token_id for outcome in told for token in outcome.drawn]


def test_a_pause_that_waits_stands_still_for_a_state_and_is_over_once_its_request_is(versions: Versions) -> None:
    stored = array("I", PROMPT[:-1]).tobytes()
    waiting = job(5, session="waits")
    versions.add(waiting, stored)
    until_drawn(versions, job(60, session="other"))
    versions.pause("wait")
    while len([*versions.jobs]) > 1:
        versions.turn()
    assert (versions.stands, versions.is_finishing, waiting.drawn_count) == (True, True, 0)
    versions.admit(stored, None)
    assert len(ids(drain(versions))) == 5
    assert not versions.is_finishing


def test_a_kept_request_is_drawn_by_the_new_weights_over_the_state_that_the_old_ones_left(
    versions: Versions, folder: Path
) -> None:
    running = job(40)
    until_drawn(versions, running)
    seen = list(running.tokens)
    new = Model(load_checkpoint(folder))
    by_hand = State(versions.newest.model)
    for begin in range(0, len(seen) - 1, 100):
        versions.newest.model.step([Chunk(by_hand, seen[begin : min(begin + 100, len(seen) - 1)])])
    versions.update(new, 1)
    drawn = ids(drain(versions))
    by_hand.model = new
    expected = new.decode([Stream(by_hand, seen[-1], WARM, 5, (), len(drawn))])[0]
    assert drawn == [token.token_id for token in expected]
    by_hand.close()


def test_a_model_is_closed_once_nothing_pins_it(versions: Versions, folder: Path) -> None:
    old = versions.newest.model
    until_drawn(versions, job(4, "pin"))
    versions.update(Model(load_checkpoint(folder)), 1)
    drain(versions)
    assert old.pointer
    versions.release("s")
    assert old.pointer is None
    second = versions.newest.model
    until_drawn(versions, job(40, "pin"))
    versions.update(Model(load_checkpoint()), 2)
    versions.release("s")
    assert second.pointer, "its request still runs"
    drain(versions)
    assert second.pointer is None


def test_a_session_that_pins_no_longer_moves_with_its_next_request(versions: Versions, folder: Path) -> None:
    old = versions.newest.model
    until_drawn(versions, job(1, "pin"))
    versions.update(Model(load_checkpoint(folder)), 1)
    told = []
    versions.add(job(2, "cut"))
    told += drain(versions)
    assert {outcome.policy_version for outcome in told} == {1}
    assert told[0].kv == "rebuilt"
    assert old.pointer is None


def test_a_pinned_request_that_has_drawn_nothing_takes_the_new_weights(versions: Versions, folder: Path) -> None:
    old = versions.newest.model
    versions.add(job(2, "pin"))
    versions.turn()
    versions.update(Model(load_checkpoint(folder)), 1)
    told = drain(versions)
    assert {(outcome.policy_version, outcome.kv) for outcome in told} == {(1, "")}
    assert old.pointer is None


def test_more_versions_than_fit_are_refused_and_nothing_changes(versions: Versions, folder: Path) -> None:
    until_drawn(versions, job(1, "pin", "first"))
    versions.update(Model(load_checkpoint(folder)), 1)
    until_drawn(versions, job(1, "pin", "second"))
    drain(versions)
    third = Model(load_checkpoint())
    with pytest.raises(EngineError, match="2 sessions pin older weights, and at most 2 versions fit"):
        versions.check_room()
    versions.release("first")
    versions.check_room()
    versions.update(third, 2)
    versions.release("second")


def test_a_score_that_new_weights_interrupt_is_of_the_new_weights_alone(versions: Versions, folder: Path) -> None:
    new = Model(load_checkpoint(folder))
    versions.add(Scoring(PROMPT, 0))
    versions.turn()
    versions.update(new, 1)
    (outcome,) = drain(versions)
    alone = Versions(Model(load_checkpoint(folder)), Limits(), 1)
    alone.add(Scoring(PROMPT, 0))
    (expected,) = drain(alone)
    assert (outcome.drawn, outcome.policy_version) == (expected.drawn, 1)
    assert len(outcome.drawn) == len(PROMPT) - 1
    alone.close()


def test_a_score_does_not_hold_up_the_others_for_its_length(versions: Versions) -> None:
    talker = job(400, session="talker", token_ids=(0, 5, 6))
    until_drawn(versions, talker)
    before, turns, told = talker.drawn_count, 0, list[Outcome]()
    versions.add(Scoring(PROMPT * 3, 0))
    while not any(isinstance(outcome.job, Scoring) for outcome in told):
        told += versions.turn()
        turns += 1
    assert turns >= len(PROMPT) * 3 // Limits().prefill_tokens_max
    assert talker.drawn_count - before >= turns


async def test_a_checkpoint_of_another_shape_or_with_a_nan_is_refused(folder: Path, tmp_path: Path) -> None:
    engine = EmbeddedEngine()
    await engine.open()
    shorter, odd = tmp_path / "shorter", tmp_path / "odd"
    shutil.copytree(folder, shorter)
    config = json.loads((shorter / "tokenizer_config.json").read_text())
    (shorter / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 1024}))
    shutil.copytree(folder, odd)
    path = odd / "model.safetensors"
    begin, _ = tensor_bytes(path, "model.norm.weight")
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(b"\xc0\x7f")
    for checkpoint, why in (
        (shorter, r"another model \(max_position_embeddings \(or model_max_length\) 1024, not 2048\)"),
        (odd, "model.norm.weight holds NaN or infinity"),
    ):
        with pytest.raises(EngineError, match=why):
            await engine.update(checkpoint, 1)
    assert engine.info.policy_version == 0
    await engine.close()


async def test_sessions_are_bounded_and_a_release_makes_room() -> None:
    engine = EmbeddedEngine(limits=Limits(sessions_max=2))
    await engine.open()
    for session in ("a", "b", "a"):
        assert [chunk async for chunk in engine.sample(job(1, session=session).request)]
    with pytest.raises(EngineError, match="2 sessions are open; release"):
        await anext(engine.sample(job(1, session="c").request))
    await engine.release("a")
    assert [chunk async for chunk in engine.sample(job(1, session="c").request)]
    await engine.close()


@pytest.mark.parametrize("limits", [Limits(versions_max=0), Limits(sessions_max=0)])
def test_limits_out_of_bounds_are_refused(limits: Limits) -> None:
    with pytest.raises(RequestError, match="at least 1"):
        EmbeddedEngine(limits=limits)


async def test_an_engine_starts_at_the_version_that_it_is_given_and_opens_again_at_its_last(folder: Path) -> None:
    engine = EmbeddedEngine(policy_version=7)
    await engine.open()
    assert engine.info.policy_version == 7
    updated = await engine.update(folder, 8)
    await engine.close()
    await engine.open()
    assert engine.info == updated
    await engine.close()


async def test_a_chunk_ends_where_the_version_or_the_kv_changes_and_comes_before_the_end() -> None:
    mailbox, running = Mailbox(), job(9)

    def put(token_id: int, version: int, kv: KvBreak = "") -> None:
        mailbox.put(Outcome(running, [Drawn(token_id, -0.5)], None, version, kv))

    put(1, 0)
    put(2, 0)
    put(3, 1, "kept")
    put(4, 1)
    put(5, 1, "rebuilt")
    mailbox.put(Outcome(running, [], None, error=PreemptedError("preempted")))
    chunks = [await mailbox.take() for _ in range(3)]
    assert [(chunk.token_ids, chunk.policy_version, chunk.kv) for chunk in chunks] == [
        ((1, 2), 0, ""),
        ((3, 4), 1, "kept"),
        ((5,), 1, "rebuilt"),
    ]
    for _ in range(2):
        with pytest.raises(PreemptedError):
            await mailbox.take()


class BrokenVersions(Versions):
    def keep(self, session: str) -> KeptState | None:
        raise ArithmeticError("a bug in the fourth layer")


class BrokenEngine(EmbeddedEngine):
    def _load(self) -> Versions:
        versions = super()._load()
        return BrokenVersions(versions.newest.model, versions.limits)


async def test_a_bug_in_one_call_is_told_to_its_caller_to_all_that_run_and_to_all_that_come(tmp_path: Path) -> None:
    engine = BrokenEngine()
    await engine.open()
    stream = engine.sample(job(1500).request)
    await anext(stream)
    for _ in range(2):
        with pytest.raises(EngineError, match=r"thread failed: ArithmeticError\('a bug in the fourth layer'\)"):
            await engine.save("s", tmp_path / "s.kv")

    async def take_the_rest() -> None:
        async for _ in stream:
            pass

    with pytest.raises(EngineError, match="fourth layer"):
        await take_the_rest()
    for call in (engine.pause("wait"), engine.preempt("s"), engine.score(PROMPT), engine.update(tmp_path, 1)):
        with pytest.raises(EngineError, match="fourth layer"):
            await call
    await engine.close()
