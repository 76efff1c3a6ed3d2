"""OpenAI's own Python client (PyPI openai), unmodified, against the service: what it reads, retries and raises."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rollout.engine import Sampled, SampleRequest
from rollout.errors import EngineError
from rollout.main import load_tokenizer
from rollout.testing import Reply, ScriptedEngine, reply_ids

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENIZER = load_tokenizer()
REPLIES = [
    Reply("I look at both.", "Two files?", [("bash", {"command": "cat a"}), ("bash", {"command": "cat b"})]),
    Reply("b is wrong.", "", [("bash", {"command": "echo 2 > b"})]),
    Reply("It is done.", "Changed é in b."),
]
TOOL = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run a command",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}
Connect = Callable[..., Any]


class FailingEngine(ScriptedEngine):
    """Fails after `tokens_count` tokens, as often as it is told to."""

    failures_count = 0
    tokens_count = 3

    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        count = 0
        async for chunk in super().sample(request):
            if self.failures_count and count >= self.tokens_count:
                self.failures_count -= 1
                raise EngineError("the GPU is on fire")
            count += len(chunk.token_ids)
            yield chunk


@pytest.fixture
def engine() -> FailingEngine:
    return FailingEngine(TOKENIZER, lambda _session, turn: REPLIES[turn], chunk_tokens_count=2)


@pytest.fixture
def client(serve: Any, engine: FailingEngine) -> Iterator[Any]:
    with connect(serve, engine) as (client, _):
        yield client


@contextmanager
def connect(serve: Any, engine: FailingEngine, token: str = "", **options: Any) -> Iterator[tuple[Any, Any]]:
    import openai

    with serve(engine, token) as served:
        options = {"api_key": token or "none", "max_retries": 0, **options}
        with openai.OpenAI(base_url=f"{served.url}/v1", **options) as client:
            yield client, served


def test_a_conversation_with_tools_goes_on_over_the_very_tokens_that_were_sampled(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["scripted"]
    messages: list[Any] = [{"role": "user", "content": "Make b as large as it should be."}]
    context: list[int] = []
    for reply in REPLIES:
        said = client.chat.completions.create(
            model="scripted", messages=messages, tools=[TOOL], extra_body={"return_token_ids": True}, logprobs=True
        )
        choice = said.choices[0]
        message = choice.message
        assert (message.content or "", message.reasoning_content or "") == (reply.content, reply.reasoning)
        calls = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls or ()]
        assert calls == list(reply.calls)
        assert choice.finish_reason == ("tool_calls" if reply.calls else "stop")
        assert choice.token_ids == list(reply_ids(reply, TOKENIZER))
        assert [each.logprob for each in choice.logprobs.content] == [-0.5] * said.usage.completion_tokens
        assert choice.prompt_token_ids[: len(context)] == context
        context = choice.prompt_token_ids + choice.token_ids
        messages.append(choice.message.model_dump(exclude_none=True))
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": f"<{json.loads(call.function.arguments)['command']}>"}
            for call in choice.message.tool_calls or ()
        ]
        messages += reversed(results)  # a parallel harness answers in any order
    text = TOKENIZER.decode(context)
    assert text.index("<cat a>") < text.index("<cat b>") < text.index("<echo 2 > b>")


def test_a_stream_is_put_together_by_the_clients_own_helper(client: Any) -> None:
    messages = [{"role": "user", "content": "Look."}]
    said = client.chat.completions.create(
        model="scripted", messages=messages, tools=[TOOL], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(said)
    thought = "".join(getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks if c.choices)
    assert thought == REPLIES[0].reasoning
    assert chunks[-1].usage.completion_tokens == len(reply_ids(REPLIES[0], TOKENIZER))
    with client.chat.completions.stream(model="scripted", messages=messages, tools=[TOOL]) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert message.content == REPLIES[0].content
    told = [json.loads(call.function.arguments) for call in message.tool_calls]
    assert told == [arguments for _, arguments in REPLIES[0].calls]
    assert kinds.count("tool_calls.function.arguments.done") == 2


def test_completions_speak_token_ids(client: Any) -> None:
    prompt = [0, TOKENIZER.control("<｜User｜>"), 5, TOKENIZER.control("<｜Assistant｜>"), TOKENIZER.control("<think>")]
    said = client.completions.create(
        model="scripted", prompt=prompt, max_tokens=9, n=2, logprobs=1, extra_body={"return_token_ids": True}
    )
    for choice in said.choices:
        assert (choice.prompt_token_ids, choice.token_ids) == (prompt, list(reply_ids(REPLIES[0], TOKENIZER)[:9]))
        assert choice.text == TOKENIZER.decode(choice.token_ids)
        assert len(choice.logprobs.token_logprobs) == 9
        assert choice.finish_reason == "length"


def test_errors_are_those_that_the_client_knows(serve: Any, engine: FailingEngine) -> None:
    import openai

    ask = {"model": "scripted", "messages": [{"role": "user", "content": "x"}]}
    with connect(serve, engine, token="secret") as (client, _):
        create = client.chat.completions.create
        for error, wrong, said in (
            (openai.BadRequestError, {"temperature": 99}, "temperature is 99.0"),
            (openai.BadRequestError, {"stop": ["x"]}, "stop: not supported"),
            (openai.BadRequestError, {"messages": [{"role": "tool", "content": "x"}]}, "no call before it"),
            (openai.NotFoundError, {"model": "gpt-9"}, "this service has 'scripted'"),
        ):
            for stream in (False, True):
                with pytest.raises(error, match=said) as caught:
                    create(**{**ask, **wrong}, stream=stream)
                assert caught.value.type == "invalid_request_error"
        with pytest.raises(openai.AuthenticationError, match="give the service's token"):
            client.with_options(api_key="wrong").models.list()
        create(**ask, extra_body={"request_id": "mine"})
        with pytest.raises(openai.ConflictError, match="submitted before with other contents"):
            create(**ask, seed=1, extra_body={"request_id": "mine"})
        engine.failures_count = 2
        with pytest.raises(openai.InternalServerError, match="on fire") as caught:
            create(**ask)
        assert caught.value.status_code == 503
        stream = create(**ask, stream=True)
        with pytest.raises(openai.APIError, match="on fire"):
            list(stream)


def test_its_retry_under_a_name_goes_on_where_the_failure_was(serve: Any, engine: FailingEngine) -> None:
    engine.failures_count = 2
    with connect(serve, engine, max_retries=3) as (client, served):
        said = client.chat.completions.create(
            model="scripted",
            messages=[{"role": "user", "content": "Look."}],
            extra_body={"request_id": "mine", "return_token_ids": True},
        )
        (state,) = served.service.ledger.rollouts.values()
    assert said.choices[0].token_ids == list(reply_ids(REPLIES[0], TOKENIZER))
    assert (state.attempt, sum(served.service.ledger.tokens_regenerated.values())) == (3, 0)
