"""States of the embedded engine: the same bits however a context came to be."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.engine import Sampling
from rollout.engines.embedded.binding import BATCH_TOKENS_MAX, Chunk, Drawn, Model, State, Stream
from rollout.engines.embedded.checkpoint import load_checkpoint
from rollout.errors import EngineError

PROMPTS = [p["token_ids"] for p in json.loads((Path(__file__).parents[2] / "golden/embedded_prompts.json").read_text())]
LONG = (PROMPTS[1] + PROMPTS[2])[:700]  # past the window of 512
WARM = Sampling(temperature=1.5, top_p=0.95, seed=11)
VAGUE = [0, 17, 900]  # a context after which no token is likely


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    model = Model(load_checkpoint())
    yield model
    model.close()


def feed(model: Model, state: State, token_ids: list[int], cuts: Iterator[int]) -> list[float]:
    """Append ids in chunks that end at the cuts; the last token's logits."""
    begin, logits = state.position, None
    base = begin
    while begin - base < len(token_ids):
        end = min(begin - base + next(cuts), len(token_ids))
        (logits,) = model.step([Chunk(state, token_ids[begin - base : end], wants_logits=True)])
        begin = base + end
    assert logits is not None
    return logits


def full(model: Model, token_ids: list[int]) -> tuple[State, list[float]]:
    state = State(model)
    return state, feed(model, state, token_ids, iter(lambda: BATCH_TOKENS_MAX, None))


def continuation(model: Model, state: State, token_id: int, count: int, sampling: Sampling = WARM) -> list[Drawn]:
    return model.decode([Stream(state, token_id, sampling, 5, (), count)])[0]


def test_a_prefill_in_any_chunks_equals_token_by_token(model: Model) -> None:
    single, chunked, source = State(model), State(model), random.Random(3)
    logits = feed(model, single, LONG, iter(lambda: 1, None))
    assert feed(model, chunked, LONG, iter(lambda: source.randint(1, BATCH_TOKENS_MAX), None)) == logits
    assert single.pack() == chunked.pack()


def test_a_sequence_does_not_notice_its_batch(model: Model) -> None:
    contexts = [PROMPTS[0], PROMPTS[1][:90], PROMPTS[2] + PROMPTS[3], PROMPTS[3][:1], PROMPTS[1]]
    alone = []
    for token_ids in contexts:
        state, logits = full(model, token_ids)
        alone.append((logits, continuation(model, state, token_ids[-1], 12)))
    together = [State(model) for _ in contexts]
    begins = [0] * len(contexts)
    last: list[list[float] | None] = [None] * len(contexts)
    while any(begin < len(ids) for begin, ids in zip(begins, contexts, strict=True)):
        rows = [i for i, ids in enumerate(contexts) if begins[i] < len(ids)]
        chunks = [Chunk(together[i], contexts[i][begins[i] : begins[i] + 17 + i], wants_logits=True) for i in rows]
        for i, chunk, logits in zip(rows, chunks, model.step(chunks), strict=True):
            begins[i] += len(chunk.token_ids)
            last[i] = logits
    drawn = model.decode([Stream(s, ids[-1], WARM, 5, (), 12) for s, ids in zip(together, contexts, strict=True)])
    assert list(zip(last, drawn, strict=True)) == alone


def test_a_fork_continues_as_its_parent_and_leaves_it_alone(model: Model) -> None:
    parent, _ = full(model, PROMPTS[0])
    kept = parent.pack()
    child = State(model)
    child.unpack(kept)
    other = continuation(model, child, 17, 20, Sampling(temperature=2.0, seed=1))
    assert parent.pack() == kept
    child.unpack(kept)
    assert continuation(model, child, 5, 20) == continuation(model, parent, 5, 20) != other


def test_a_context_rebuilt_from_its_tokens_equals_the_lost_one(model: Model) -> None:
    state, _ = full(model, LONG[:-1])
    drawn = [token.token_id for token in continuation(model, state, LONG[-1], 150)]
    rebuilt, _ = full(model, LONG + drawn[:-1])
    assert rebuilt.pack() == state.pack()


def test_continuing_after_any_number_of_sampled_tokens_yields_the_rest_unchanged(model: Model) -> None:
    state, _ = full(model, VAGUE[:-1])
    forked = State(model)
    forked.unpack(state.pack())
    whole = continuation(model, state, VAGUE[-1], 24)
    assert whole != continuation(model, forked, VAGUE[-1], 24, Sampling()), "this must be about sampled tokens"
    for cut in range(1, 24):
        context = VAGUE + [token.token_id for token in whole[:cut]]
        state, _ = full(model, context[:-1])
        assert continuation(model, state, context[-1], 24 - cut) == whole[cut:]


def test_decoding_ends_with_the_round_in_which_a_stop_was_drawn(model: Model) -> None:
    first, second = State(model), State(model)
    greedy = continuation(model, first, 0, 6, Sampling())
    stop = greedy[3].token_id
    expected = next(i for i, token in enumerate(greedy) if token.token_id == stop) + 1
    assert model.decode([Stream(second, 0, Sampling(), 5, (stop,), 6)])[0] == greedy[:expected]


def test_a_packed_state_grows_by_the_token_until_the_window_is_full(model: Model) -> None:
    sizes = []
    for count in (100, 356, 512, 640):
        state, _ = full(model, LONG[:count])
        sizes.append(len(state.pack()))
    assert 1536 < (sizes[1] - sizes[0]) / 256 < 1700
    assert (sizes[3] - sizes[2]) / 128 < 150


@pytest.mark.parametrize("damage", ["cut", "extended", "magic", "position", "shape", "empty"])
def test_a_damaged_packed_state_is_refused_and_changes_nothing(model: Model, damage: str) -> None:
    state, _ = full(model, PROMPTS[0][:40])
    packed, before = state.pack(), state.pack()
    if damage == "cut":
        packed = packed[:-1]
    elif damage == "extended":
        packed += b"\0\0\0\0"
    elif damage == "empty":
        packed = bytearray()
    else:
        packed[{"magic": 0, "position": 4, "shape": 12}[damage]] ^= 1
    with pytest.raises(EngineError, match="not a packed state of this model"):
        state.unpack(packed)
    assert state.pack() == before


def test_what_the_kernels_trust_is_checked_before_they_are_called(model: Model) -> None:
    state = State(model)
    for token_ids in ([], [-1], [model.dimensions.vocab_count]):
        with pytest.raises(EngineError, match="token ids must be"):
            model.step([Chunk(state, token_ids)])
    with pytest.raises(EngineError, match="a batch is"):
        model.step([Chunk(state, [1]), Chunk(state, [2])])
    with pytest.raises(EngineError, match="a batch is"):
        model.step([Chunk(state, [1] * (BATCH_TOKENS_MAX + 1))])
    with pytest.raises(EngineError, match="a context holds at most"):
        model.decode([Stream(state, 1, WARM, 0, (), model.dimensions.context_tokens_max + 1)])
    assert state.position == 0
