"""TRL's GRPOTrainer (PyPI trl), unmodified: two steps of training whose rollouts are sampled by the service.

The trainee is a random transformer of a few thousand parameters over our vocabulary, made on the spot; the policy that
samples is the embedded checkpoint.  What is shown is the way of the tokens: ids and logprobs arrive as they were drawn.
"""

from __future__ import annotations

import json
import math
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.engines.embedded.engine import EmbeddedEngine

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["Append the line", "Count the words of", "Sort the file", "Move a.txt to"]
STEPS, GENERATIONS, TOKENS = 2, 4, 12


class Rollouts:
    """TRL's `rollout_func`: a request for the prompts of a step, under an id that a restarted trainer asks again."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seen: list[dict[str, Any]] = []

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        """The prompts come as often as there are generations of each."""
        body = {
            "request_id": f"train-{trainer.state.global_step}",
            "prompt": prompts,
            "max_tokens": trainer.args.max_completion_length,
            "temperature": trainer.args.temperature,
            "return_token_ids": True,
            "logprobs": 0,
        }
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as response:
            choices = json.load(response)["choices"]
        self.seen += choices
        return {
            "prompt_ids": [choice["prompt_token_ids"] for choice in choices],
            "completion_ids": [choice["token_ids"] for choice in choices],
            "logprobs": [choice["logprobs"]["token_logprobs"] for choice in choices],
        }


def tiny_model(vocab_count: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_count, max_position_embeddings=128, **shape))


def test_two_steps_of_grpo_train_on_what_the_service_sampled(serve: Any, tmp_path: Path) -> None:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(DEFAULT_CHECKPOINT / "tokenizer.json"),
        eos_token="<｜end▁of▁sentence｜>",
        pad_token="<｜end▁of▁sentence｜>",
    )
    model = tiny_model(len(tokenizer))
    before = {name: value.clone() for name, value in model.named_parameters()}
    config = GRPOConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=GENERATIONS,
        num_generations=GENERATIONS,
        max_completion_length=TOKENS,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    told: list[list[list[int]]] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        told.append(completion_ids)
        return [float(sum(ids) % 97) for ids in completion_ids]

    engine = EmbeddedEngine()
    with serve(engine) as served:
        rollouts = Rollouts(served.url)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
            rollout_func=rollouts,
        )
        trainer.train()
        states = list(served.service.ledger.rollouts.values())
        scored = [served.ask(engine.score(state.token_ids)) for state in states]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    changed = [name for name, value in model.named_parameters() if not torch.equal(before[name], value)]
    assert changed == list(before)
    assert len(rollouts.seen) == len(states) == STEPS * GENERATIONS
    assert [ids for step in told for ids in step] == [choice["token_ids"] for choice in rollouts.seen]
    for choice, state, score in zip(rollouts.seen, states, scored, strict=True):
        assert choice["prompt_token_ids"] + choice["token_ids"] == list(state.token_ids)
        drawn = choice["logprobs"]["token_logprobs"]
        assert drawn == list(score.logprobs[-len(drawn) :])  # as they are drawn so they are scored, bit for bit
    assert len({tuple(choice["token_ids"]) for choice in rollouts.seen}) > STEPS
