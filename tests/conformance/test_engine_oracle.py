"""The embedded engine computes what transformers' DeepseekV4ForCausalLM computes.

The oracle runs in float32 with its weights upcast from bf16, as the engine does.  Both round, in
different orders: logits of size 10 differ by a few 1e-5 at most, and greedy tokens are equal.
"""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from rollout.engine import Sampling
from rollout.engines.embedded.binding import BATCH_TOKENS_MAX, Chunk, Model, State, Stream
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT, load_checkpoint

pytestmark = pytest.mark.filterwarnings("default")  # the oracle's own deprecations are not ours

PROMPTS = json.loads((Path(__file__).parents[1] / "golden/embedded_prompts.json").read_text())
LOGITS_DIFFERENCE_MAX = 5e-5
EOS_ID = 1


def load_oracle(folder: Path) -> DeepseekV4ForCausalLM:
    torch.set_num_threads(1)
    return DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def oracle() -> DeepseekV4ForCausalLM:
    return load_oracle(DEFAULT_CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    model = Model(load_checkpoint())
    yield model
    model.close()


def logits_at(model: Model, token_ids: list[int], positions: set[int]) -> dict[int, torch.Tensor]:
    """Logits after each of `positions`, with chunks that end there or are full."""
    state, found, begin = State(model), {}, 0
    while begin < len(token_ids):
        end = next((p + 1 for p in range(begin, begin + BATCH_TOKENS_MAX) if p in positions), begin + BATCH_TOKENS_MAX)
        end = min(end, len(token_ids))
        (logits,) = model.step([Chunk(state, token_ids[begin:end], wants_logits=True)])
        if end - 1 in positions:
            found[end - 1] = torch.tensor(logits)
        begin = end
    state.close()
    return found


def assert_agree(model: Model, oracle: DeepseekV4ForCausalLM, token_ids: list[int], positions: set[int]) -> None:
    with torch.no_grad():
        expected = oracle(torch.tensor([token_ids]), use_cache=False).logits[0]
    for position, logits in logits_at(model, token_ids, positions).items():
        difference = (logits - expected[position]).abs().max().item()
        assert difference < LOGITS_DIFFERENCE_MAX, f"position {position}: {difference}"


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt["family"])
def test_logits_agree_along_a_real_prompt(model: Model, oracle: DeepseekV4ForCausalLM, prompt: dict) -> None:
    count = len(prompt["token_ids"])
    assert_agree(model, oracle, prompt["token_ids"], {0, 1, 3, 4, 127, 128, 255, 256, count - 2, count - 1})


def test_logits_agree_where_the_window_has_wrapped_and_to_the_end_of_the_context(
    model: Model, oracle: DeepseekV4ForCausalLM
) -> None:
    text = [token_id for prompt in PROMPTS for token_id in prompt["token_ids"]]
    token_ids = (text + text)[: model.dimensions.context_tokens_max]
    assert_agree(model, oracle, token_ids, {510, 511, 512, 513, 639, 640, 1023, 1279, 1500, 2046, 2047})


def test_logits_agree_on_random_tokens(model: Model, oracle: DeepseekV4ForCausalLM) -> None:
    source = random.Random(0)
    token_ids = [source.randrange(model.dimensions.vocab_count) for _ in range(700)]
    assert_agree(model, oracle, token_ids, set(range(0, 700, 69)))


def break_ties_by_age(oracle: DeepseekV4ForCausalLM) -> None:
    """Scores of exactly 0 are common (a ReLU) and torch.topk picks any of them: here the older wins, as in the engine.

    1e-12 an entry is far below the last bit of every other score.
    """
    for name, module in oracle.named_modules():
        if name.endswith("indexer.scorer"):
            module.register_forward_hook(lambda _, __, scores: scores - 1e-12 * torch.arange(scores.shape[-1]))


def test_logits_agree_when_the_indexer_has_to_choose(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(DEFAULT_CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"index_topk": 24}))
    model, token_ids = Model(load_checkpoint(folder)), PROMPTS[1]["token_ids"]
    with torch.no_grad():
        unrestricted = load_oracle(DEFAULT_CHECKPOINT)(torch.tensor([token_ids]), use_cache=False).logits[0, -1]
    (last,) = logits_at(model, token_ids, {len(token_ids) - 1}).values()
    assert (last - unrestricted).abs().max() > 100 * LOGITS_DIFFERENCE_MAX, "the choice must matter here"
    oracle = load_oracle(folder)
    break_ties_by_age(oracle)
    assert_agree(model, oracle, token_ids, {95, 96, 99, 100, 200, 300, len(token_ids) - 1})
    model.close()


@pytest.mark.parametrize("prompt", PROMPTS[:3], ids=lambda prompt: prompt["family"])
def test_greedy_tokens_equal_those_of_generate(model: Model, oracle: DeepseekV4ForCausalLM, prompt: dict) -> None:
    token_ids, tokens_count = prompt["token_ids"], 48
    with torch.no_grad():
        expected = oracle.generate(
            torch.tensor([token_ids]), max_new_tokens=tokens_count, do_sample=False, eos_token_id=EOS_ID, pad_token_id=2
        )[0, len(token_ids) :].tolist()
    state = State(model)
    for begin in range(0, len(token_ids) - 1, BATCH_TOKENS_MAX):
        model.step([Chunk(state, token_ids[begin : min(begin + BATCH_TOKENS_MAX, len(token_ids) - 1)])])
    (drawn,) = model.decode([Stream(state, token_ids[-1], Sampling(), 0, (EOS_ID,), tokens_count)])
    assert [token.token_id for token in drawn] == expected
    state.close()


@pytest.mark.parametrize("prompt", PROMPTS[:3], ids=lambda prompt: prompt["family"])
def test_experts_and_hidden_states_are_those_of_the_oracle(
    model: Model, oracle: DeepseekV4ForCausalLM, prompt: dict
) -> None:
    token_ids, routing = prompt["token_ids"], model.routing
    state, routes = State(model), bytearray()
    for begin in range(0, len(token_ids) - 1, BATCH_TOKENS_MAX):
        ids = token_ids[begin : min(begin + BATCH_TOKENS_MAX, len(token_ids) - 1)]
        chunk = Chunk(state, ids, routes=bytearray(len(ids) * routing.row_bytes))
        model.step([chunk])
        routes += chunk.routes
    stream = Stream(state, token_ids[-1], Sampling(), 0, (EOS_ID,), 8, wants_routes=True, wants_hidden=True)
    (drawn,) = model.decode([stream])
    state.close()
    routes += b"".join(token.routes for token in drawn)
    read = [*token_ids, *(token.token_id for token in drawn[:-1])]
    chosen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, told: chosen.append(told[2]))
        for layer in oracle.model.layers
    ]
    with torch.no_grad():
        hidden = oracle.model(torch.tensor([read]), use_cache=False).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    experts = torch.stack([indices.sort(dim=-1).values for indices in chosen], dim=1)
    assert torch.equal(experts, torch.frombuffer(routes, dtype=torch.uint8).reshape(experts.shape).long())
    told = torch.frombuffer(bytearray(b"".join(token.hidden for token in drawn)), dtype=torch.bfloat16)
    expected = hidden[len(token_ids) - 1 :].to(torch.bfloat16).float()
    assert torch.allclose(told.reshape(len(drawn), -1).float(), expected, rtol=2**-7, atol=1e-4)
