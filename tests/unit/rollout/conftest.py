"""Values that the rollout tests share."""

from pathlib import Path

import pytest

import rollout
from rollout import context
from rollout.engine import EngineInfo, Sampling
from rollout.events import Group, Job, Limits, RolloutOpened
from rollout.machine import State, start
from toolcall_dsl import Tokenizer

CHECKPOINT = Path(rollout.__file__).parent / "engines/embedded/checkpoint"
INFO = EngineInfo(name="scripted", build="1", weights_digest="0" * 64, vocab_count=4096, context_tokens_max=4096)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(CHECKPOINT / "tokenizer.json")


def a_job(agent: str = "model", limits: Limits | None = None, size: int = 1) -> Job:
    group = Group(group_id="run/t", task="t", task_digest="d", size=size)
    return Job(request_id="run", groups=(group,), agent=agent, sampling=Sampling(seed=3), limits=limits or Limits())


def opened_state(tokenizer: Tokenizer, job: Job, instruction: str = "Remove the file a.txt.") -> State:
    prompt = context.prompt(instruction, tokenizer, job.thinking)
    return start(job, RolloutOpened("run/t.0", "run", "run/t", 0, prompt, tokenizer.digest, INFO))
