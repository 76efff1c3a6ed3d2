"""Contexts that share beginnings, in any order and at once: the same bits as each by itself, and less to compute."""

import random
from collections.abc import Iterator, Sequence
from functools import cache

import pytest

from rollout.engine import SampleRequest, Sampling
from rollout.engines.embedded.batching import Limits
from rollout.engines.embedded.binding import Chunk, Drawn, Model
from rollout.engines.embedded.checkpoint import load_checkpoint
from rollout.engines.embedded.jobs import Job
from rollout.engines.embedded.versions import Versions

CHECKPOINT = load_checkpoint()
CONTROLS = (CHECKPOINT.fork_token_id or 0, CHECKPOINT.header_token_id or 0)
DRAWN_COUNT = 4


class CountingModel(Model):
    """The model, counting the tokens that were prefilled."""

    prefilled_count = 0

    def step(self, chunks: Sequence[Chunk]) -> list[list[float] | None]:
        self.prefilled_count += sum(len(chunk.token_ids) for chunk in chunks)
        return super().step(chunks)


@pytest.fixture(scope="module")
def model() -> Iterator[CountingModel]:
    model = CountingModel(CHECKPOINT)
    yield model
    model.close()


def contexts(source: random.Random) -> list[tuple[int, ...]]:
    """Branches of one tree, with control tokens at odd places, in any order; some of them twice."""
    branches: list[tuple[int, ...]] = [(0,)]
    for _ in range(10):
        length = source.choice((1, 2, 30, 33, 70))
        run = [source.choice((*CONTROLS, 5, 6)) if source.random() < 0.1 else source.randrange(4000)]
        run += [source.randrange(4000) for _ in range(length - 1)]
        branches.append((*source.choice(branches), *run))
    wanted = branches[1:] + source.choices(branches[1:], k=4)
    source.shuffle(wanted)
    return wanted


def job(token_ids: tuple[int, ...], session: str) -> Job:
    sampling = Sampling(temperature=1.5, seed=1)
    return Job(
        SampleRequest(
            session=session,
            token_ids=token_ids,
            sampling=sampling,
            stream_key=2,
            tokens_count_max=DRAWN_COUNT,
            stop_ids=frozenset(),
        )
    )


def drawn(versions: Versions, jobs: Sequence[Job], source: random.Random) -> list[list[Drawn]]:
    """What each job drew; they come one by one or together, and some of their sessions end."""
    told: dict[Job, list[Drawn]] = {each: [] for each in jobs}
    coming = list(jobs)
    while coming or not versions.stands:
        for _ in range(source.choice((0, 0, 1, 3))):
            if coming:
                versions.add(coming.pop())
        for outcome in versions.turn():
            assert isinstance(outcome.job, Job)
            told[outcome.job] += outcome.drawn
            if outcome.finish and source.random() < 0.5:
                versions.release(outcome.job.request.session)
        assert versions.retained.bytes_held <= versions.limits.state_bytes_max
    return [told[each] for each in jobs]


@cache
def alone(seed: int) -> tuple[list[list[Drawn]], int]:
    """What each context draws by itself, and how many tokens that prefills."""
    model = CountingModel(CHECKPOINT)
    found = []
    for token_ids in contexts(random.Random(seed)):
        versions = Versions(model, Limits(state_bytes_max=0))
        found += drawn(versions, [job(token_ids, "s")], random.Random(0))
        versions.newest.close()
    model.close()
    return found, model.prefilled_count


@pytest.mark.parametrize("state_bytes_max", [250_000, 64 << 20])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_reused_changes_no_bit(model: CountingModel, seed: int, state_bytes_max: int) -> None:
    expected, computed_count = alone(seed)
    source = random.Random(seed)
    jobs = [job(token_ids, f"s{number}") for number, token_ids in enumerate(contexts(source))]
    limits = Limits(state_bytes_max=state_bytes_max, running_max=source.choice((2, 5, 32)), prefill_tokens_max=24)
    versions = Versions(model, limits)
    model.prefilled_count = 0
    assert drawn(versions, jobs, source) == expected
    assert model.prefilled_count <= computed_count
    versions.newest.close()
