"""`dsec serve --http` as its callers have it: real processes, kill -9 in mid-stream, several workers over one root."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from rollout.client import RolloutClient

ASK = {
    "request_id": "mine",
    "messages": [{"role": "user", "content": "Say what you like."}],
    "temperature": 1.0,
    "max_tokens": 300,
    "n": 2,
    "return_token_ids": True,
    "logprobs": True,
    "top_logprobs": 2,
}
PATH = "/v1/chat/completions"
TOKEN = "correct-horse-battery"


class Server:
    """A `dsec serve` process and a client of its HTTP port."""

    def __init__(self, dsec: Any, *options: object, token: str = "") -> None:
        self.dsec = dsec
        command = ("serve", *options, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")
        self.process: subprocess.Popen[str] = dsec.start(*command)
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        assert self.said.startswith("dsec: serving 127.0.0.1:"), self.process.communicate()
        self.address, self.url = self.said.split()[2], self.said.split()[4].rstrip(",")
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self.client = httpx2.Client(base_url=self.url, timeout=60, headers=headers)

    def kill(self) -> None:
        self.client.close()
        self.dsec.kill(self.process)

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        _, err = self.process.communicate(timeout=120)
        assert (self.process.returncode, err) == (0, "dsec: stopped, 0 rollouts unfinished\n")


@pytest.fixture
def serve(dsec: Any) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(*options: object, **more: str) -> Server:
        started.append(Server(dsec, *options, **more))
        return started[-1]

    yield start
    for server in started:
        if server.process.returncode is None:
            server.stop()


Drawn = list[tuple[int, float, tuple[float, ...]]]


def drawn(server: Server, chunks_count: int) -> dict[int, Drawn]:
    """Tokens, logprobs and the likeliest ones of each member after so many pieces of a stream."""
    tokens: dict[int, Drawn] = {0: [], 1: []}
    with server.client.stream("POST", PATH, json={**ASK, "stream": True}) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        for _, line in zip(range(chunks_count), lines, strict=False):
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            tokens[choice["index"]] += pairs(choice)
    return tokens


def pairs(choice: dict[str, Any]) -> Drawn:
    content = choice["logprobs"]["content"]
    tops = [tuple(top["logprob"] for top in each["top_logprobs"]) for each in content]
    assert {len(each) for each in tops} <= {2}
    return list(zip(choice["token_ids"], (each["logprob"] for each in content), tops, strict=True))


def test_a_stream_that_kill_9_cut_goes_on_under_its_id_with_the_very_same_tokens(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    whole = serve("--out", tmp_path / "whole").client.post(PATH, json=ASK).json()["choices"]
    server = serve("--out", tmp_path / "cut")
    seen = [drawn(server, 20)]
    server.kill()
    server = serve("--out", tmp_path / "cut")
    seen.append(drawn(server, 60))  # and the client goes away, which ends nothing that has a name
    server.kill()
    server = serve("--out", tmp_path / "cut")
    said = server.client.post(PATH, json=ASK).json()["choices"]
    assert [pairs(choice) for choice in said] == [pairs(choice) for choice in whole]
    for before in seen:
        for index, tokens in before.items():
            assert tokens == pairs(said[index])[: len(tokens)]
    assert sum(map(len, seen[0].values())) > 0
    server.stop()
    summary = server.dsec.done("show", tmp_path / "cut", "--json").lines()
    assert {record["tokens_regenerated"] for record in summary} == {0}


def test_a_worker_names_the_one_that_has_a_request_and_takes_new_ones_itself(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    options = ("--root", tmp_path / "root", "--token-file", tmp_path / "token")
    one = serve(*options, "--worker-id", "one", token=TOKEN)
    two = serve(*options, "--worker-id", "two", token=TOKEN)
    assert httpx2.get(f"{one.url}/v1/models").status_code == 401
    short = {**ASK, "max_tokens": 8}
    said = one.client.post(PATH, json=short).json()
    elsewhere = two.client.post(PATH, json=short)
    assert (elsewhere.status_code, one.address in elsewhere.json()["error"]["message"]) == (421, True), elsewhere.text
    assert two.client.post(PATH, json={**short, "request_id": "another"}).status_code == 200
    assert one.client.post(PATH, json={**short, "request_id": "another"}).status_code == 421
    del short["request_id"]
    assert two.client.post(PATH, json=short).status_code == one.client.post(PATH, json=short).status_code == 200
    again = one.client.post(PATH, json={**short, "request_id": "mine"}).json()
    assert again["choices"] == said["choices"]
    with RolloutClient(two.address, token=TOKEN) as client:  # which passes it on, with its own token
        assert client.get("mine/chat.0").rollout_id == "mine/chat.0"


def test_a_port_or_a_token_that_cannot_be_is_said_so(dsec: Any, serve: Callable[..., Server], tmp_path: Path) -> None:
    taken = serve("--out", tmp_path / "one").url.removeprefix("http://")
    (tmp_path / "empty").write_text("\n")
    wrong: list[tuple[tuple[object, ...], str]] = [
        (("--http", taken), f"cannot listen on {taken}"),
        (("--http", "nowhere"), "give unix:PATH, HOST:PORT"),
        (("--http", "unix:/tmp/http.sock"), "give HOST:PORT, or tls:HOST:PORT"),
        (("--http", "0.0.0.0:0"), "needs a token"),
        (("--token-file", tmp_path / "none"), "cannot read the token"),
        (("--token-file", tmp_path / "empty"), "is empty"),
    ]
    for options, said in wrong:
        ran = dsec("serve", "--out", tmp_path / "two", "--listen", "127.0.0.1:0", *options)
        assert (ran.code, ran.out) == (2, ""), ran.err
        assert said in ran.err
