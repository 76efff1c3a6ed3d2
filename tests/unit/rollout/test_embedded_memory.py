"""Memory that is too short for a turn of the embedded engine, or for its weights: who asks for it waits or fails.

And nobody else does.
"""

import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rollout.engine import Sampling
from rollout.engines.embedded import batching, binding
from rollout.engines.embedded.batching import Limits
from rollout.engines.embedded.binding import Drawn, Model, NoRoomError, Stream, _Reports
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.engines.embedded.jobs import Job, Outcome, Scoring
from rollout.engines.embedded.library import load_library
from tests.unit.rollout.test_embedded_batching import CHECKPOINT, PROMPTS, RecordingModel, batch_of, job, run
from tests.unit.rollout.test_embedded_versions import tensor_bytes

ROOT = Path(__file__).parents[3]


class CrampedLibrary:
    """The C engine in a memory that has room for `states_max` states."""

    def __init__(self, library: Any, states_max: int) -> None:
        self._library = library
        self.states_max = states_max

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def v4_state_create(self, model: int) -> int | None:
        self.states_max -= 1
        return self._library.v4_state_create(model) if self.states_max >= 0 else None


@pytest.mark.parametrize("kept_bytes_max", [0, 1 << 20])
def test_who_finds_no_memory_for_a_state_waits_for_that_of_another(kept_bytes_max: int) -> None:
    model = RecordingModel(CHECKPOINT)
    limits = Limits(state_bytes_max=kept_bytes_max)
    ample, cramped = batch_of(model, limits), batch_of(model, limits)
    jobs = [[job((*PROMPTS[0], number), 3, str(number)) for number in range(4)] for _ in range(2)]
    run(ample, *jobs[0])
    model.library = CrampedLibrary(model.library, 1)
    cramped.add(Scoring(PROMPTS[0], 0))
    run(cramped, *jobs[1])
    assert [each.tokens for each in jobs[1]] == [each.tokens for each in jobs[0]]
    for batch in (ample, cramped):
        batch.close()
    model.close()


def test_who_finds_no_memory_and_nobody_to_wait_for_fails_alone() -> None:
    model = RecordingModel(CHECKPOINT)
    model.library = library = CrampedLibrary(model.library, 0)
    batch = batch_of(model, Limits())
    alone, scoring = job(PROMPTS[0]), Scoring(PROMPTS[0], 0)
    for each in (alone, scoring):
        batch.add(each)
    failed = batch.turn()
    assert [outcome.job for outcome in failed] == [alone, scoring]
    assert [outcome for outcome in failed if "out of memory for a sequence state" not in str(outcome.error)] == []
    assert [job for job in batch.jobs if job] == []
    library.states_max = 1
    run(batch, again := job(PROMPTS[0]))
    assert again.drawn_count == 2
    batch.close()
    model.close()


class MasklessModel(Model):
    """Has room for the masks of so many sequences."""

    masks_max = 1
    rounds: list[int]

    def decode(self, streams: Sequence[Stream]) -> list[list[Drawn]]:
        if sum(stream.wants_mask for stream in streams) > self.masks_max:
            raise NoRoomError("no room for so many masks")
        self.rounds = [stream.rounds_max for stream in streams]
        return super().decode(streams)


def masked(prompt: tuple[int, ...], session: str) -> Job:
    sampling = Sampling(temperature=1.0, top_k=5, seed=3)
    plain = job(prompt, 20, session).request
    return Job(msgspec.structs.replace(plain, sampling=sampling, returns_mask=True))


def test_who_finds_no_memory_for_its_masks_fails_alone() -> None:
    model = MasklessModel(CHECKPOINT)
    batch = batch_of(model, Limits())
    jobs = [job(PROMPTS[0], 20, "plain"), *(masked(PROMPTS[0], str(number)) for number in range(3))]
    for each in jobs:
        batch.add(each)
    told = list[Outcome]()
    while any(batch.jobs):
        told += batch.turn()
    failed = [outcome for outcome in told if outcome.error]
    assert [str(outcome.error) for outcome in failed] == ["no room for so many masks"] * 2
    assert {each.drawn_count for each in jobs if each not in [outcome.job for outcome in failed]} == {20}
    assert jobs[0] not in [outcome.job for outcome in failed]
    batch.close()
    model.close()


def test_masks_of_a_long_vocabulary_are_told_in_shorter_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no token differs."""
    model = MasklessModel(CHECKPOINT)
    batch = batch_of(model, Limits())
    run(batch, once := masked(PROMPTS[0], "once"))
    assert model.rounds == [4], "of 20, 16 came before"
    monkeypatch.setattr(batching, "MASK_BYTES_MAX", 3 * 4 * CHECKPOINT.dimensions.vocab_count)
    run(batch, again := masked(PROMPTS[0], "again"))
    assert (model.rounds, again.tokens) == ([2], once.tokens)
    batch.close()
    model.close()


def test_room_that_the_host_has_not_is_an_engine_error() -> None:
    with pytest.raises(NoRoomError, match="out of memory for what is to be told beside the tokens"):
        _Reports(1).want(0, 0, mask_count_max=1 << 45)


class ConfinedLibrary:
    """The C engine in a process that may grow by so many bytes while weights are loaded."""

    room_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(load_library(), name)

    def v4_create(self, *arguments: Any) -> int | None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size + self.room_bytes, hard))
        try:
            return load_library().v4_create(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (before, hard))


async def drawn(engine: EmbeddedEngine, session: str) -> tuple[list[int], set[int]]:
    """The tokens, and the versions that they are of."""
    chunks = [chunk async for chunk in engine.sample(job(PROMPTS[0], 60, session).request)]
    return [token for chunk in chunks for token in chunk.token_ids], {chunk.policy_version for chunk in chunks}


async def update_in_too_little(folder: Path) -> None:
    """Try to load the weights of a folder in ever more memory; what draws never notices before they are there."""
    engine = EmbeddedEngine()
    await engine.open()
    before, (tokens, _) = engine.info, await drawn(engine, "before")
    library, reasons = ConfinedLibrary(), list[str]()
    pytest.MonkeyPatch().setattr(binding, "load_library", lambda: library)
    while engine.info == before:
        try:
            await engine.update(folder, 1)
        except NoRoomError as error:
            reasons.append(str(error))
            library.room_bytes += 16 << 20
            assert await drawn(engine, f"{len(reasons)}") == (tokens, {0})
    assert set(reasons) == {f"{folder}/model.safetensors: out of memory while loading"}
    others, versions = await drawn(engine, "after")
    assert (others != tokens, versions) == (True, {1})
    await engine.close()


def test_weights_that_find_no_memory_are_refused_and_the_old_ones_draw_on(tmp_path: Path) -> None:
    """In a process of its own, so that no test before has left memory to it."""
    folder = Path(shutil.copytree(DEFAULT_CHECKPOINT, tmp_path / "newer"))
    path = folder / "model.safetensors"
    begin, end = tensor_bytes(path, "model.layers.0.self_attn.kv_proj.weight")
    data = path.read_bytes()
    path.write_bytes(data[:begin] + data[begin + 512 : end] + data[begin : begin + 512] + data[end:])
    script = (
        "import asyncio, pathlib, sys\n"
        "from tests.unit.rollout.test_embedded_memory import update_in_too_little\n"
        "asyncio.run(update_in_too_little(pathlib.Path(sys.argv[1])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
