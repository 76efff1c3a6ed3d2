"""Quick Instructions over HTTP: what is answered, and what is refused in words."""

from __future__ import annotations

from typing import Any

import pytest

from rollout.main import load_tokenizer
from rollout.testing import Reply, ScriptedEngine

TOKENIZER = load_tokenizer()
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "What is here?"}]}


async def test_quick_instructions_are_asked_about_any_rollout_and_read(serving: Any) -> None:
    engine = ScriptedEngine(TOKENIZER, lambda session, _: Reply(content="Search" if "quick" in session else "Hi."))
    async with serving(engine) as (client, _):
        await client.post("/v1/chat/completions", json={**CHAT, "request_id": "mine"})
        about = {"rollout_id": "mine/chat.0"}
        fetch = {"task": "read_url", "url": "https://a.example"}
        body = {**about, "instructions": ["action", "query", fetch, "title"], "request_id": "quick"}
        said = (await client.post("/v1/quick_instructions", json=body)).json()
        assert (said["id"], said["object"], said["model"], said["rollout_id"]) == (
            "quick",
            "quick_instructions",
            "scripted",
            "mine/chat.0",
        )
        action, query, read_url, title = said["answers"]
        assert (action["action"], query["queries"], read_url["label"], title["title"]) == (
            "search",
            ["Search"],
            "Search",
            "Search",
        )
        answers = [(each["text"], each["is_complete"], each["unread"]) for each in said["answers"]]
        assert [each for each in answers if each != ("Search", True, "")] == []
        assert said["usage"]["completion_tokens"] == sum(each["answer_tokens_count"] for each in said["answers"])
        drawn = engine.drawn_count
        assert (await client.post("/v1/quick_instructions", json=body)).json()["answers"] == said["answers"]
        assert engine.drawn_count == drawn
        cut = await client.post("/v1/quick_instructions", json={**body, "request_id": "quick2", "max_tokens": 1})
        assert {each["unread"] for each in cut.json()["answers"]} == {"it was cut off before its end"}


@pytest.mark.parametrize(
    ("path", "body", "members"),
    [
        ("/v1/chat/completions", CHAT, ["chat.0", "chat.1"]),
        ("/v1/completions", {"prompt": ["Hi.", "Ho."]}, ["prompt0.0", "prompt0.1", "prompt1.0", "prompt1.1"]),
        ("/inference/v1/generate", {"token_ids": [5], "sampling_params": {"n": 2}}, ["prompt.0", "prompt.1"]),
    ],
)
async def test_each_choice_of_a_dialect_can_be_asked_about_by_the_id_that_the_docs_say(
    serving: Any, path: str, body: dict[str, Any], members: list[str]
) -> None:
    async with serving(ScriptedEngine(TOKENIZER, lambda *_: Reply(content="Hi."))) as (client, service):
        said = (await client.post(path, json={**body, "n": 2, "request_id": "poem"})).json()
        assert (said.get("id") or said["request_id"], len(said["choices"])) == ("poem", len(members))
        assert list(service.ledger.rollouts) == [f"poem/{each}" for each in members]
        for each in members if path.endswith("chat/completions") else ():
            about = {"rollout_id": f"poem/{each}", "instructions": ["action"]}
            answer = await client.post("/v1/quick_instructions", json=about)
            assert (answer.status_code, answer.json()["rollout_id"]) == (200, f"poem/{each}"), answer.text


@pytest.mark.parametrize(
    ("change", "status", "complaint"),
    [
        ({"rollout_id": "nobody/chat.0"}, 404, "no rollout 'nobody/chat.0'"),
        ({"rollout_id": "n" * 100_000}, 404, f"no rollout '{'n' * 200}'"),
        ({"instructions": []}, 400, "instructions: give 1 to 16, not 0"),
        ({"instructions": ["action"] * 17}, 400, "instructions: give 1 to 16, not 17"),
        ({"instructions": ["action", "dance"]}, 400, "instructions[1]: task: 'dance' is none of action"),
        (
            {"instructions": [{"task": "read_url", "url": "a" * 3_000_000}]},
            400,
            "instructions[0]: a url of 3000000 characters leaves no room in 2048 tokens",
        ),
        ({"instructions": ["read_url"]}, 400, "instructions[0]: url: task 'read_url' needs one"),
        ({"instructions": [{"task": "read_url", "url": ""}]}, 400, "url: task 'read_url' needs one, not an empty one"),
        ({"instructions": [{"task": "query", "url": "https://a.example"}]}, 400, "url: task 'query' takes none"),
        ({"instructions": [{"task": "query", "adress": "x"}]}, 400, "adress: Extra inputs are not permitted"),
        ({"instructions": [7]}, 400, "instructions.0"),
        ({"instructions": "action"}, 400, "instructions: Input should be a valid list"),
        ({"max_tokens": 513}, 400, "max_tokens: Input should be less than or equal to 512"),
        ({"stream": True}, 400, "stream: answers are short"),
        ({"stop": ["x"]}, 400, "stop: not supported"),
        ({"model": "other"}, 404, "no model 'other'"),
        ({"request_id": "cut"}, 409, "'cut' was submitted before"),
        ({"rollout_id": "cut/chat.0", "instructions": ["title"]}, 409, "title: cut/chat.0 has no whole answer"),
    ],
)
async def test_a_question_that_cannot_be_asked_is_refused_in_words(
    serving: Any, change: dict[str, Any], status: int, complaint: str
) -> None:
    async with serving(ScriptedEngine(TOKENIZER, lambda *_: Reply(content="Hi."))) as (client, service):
        await client.post("/v1/chat/completions", json={**CHAT, "request_id": "cut", "max_tokens": 2})
        response = await client.post(
            "/v1/quick_instructions", json={"rollout_id": "cut/chat.0", "instructions": ["action"], **change}
        )
        assert (response.status_code, response.json()["error"]["type"]) == (
            status,
            "invalid_request_error",
        ), response.text
        assert complaint in response.json()["error"]["message"]
        assert list(service.ledger.jobs) == ["cut"]
