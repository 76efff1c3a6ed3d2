"""The embedded engine's bits: the same for every batch, every chunk size and every number of threads."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.engine import Sampling
from rollout.engines.embedded.binding import BATCH_TOKENS_MAX, Chunk, Drawn, Model, State, Stream
from rollout.engines.embedded.checkpoint import load_checkpoint

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/embedded_prompts.json").read_text())
TEXT = [token_id for prompt in GOLDEN for token_id in prompt["token_ids"]]
LENGTHS = (1, 5, 130, 511, 640, 1100, 2, 3, 20, 64, 127, 128, 129)
"""The window holds 512 tokens, its ring 639.  Enough for two or three threads to have some to themselves in a draw."""
ROUNDS = 12


def sequence(number: int) -> list[int]:
    return TEXT[7 * number :][: LENGTHS[number]]


def streams_of(states: dict[int, State]) -> list[Stream]:
    hows = [Sampling(), Sampling(temperature=1.0, seed=5), Sampling(temperature=0.8, top_p=0.9, top_k=40, seed=6)]
    return [
        Stream(state, 17 + i, hows[i % 3], i, (), ROUNDS - i % 4, top_count=i % 2, wants_hidden=True)
        for i, state in states.items()
    ]


@pytest.fixture(scope="module")
def expected() -> Iterator[dict[int, tuple[list[float], bytes, list[Drawn]]]]:
    """Of each sequence by itself, on one thread: its last logits, its packed state, and what it draws then."""
    model = Model(load_checkpoint())
    told = {}
    for number in range(len(LENGTHS)):
        state, token_ids = State(model), sequence(number)
        for begin in range(0, len(token_ids), BATCH_TOKENS_MAX):
            (logits,) = model.step([Chunk(state, token_ids[begin : begin + BATCH_TOKENS_MAX], wants_logits=True)])
        packed = bytes(state.pack())
        (drawn,) = model.decode(streams_of({number: state}))
        told[number] = (logits or [], packed, drawn)
        state.close()
    yield told
    model.close()


def feed_at_random(model: Model, states: dict[int, State], source: random.Random) -> dict[int, list[float]]:
    """All sequences, in random batches of chunks of random sizes; the last logits of each."""
    done, last = dict.fromkeys(states, 0), {}
    while waiting := [i for i in states if done[i] < LENGTHS[i]]:
        room, chunks = BATCH_TOKENS_MAX, {}
        for i in source.sample(waiting, source.randint(1, len(waiting))):
            count = min(source.choice((1, 2, 7, 33, BATCH_TOKENS_MAX)), room, LENGTHS[i] - done[i])
            if count:
                chunks[i] = Chunk(states[i], sequence(i)[done[i] : done[i] + count], wants_logits=True)
                done[i] += count
                room -= count
        for i, logits in zip(chunks, model.step(list(chunks.values())), strict=True):
            last[i] = logits or []
    return last


@pytest.mark.parametrize("threads_count", [1, 2, 3, 7])
def test_bits_do_not_depend_on_batches_chunks_or_threads(
    expected: dict[int, tuple[list[float], bytes, list[Drawn]]], threads_count: int
) -> None:
    model = Model(load_checkpoint(), threads_count)
    for seed in range(3):
        states = {i: State(model) for i in range(len(LENGTHS))}
        last = feed_at_random(model, states, random.Random(seed))
        packed = {i: bytes(state.pack()) for i, state in states.items()}
        drawn = dict(zip(states, model.decode(streams_of(states)), strict=True))
        for i, state in states.items():
            assert (last[i], packed[i], drawn[i]) == expected[i], f"sequence {i} of seed {seed}"
            state.close()
    model.close()


def test_a_closed_model_leaves_no_thread() -> None:
    before = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        model = Model(load_checkpoint(), 5)
        assert len(os.listdir("/proc/self/task")) == before + 4
        model.close()
        assert len(os.listdir("/proc/self/task")) == before
