"""Any config of the bounds: the engine computes what transformers does, and its own laws hold bit for bit.

Shapes, mixes of layers and rotary types are drawn at random from fixed seeds; in all of them the window wraps, entries
of both kinds appear and the indexer has to choose.  Both sides round, in different orders: logits differ by a few
millionths of the largest, and greedy tokens are equal.
"""

import random
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from rollout.engine import Sampling
from rollout.engines.embedded.binding import Chunk, Model, State, Stream
from rollout.engines.embedded.checkpoint import load_checkpoint
from tests.conformance.v4_models import CSA, HCA, VOCAB_COUNT, break_ties_by_age, make_model, random_config, save

pytestmark = pytest.mark.filterwarnings("default")  # the oracle's own deprecations are not ours

TOKENS_COUNT = 120
DRAWN_COUNT = 12
DIFFERENCE_MAX = 2e-5
"""Of logits, as a part of the largest."""
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8, "beta_slow": 1}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
CASES: list[dict[str, object]] = [
    *({} for _ in range(8)),
    {"n_routed_experts": 300, "moe_intermediate_size": 16},
    {"compress_rates": {CSA: 64, HCA: 1}, "sliding_window": 3},
    {"rope_parameters": {"type": "yarn", **YARN}},
    {
        "head_dim": 32,
        "num_attention_heads": 4,
        "index_head_dim": 16,
        "rope_parameters": {
            "main": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 1.0},
            "compress": {"rope_type": "yarn", **YARN, "rope_theta": 9000.0, "partial_rotary_factor": 0.25},
        },
    },
    {
        "head_dim": 16,
        "num_attention_heads": 4,
        "index_head_dim": 16,
        "rope_parameters": {
            "main": {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
            "compress": {"rope_type": "llama3", **LLAMA3, "rope_theta": 9000.0, "partial_rotary_factor": 1.0},
        },
    },
]


@pytest.fixture(params=range(len(CASES)))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[DeepseekV4ForCausalLM, Path, list[int]]:
    """A model, its checkpoint and a context."""
    seed = request.param
    source = random.Random(seed)
    oracle = make_model(random_config(source, **CASES[seed]), seed)
    break_ties_by_age(oracle)
    folder = save(oracle, tmp_path / "checkpoint", as_transformers=seed % 2 == 0)
    return oracle, folder, [source.randrange(VOCAB_COUNT) for _ in range(TOKENS_COUNT)]


def fed(model: Model, token_ids: list[int], sizes: list[int]) -> tuple[bytes, dict[int, list[float]]]:
    """The packed state after all ids, and the logits at the end of each chunk."""
    state, logits, begin = State(model), dict[int, list[float]](), 0
    for size in sizes:
        (told,) = model.step([Chunk(state, token_ids[begin : begin + size], wants_logits=True)])
        begin += size
        assert told is not None
        logits[begin - 1] = told
    assert begin == len(token_ids)
    packed = bytes(state.pack())
    state.close()
    return packed, logits


def drawn(model: Model, token_ids: list[int], others: int) -> list[int]:
    """Greedy tokens after a context, decoded together with other sequences."""
    states = [State(model) for _ in range(1 + others)]
    for index, state in enumerate(states):
        model.step([Chunk(state, token_ids[:-1] if index == 0 else token_ids[: 1 + index])])
    streams = [Stream(state, token_ids[-1], Sampling(), 0, (), DRAWN_COUNT) for state in states]
    tokens = [token.token_id for token in model.decode(streams)[0]]
    for state in states:
        state.close()
    return tokens


def test_logits_and_greedy_tokens_are_those_of_transformers_and_the_laws_hold(
    case: tuple[DeepseekV4ForCausalLM, Path, list[int]],
) -> None:
    oracle, folder, context = case
    model, source = Model(load_checkpoint(folder)), random.Random(1)
    greedy = drawn(model, context, 0)
    assert drawn(model, context, 5) == greedy, "neighbours do not matter"
    token_ids = [*context, *greedy]
    with torch.no_grad():
        expected = oracle(torch.tensor([token_ids]), use_cache=False).logits[0]
    packed, logits = fed(model, token_ids, [1] * len(token_ids))
    difference = (torch.tensor(list(logits.values())) - expected).abs().max() / expected.abs().max()
    assert difference < DIFFERENCE_MAX
    assert expected[len(context) - 1 : -1].argmax(dim=-1).tolist() == greedy
    for _ in range(3):
        sizes, left = list[int](), len(token_ids)
        while left:
            sizes.append(source.randint(1, min(left, 60)))
            left -= sizes[-1]
        chunked, told = fed(model, token_ids, sizes)
        assert chunked == packed
        assert told == {position: logits[position] for position in told}
    model.close()


def test_the_logits_are_the_heads_product_with_the_hidden_states_of_a_score(
    case: tuple[DeepseekV4ForCausalLM, Path, list[int]],
) -> None:
    """As near as a hidden state that was rounded to bf16 (8 bits) allows, and it is the oracle's, rounded so."""
    oracle, folder, context = case
    model = Model(load_checkpoint(folder))
    state = State(model)
    rows = model.score(state, context, wants_hidden=True)
    hidden = torch.frombuffer(bytearray(b"".join(row.hidden for row in rows)), dtype=torch.bfloat16).double()
    hidden = hidden.reshape(len(context) - 1, -1)
    with torch.no_grad():
        expected = oracle.model(torch.tensor([context[:-1]]), use_cache=False).last_hidden_state[0].double()
    head = oracle.lm_head.weight.detach().double()
    _, logits = fed(model, context[:-1], [1] * (len(context) - 1))
    bound = 2**-8 * hidden.abs() @ head.abs().T + 1e-4
    assert ((torch.tensor(list(logits.values())) - hidden @ head.T).abs() <= bound).all()
    assert ((hidden - expected).abs() <= 2**-8 * expected.abs() + 1e-4 * expected.abs().max()).all()
    logprobs = torch.log_softmax(torch.tensor(list(logits.values()), dtype=torch.float64), dim=-1)
    told = torch.tensor([row.logprob for row in rows], dtype=torch.float64)
    assert torch.allclose(told, logprobs.gather(1, torch.tensor(context[1:])[:, None])[:, 0], atol=1e-5)
    state.close()
    model.close()
