"""The dialects of OpenAI and vLLM over HTTP: what they say, what they refuse, and that the log stands behind it."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

import wal
from rollout import journal
from rollout.dialects.http_guard import BODY_BYTES_MAX
from rollout.engine import Sampled, SampleRequest
from rollout.events import JobSubmitted, RolloutFinished, RolloutOpened, RolloutsAcknowledged
from rollout.main import load_tokenizer
from rollout.testing import Reply, ScriptedEngine, reply_ids
from wal.tokens import TokensAppended

TOKENIZER = load_tokenizer()
LS = Reply(
    reasoning="Look around.", content="I look.", calls=[("bash", {"command": "ls -l"}), ("bash", {"command": "cat é"})]
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "bash", "parameters": {"type": "object", "properties": {"command": {"type": "string"}}}},
    }
]
MESSAGES = [{"role": "user", "content": "What is here?"}]
CHAT: dict[str, Any] = {"messages": MESSAGES, "tools": TOOLS, "return_token_ids": True, "logprobs": True}


def model(reply: Reply = LS) -> ScriptedEngine:
    return ScriptedEngine(TOKENIZER, lambda _session, _turn: reply, chunk_tokens_count=3)


async def test_a_chat_answers_with_reasoning_text_and_calls_and_every_token_of_it(serving: Any) -> None:
    async with serving(model()) as (client, service):
        said = (await client.post("/v1/chat/completions", json={**CHAT, "request_id": "mine"})).json()
        (choice,) = said["choices"]
        message = choice["message"]
        assert (message["reasoning_content"], message["content"]) == ("Look around.", "I look.")
        calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message["tool_calls"]]
        assert calls == [("bash", {"command": "ls -l"}), ("bash", {"command": "cat é"})]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["token_ids"] == list(reply_ids(LS, TOKENIZER))
        assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) == said["usage"]["completion_tokens"]
        (state,) = service.ledger.rollouts.values()
        assert choice["prompt_token_ids"] + choice["token_ids"] == list(state.token_ids)


async def test_a_stream_says_the_same_as_the_whole_a_piece_at_a_time(serving: Any, events: Any) -> None:
    async with serving(model()) as (client, _):
        whole = (await client.post("/v1/chat/completions", json=CHAT)).json()
        chunks = await events(client, "/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}})
    assert chunks[-1]["usage"] == whole["usage"]
    deltas = [chunk["choices"][0] for chunk in chunks[:-1]]
    message = whole["choices"][0]["message"]
    for field in ("content", "reasoning_content"):
        assert "".join(each["delta"].get(field, "") for each in deltas) == message[field]
    calls: dict[int, dict[str, str]] = {}
    for call in (call for each in deltas for call in each["delta"].get("tool_calls", [])):
        known = calls.setdefault(call["index"], {"name": "", "arguments": ""})
        for name, text in call["function"].items():
            known[name] += text
    told = [(call["name"], json.loads(call["arguments"])) for call in calls.values()]
    assert told == [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]
    ]
    assert [token for each in deltas for token in each["token_ids"]] == whole["choices"][0]["token_ids"]
    assert [each["finish_reason"] for each in deltas][-1] == "tool_calls"
    assert len(deltas) > 5


async def test_what_is_answered_is_durable_and_the_same_id_gives_the_same_tokens_after_a_restart(
    serving: Any, events: Any, tmp_path: Path
) -> None:
    body = {"token_ids": [0, 5, 6], "sampling_params": {"max_tokens": 7, "logprobs": 1}, "request_id": "mine"}
    prompt = {**body, "token_ids": list(_header())}
    async with serving(model()) as (client, _):
        first = (await client.post("/inference/v1/generate", json=prompt)).json()
        logged = [value for _, value in journal.replay(tmp_path / "served/wal") if isinstance(value, TokensAppended)]
        assert [token for event in logged for token in event.token_ids] == first["choices"][0]["token_ids"]
    async with serving(model()) as (client, service):
        again = (await client.post("/inference/v1/generate", json=prompt)).json()
        streamed = await events(client, "/inference/v1/generate", prompt)
        assert service.engine.drawn_count == 0  # type: ignore[attr-defined]  # the double counts
        other = await client.post("/inference/v1/generate", json={**prompt, "token_ids": [0]})
    assert again == first
    assert first["choices"][0]["finish_reason"] == "length"
    assert first["choices"][0]["weight_versions"] == [{"start": 0, "length": 7, "version": 0}]
    ids = [token for chunk in streamed for token in chunk["choices"][0]["token_ids"]]
    assert ids == first["choices"][0]["token_ids"]
    assert (other.status_code, other.json()["error"]["code"]) == (409, "ALREADY_EXISTS")


def _header() -> tuple[int, ...]:
    """A prompt behind which the double knows where a turn begins."""
    return (0, TOKENIZER.control("<｜User｜>"), 5, TOKENIZER.control("<｜Assistant｜>"), TOKENIZER.control("<think>"))


async def test_completions_take_texts_and_ids_and_give_both_back(serving: Any, events: Any) -> None:
    async with serving(model()) as (client, _):
        ids = list(_header())
        body = {"prompt": [ids, ids], "n": 2, "max_tokens": 4, "return_token_ids": True, "logprobs": 1}
        said = (await client.post("/v1/completions", json=body)).json()
        assert [choice["index"] for choice in said["choices"]] == [0, 1, 2, 3]
        for choice in said["choices"]:
            assert choice["prompt_token_ids"] == ids
            assert choice["token_ids"] == list(reply_ids(LS, TOKENIZER)[:4])
            assert choice["text"] == TOKENIZER.decode(choice["token_ids"])
            assert len(choice["logprobs"]["tokens"]) == 4
        assert said["usage"] == {
            "prompt_tokens": 2 * len(ids),
            "completion_tokens": 16,
            "total_tokens": 2 * len(ids) + 16,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        chunks = await events(client, "/v1/completions", {"prompt": ids, "max_tokens": 100})
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == TOKENIZER.decode(reply_ids(LS, TOKENIZER)[:-1])
        assert "é" in text


async def test_a_call_that_was_cut_off_is_said_to_be_and_is_none(serving: Any) -> None:
    long = Reply(reasoning="x", calls=[("bash", {"command": "y " * 100})])
    async with serving(model(long)) as (client, _):
        body = {**CHAT, "max_tokens": 60}
        (choice,) = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
    assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("length", False)
    assert "ended inside a tool call" in choice["parse_error"]


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("/v1/chat/completions", {**CHAT, "stop": ["x"]}, 400, "stop: not supported"),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, 400, "response_format"),
    ("/v1/chat/completions", {**CHAT, "tool_choice": "required"}, 400, "tool_choice"),
    (
        "/v1/chat/completions",
        {**CHAT, "top_logprobs": 33},
        400,
        "top_logprobs: Input should be less than or equal to 32",
    ),
    ("/v1/chat/completions", {**CHAT, "messages": []}, 400, "messages: give at least one"),
    ("/inference/v1/generate", {"token_ids": [], "sampling_params": {}}, 400, "token_ids: give at least one"),
    ("/v1/chat/completions", {**CHAT, "top_logprobs": 2, "logprobs": False}, 400, "ask for logprobs"),
    ("/v1/chat/completions", {**CHAT, "model": "gpt-9"}, 404, "this service has 'scripted'"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "wizard", "content": "x"}]}, 400, "wizard"),
    (
        "/v1/chat/completions",
        {**CHAT, "messages": [{"role": "assistant", "content": "x"}]},
        400,
        "the last is of 'assistant'",
    ),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}, 400, "half a character"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 200_000}]}, 400, "200"),
    ("/v1/chat/completions", {**CHAT, "temperature": -1}, 400, "temperature is -1"),
    ("/v1/chat/completions", {**CHAT, "reasoning_effort": "foo"}, 400, "'foo' is none of none, minimal, low, medium,"),
    ("/v1/chat/completions", {**CHAT, "max_tokens": True}, 400, "max_tokens: true and false mean nothing here"),
    ("/v1/chat/completions", {**CHAT, "temperature": False}, 400, "temperature: true and false mean nothing here"),
    ("/v1/chat/completions", {**CHAT, "n": 5000}, 400, "group_size is 5000"),
    ("/v1/chat/completions", {**CHAT, "request_id": "a/b"}, 400, "request_id"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": [-1]}, 400, "32 bits"),
    ("/v1/completions", {"prompt": [1 << 31]}, 400, "ids must be 0 to"),
    ("/v1/completions", {"prompt": [0.5] * 100_000}, 400, "prompt"),
    ("/v1/completions", {"prompt": "x" * 1_000_000}, 400, "1000000 characters leaves no room"),
    ("/v1/nothing", {}, 404, "Not Found"),
    ("/v1/completions", {"prompt": "x", "echo": True}, 400, "echo"),
    ("/v1/completions", {"prompt": "x " * 5000}, 400, "leave no room"),
    ("/v1/completions", {"prompt": [0, True]}, 400, "prompt: give a text, token ids"),
    ("/inference/v1/generate", {"token_ids": [0, 5, True], "sampling_params": {}}, 400, "token_ids.2: Input should"),
    ("/inference/v1/generate", {"token_ids": [0], "sampling_params": {"n": True}}, 400, "sampling_params.n: true and"),
    ("/inference/v1/generate", {"token_ids": [0]}, 400, "sampling_params"),
    ("/inference/v1/generate", {"token_ids": [0], "sampling_params": {"min_tokens": 3}}, 400, "min_tokens"),
    ("/inference/v1/abort_requests", {"request_ids": ["x"] * 1025}, 400, "at most 1024 items"),
    ("/pause?mode=never", {}, 400, "must be keep, wait or abort"),
]


async def test_what_cannot_be_honoured_is_refused_by_name_before_anything_is_sampled(serving: Any) -> None:
    async with serving(model()) as (client, service):
        for path, body, status, said in REFUSED:
            for stream in ({}, {"stream": True}):
                content = json.dumps({**body, **stream})  # with halves of characters
                response = await client.post(path, content=content, headers={"content-type": "application/json"})
                assert (response.status_code, said in response.json()["error"]["message"]) == (status, True), (
                    body,
                    response.text,
                )
        for content in (b"{", b"[1]", b"\xff"):
            response = await client.post(
                "/v1/completions", content=content, headers={"content-type": "application/json"}
            )
            assert response.status_code == 400
        assert service.ledger.rollouts == {}


async def test_an_effort_is_none_high_or_max(serving: Any) -> None:
    efforts = {
        "none": "none",
        **dict.fromkeys(("minimal", "low", "medium", "high"), "high"),
        "xhigh": "max",
        "max": "max",
    }
    async with serving(model()) as (client, service):
        for effort in efforts:
            body = {**CHAT, "reasoning_effort": effort, "request_id": effort, "max_tokens": 1}
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        assert {name: job.thinking for name, job in service.ledger.jobs.items()} == efforts


async def test_a_path_that_is_none_and_a_method_that_it_does_not_take_have_codes_of_their_own(serving: Any) -> None:
    async with serving(model()) as (client, _):
        for method, path, status, code in (
            ("POST", "/v1/nothing", 404, "NOT_FOUND"),
            ("GET", "/v1/completions", 405, "METHOD_NOT_ALLOWED"),
        ):
            response = await client.request(method, path)
            assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_who_may_call_and_how_much_they_may_send(serving: Any) -> None:
    async with serving(model()) as (client, _):
        page = await client.post("/v1/chat/completions", json=CHAT, headers={"origin": "http://evil.example"})
        assert page.status_code == 403
        large = await client.post("/pause", content=bytes(BODY_BYTES_MAX + 1))
        assert large.status_code == 413
    async with serving(model(), token="secret") as (client, service):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer s\xe9cret".encode("latin-1")}):
            assert (await client.get("/v1/models", headers=headers)).status_code == 401  # type: ignore[arg-type]
        right = await client.get("/v1/models", headers={"authorization": "Bearer secret"})
        assert right.json()["data"][0]["id"] == "scripted"
        assert (await client.get("/health")).status_code == 200
        await service.engine.close()
        for headers, why in (({}, "the log says why"), ({"authorization": "Bearer secret"}, "the engine is closed")):
            health = await client.get("/health", headers=headers)
            assert (health.status_code, health.json()["error"]["message"]) == (503, f"nothing can be drawn: {why}")
        assert (await client.get("/live")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_ends_what_it_did_not_name(
    serving: Any, seen: Any, tmp_path: Path, *, stream: bool
) -> None:
    long = Reply(reasoning="thinking " * 400)
    async with serving(model(long)) as (client, service):
        await service.engine.pause("keep")
        asking = asyncio.create_task(client.post("/v1/chat/completions", json={**CHAT, "stream": stream}))
        await seen[RolloutOpened].wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await seen[RolloutFinished].wait()
        await seen[RolloutsAcknowledged].wait()
        assert service.ledger.jobs == {}
        await service.engine.resume()
    values = [value for _, value in journal.replay(tmp_path / "served/wal")]
    assert [value.reason for value in values if isinstance(value, RolloutFinished)] == ["CANCELLED"]


async def test_a_paused_engine_goes_on_where_it_stood(serving: Any, seen: Any, tmp_path: Path) -> None:
    async with serving(model()) as (client, _):
        assert (await client.post("/pause?mode=keep")).status_code == 200
        assert (await client.get("/is_paused")).json() == {"is_paused": True}
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await seen[RolloutOpened].wait()
        await client.post("/resume")
        (choice,) = (await asking).json()["choices"]
    assert choice["token_ids"] == list(reply_ids(LS, TOKENIZER))
    assert wal.read(tmp_path / "served/wal") is not None


async def test_requests_are_given_up_by_their_names(serving: Any, seen: Any) -> None:
    async with serving(model()) as (client, service):
        await service.engine.pause("keep")
        body = {"token_ids": list(_header()), "sampling_params": {"max_tokens": 9}, "request_id": "mine"}
        asking = asyncio.create_task(client.post("/inference/v1/generate", json=body))
        await seen[RolloutOpened].wait()
        gone = await client.post("/inference/v1/abort_requests", json={"request_ids": ["mine", "unknown"]})
        assert gone.json() == {"aborted": ["mine"]}
        (choice,) = (await asking).json()["choices"]
        assert (choice["finish_reason"], choice["token_ids"]) == ("abort", [])


async def test_what_was_taken_under_a_name_is_acknowledged_over_http_and_forgotten(serving: Any, seen: Any) -> None:
    async with serving(model()) as (client, service):
        body = {"token_ids": list(_header()), "sampling_params": {"max_tokens": 3, "n": 2}, "request_id": "mine"}
        taken = (await client.post("/inference/v1/generate", json=body)).json()
        assert (await client.post("/inference/v1/generate", json=body)).json() == taken
        await service.engine.pause("keep")
        seen[JobSubmitted].clear()
        asking = asyncio.create_task(client.post("/inference/v1/generate", json={**body, "request_id": "other"}))
        await seen[JobSubmitted].wait()
        said = await client.post("/inference/v1/ack_requests", json={"request_ids": ["other"]})
        assert said.status_code == 409
        assert "not ended yet: other/" in said.json()["error"]["message"]
        said = await client.post("/inference/v1/ack_requests", json={"request_ids": ["unknown", "mine"]})
        assert said.json() == {"acknowledged": ["mine"]}
        assert service.ledger.jobs.keys() == {"other"}
        assert (await client.post("/inference/v1/generate", json=body)).status_code == 409
        await service.engine.resume()
        assert (await asking).status_code == 200


async def test_a_seed_draws_the_same_for_every_request_and_other_members_draw_otherwise(serving: Any) -> None:
    keys: dict[str, list[tuple[int, int]]] = {}

    class Listening(ScriptedEngine):
        async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
            keys.setdefault(request.session.partition("/")[0], []).append((request.sampling.seed, request.stream_key))
            async for chunk in super().sample(request):
                yield chunk

    async with serving(Listening(TOKENIZER, lambda _session, _turn: LS)) as (client, _):
        for name, seed in (("a", 7), ("b", 7), ("c", 8), ("d", None)):
            body = {"prompt": list(_header()), "n": 2, "seed": seed, "request_id": name}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
    drawn = {name: tuple(sorted(each)) for name, each in keys.items()}
    assert drawn["a"] == drawn["b"]
    assert len(set(drawn.values())) == 3
    assert [each for each in drawn.values() if len(set(each)) != 2] == []


async def test_the_likeliest_tokens_are_given_with_each_as_they_were_logged(serving: Any, events: Any) -> None:
    async with serving(model()) as (client, service):
        chat = {**CHAT, "top_logprobs": 3, "request_id": "a"}
        whole = (await client.post("/v1/chat/completions", json=chat)).json()["choices"][0]["logprobs"]["content"]
        chunks = await events(client, "/v1/chat/completions", {**chat, "request_id": "b"})
        again = await events(client, "/v1/chat/completions", chat)
        for told in (chunks, again):
            assert [each for chunk in told for each in chunk["choices"][0]["logprobs"]["content"]] == whole
        likeliest = [{k: each[k] for k in ("token", "logprob", "bytes")} for each in whole]
        assert [each["top_logprobs"] for each in whole] == [[each] for each in likeliest]
        ids = list(_header())
        said = (await client.post("/v1/completions", json={"prompt": ids, "logprobs": 2})).json()["choices"][0]
        assert said["logprobs"]["top_logprobs"] == [{token: -0.5} for token in said["logprobs"]["tokens"]]
        body = {"token_ids": ids, "sampling_params": {"logprobs": 2}}
        said = (await client.post("/inference/v1/generate", json=body)).json()["choices"][0]
        assert [[top["token_id"] for top in each["top_logprobs"]] for each in said["logprobs"]["content"]] == [
            [token] for token in said["token_ids"]
        ]
        asked = [len(state.top_logprobs) == state.sampled_count for state in service.ledger.rollouts.values()]
        assert asked == [True] * 2  # those that have a name
