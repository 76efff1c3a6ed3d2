"""A real vLLM with a tiny random model behind the engine port, and what is left when it is killed or hangs.

One file, so that one worker starts the two servers once.
"""

import asyncio
import json
import random
import signal
import threading
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rollout.client import RolloutClient, Update
from rollout.conformance.check import Check, Subject
from rollout.conformance.suite import checks_for
from rollout.engine import Sampled, SampleRequest, Sampling
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.tiny import write_tiny_model
from rollout.errors import EngineError
from rollout.jobs import make_conversation
from rollout.request import Limits

pytestmark = [pytest.mark.timeout(1500), pytest.mark.filterwarnings("default")]  # the oracle's warnings are not ours
PROMPT = (0, 17, 900)
LONG = tuple(5 + 7 * number % 3000 for number in range(400))
BLOCK_TOKENS = 32
LOGPROB_ERROR = 2e-5
"""float32 by two programs, in different orders."""
SEQUENCES_MAX = 16
ROLLOUTS, TURN_TOKENS = 12, 1500
"""So many that their engine still draws when a client reads their first tokens: it runs ahead."""
PATIENCE_S = 120
FIELDS: tuple[Any, ...] = ("live_tokens", "tokens")
LOOK_S = 0.1


def ask(prompt: tuple[int, ...], tokens_count: int, **more: Any) -> SampleRequest:
    fields: dict[str, Any] = {"session": "s", "sampling": Sampling(), "stream_key": 1, "stop_ids": frozenset()}
    return SampleRequest(token_ids=prompt, tokens_count_max=tokens_count, **fields | more)


async def chunks_of(engine: VllmEngine, request: SampleRequest) -> list[Sampled]:
    return [chunk async for chunk in engine.sample(request)]


def ids_of(chunks: list[Sampled]) -> tuple[int, ...]:
    return tuple(token_id for chunk in chunks for token_id in chunk.token_ids)


@pytest.fixture
async def engine(server: Any) -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(server.url)
    await engine.open()
    yield engine
    await engine.close()


@pytest.fixture(scope="module")
def oracle(server: Any) -> Any:
    """Logits of all positions of a context, f32[tokens, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32).eval()

    def logits(token_ids: tuple[int, ...]) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
        return found

    return logits


async def test_greedy_tokens_and_their_logprobs_are_those_of_a_forward_pass(engine: VllmEngine, oracle: Any) -> None:
    chunks = await chunks_of(engine, ask(PROMPT, 200))
    ids, rows = ids_of(chunks), oracle(PROMPT + ids_of(chunks))[len(PROMPT) - 1 : -1].log_softmax(-1)
    assert len(ids) == 200
    assert ids == tuple(rows.argmax(-1).tolist())
    logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
    assert logprobs == pytest.approx(rows.max(-1).values.tolist(), abs=LOGPROB_ERROR)


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0, seed=3), Sampling(temperature=1.5, top_k=20, seed=3)])
async def test_logprobs_are_of_the_distribution_that_was_drawn_from(
    engine: VllmEngine, oracle: Any, sampling: Sampling
) -> None:
    chunks = await chunks_of(engine, ask(PROMPT, 60, sampling=sampling, top_logprobs_count=4))
    ids = ids_of(chunks)
    rows = oracle(PROMPT + ids)[len(PROMPT) - 1 : -1] / sampling.temperature
    if sampling.top_k:
        rows[rows < rows.topk(sampling.top_k).values[:, -1:]] = -torch.inf
    rows = rows.log_softmax(-1)
    logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
    assert logprobs == pytest.approx(rows[torch.arange(60), torch.tensor(ids)].tolist(), abs=LOGPROB_ERROR)
    tops = [row for chunk in chunks for row in chunk.top_logprobs]
    best = rows.topk(4)
    assert [row.token_ids for row in tops] == [tuple(row) for row in best.indices.tolist()]
    assert ids != tuple(rows.argmax(-1).tolist())


async def test_a_score_is_a_forward_pass(engine: VllmEngine, oracle: Any) -> None:
    scored = await engine.score(LONG, top_logprobs_count=2)
    rows = oracle(LONG)[:-1].log_softmax(-1)
    found = rows[torch.arange(len(LONG) - 1), torch.tensor(LONG[1:])].tolist()
    assert scored.logprobs == pytest.approx(found, abs=LOGPROB_ERROR)
    assert scored.top_logprobs[7].token_ids == tuple(rows[7].topk(2).indices.tolist())


async def test_what_a_request_had_before_is_not_computed_again(engine: VllmEngine) -> None:
    fresh = tuple(number % 4000 for number in uuid.uuid4().bytes * 25)
    first = await chunks_of(engine, ask(fresh, 40, session="first"))
    again = await chunks_of(engine, ask(fresh, 40, session="again"))
    longer = await chunks_of(engine, ask(fresh + ids_of(first), 8, session="longer"))
    whole_blocks = len(fresh) // BLOCK_TOKENS * BLOCK_TOKENS
    cached = [max(chunk.cached_tokens_count for chunk in chunks) for chunks in (first, again, longer)]
    assert cached[:2] == [0, whole_blocks]
    assert cached[2] > whole_blocks
    assert ids_of(first) == ids_of(again)


async def test_a_stream_that_is_left_ends_at_the_server(engine: VllmEngine, server: Any) -> None:
    before = await metric(server, "vllm:generation_tokens_total")
    async with aclosing(engine.sample(ask(PROMPT, 1900))) as chunks:
        await anext(chunks)
    await chunks_of(engine, ask(PROMPT, 4))  # that one is counted now
    async with asyncio.timeout(60):
        while await metric(server, "vllm:num_requests_running"):
            pass
    assert await metric(server, "vllm:generation_tokens_total") < before + 1900


async def metric(server: Any, name: str) -> float:
    def look() -> float:
        with urllib.request.urlopen(f"{server.url}/metrics") as told:
            lines = told.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))

    return await asyncio.to_thread(look)


async def test_who_has_priority_draws_before_those_who_wait_longer(engine: VllmEngine) -> None:
    began: list[str] = []
    clock = count()

    async def draw(name: str, tokens_count: int, priority: int, ready: asyncio.Event) -> None:
        async for _ in engine.sample(ask((0, 50 + next(clock)), tokens_count, session=name, priority=priority)):
            if name not in began:
                began.append(name)
                ready.set()

    full = [asyncio.Event() for _ in range(SEQUENCES_MAX)]
    tasks = [asyncio.create_task(draw(f"first {i}", 300 + 40 * i, 0, ready)) for i, ready in enumerate(full)]
    await asyncio.gather(*(ready.wait() for ready in full))
    tasks += [asyncio.create_task(draw(f"waiting {i}", 4, 0, asyncio.Event())) for i in range(16)]
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(draw("urgent", 4, 5, asyncio.Event())))
    await asyncio.gather(*tasks)
    assert began.index("urgent") < SEQUENCES_MAX + 8  # who came last, and some of those before had begun by then


class FreshEngine(VllmEngine):
    """Opens on the weights that the server was started with, whatever it has drawn with since."""

    def __init__(self, url: str, model: Path) -> None:
        super().__init__(url)
        self.model = model

    async def open(self) -> None:
        await asyncio.to_thread(self._put_back)
        await super().open()

    def _put_back(self) -> None:
        self._post("/pause?mode=abort&clear_cache=false")
        self._post("/collective_rpc", method="reload_weights", kwargs={"weights_path": str(self.model)})
        self._post("/update_weight_version", new_version="default")
        self._post("/resume")

    def _post(self, path: str, **body: Any) -> None:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            answer.read()


def subject(folder: Path, url: str = "http://127.0.0.1:1", model: Path = Path()) -> Subject:
    def checkpoint(number: int) -> Path:
        target = folder / f"weights-{number}"
        return target if target.exists() else write_tiny_model(target, seed=number)

    chance = random.Random(3)
    prompts = tuple((0, *(chance.randrange(2, 4000) for _ in range(210 + 40 * i))) for i in range(5))
    return Subject(
        make=lambda: FreshEngine(url, model),
        checkpoint=checkpoint,
        folder=folder,
        prompts=prompts,
        stop_id=1,
        vague=PROMPT,
        long_count=1800,
        traits=frozenset({"draws", "fills", "shapes"}),
        misfit=lambda: write_tiny_model(folder / "deeper", layers_count=3),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.mark.parametrize("check", checks_for(subject(Path())), ids=lambda check: check.name)
async def test_a_real_vllm_conforms(server: Any, folder: Path, check: Check) -> None:
    await check.run(subject(folder, server.url, server.model))


async def test_a_head_of_nan_is_refused_and_the_old_weights_draw_on(server: Any, folder: Path) -> None:
    nan = write_tiny_model(folder / "nan")
    data = (nan / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    first, end = json.loads(data[8:start])["lm_head.weight"]["data_offsets"]
    data = data[: start + first] + b"\xff" * (end - first) + data[start + end :]
    (nan / "model.safetensors").write_bytes(data)
    engine = FreshEngine(server.url, server.model)
    await engine.open()
    before = ids_of(await chunks_of(engine, ask(PROMPT, 20)))
    with pytest.raises(EngineError, match=f"weights of {nan} are refused: .* without a logprob, or NaN"):
        await engine.update(nan, 3)
    assert (engine.info.policy_version, ids_of(await chunks_of(engine, ask(PROMPT, 20)))) == (0, before)
    await engine.close()


async def test_the_weights_of_the_server_are_its_own_again(server: Any) -> None:
    """Those that come after know what it draws."""
    engine = FreshEngine(server.url, server.model)
    await engine.open()
    assert engine.info.policy_version == 0
    await engine.close()


def submit(client: RolloutClient, request_id: str) -> Iterator[Update]:
    """Rollouts, greedy: they need no sandbox."""
    said = [json.dumps([{"role": "user", "content": f"{i}?"}]) for i in range(ROLLOUTS)]
    return client.submit(
        [make_conversation(f"p{i}", messages_json=messages) for i, messages in enumerate(said)],
        request_id=request_id,
        fields=FIELDS,
        sampling=Sampling(),
        limits=Limits(turn_tokens_count_max=TURN_TOKENS),
    )


def follow(
    updates: Iterator[Update], disturb: Callable[[], None] | None = None
) -> tuple[dict[str, list[int]], list[str]]:
    """The tokens of rollouts that ended, by prompt, and how others failed; `disturb` is called in mid-stream."""
    streamed: dict[str, list[int]] = {}
    drawn: dict[str, list[int]] = {}
    failures = []
    for update in updates:
        name = update.rollout_id.split("/")[1]
        if update.what == "tokens":
            streamed.setdefault(name, []).extend(update.fields["token_ids"])
            if disturb is not None and len(streamed) >= ROLLOUTS // 3:
                disturb()
                disturb = None
        if update.what == "infra_failed":
            failures.append(update.fields["code"])
        if update.trajectory is not None:
            record = update.trajectory
            drawn[name] = [token for token, own in zip(record.token_ids, record.loss_mask, strict=True) if own]
            assert drawn[name] == streamed[name]  # none of them twice
    assert disturb is None
    return drawn, failures


@pytest.fixture(scope="module")
def calm() -> dict[str, dict[str, list[int]]]:
    """What was drawn when nobody disturbed it."""
    return {}


def test_a_hung_engine_is_an_error_with_a_name_and_a_resume_ends_with_the_very_tokens(
    pair: Any, serve_dsec: Any, calm: Any
) -> None:
    server = pair[1]
    address, _ = serve_dsec(server.url, DSEC_ENGINE_SILENCE_S="20")
    with RolloutClient(address, patience_s=PATIENCE_S) as client:
        calm["tokens"], failures = follow(submit(client, "calm"))
        assert failures == []
        try:
            _, failures = follow(submit(client, "hung"), lambda: server.signal(signal.SIGSTOP))
        finally:
            server.signal(signal.SIGCONT)
        assert set(failures) == {"ENGINE_ERROR"}  # of those that were not drawn to their end by then
        assert len(client.resume(request_id="hung")) == len(failures)
        drawn, _ = follow(client.attach("hung", fields=FIELDS))
    assert drawn == calm["tokens"]


def test_rollouts_go_on_exactly_after_kill_9_of_their_engine(pair: Any, serve_dsec: Any, calm: Any) -> None:
    server = pair[1]
    address, log = serve_dsec(server.url)

    def kill() -> None:
        server.kill()
        wait_for("is left out", log)
        server.start()
        server.wait()

    with RolloutClient(address, patience_s=PATIENCE_S) as client:
        assert follow(submit(client, "killed"), kill) == (calm["tokens"], [])


def test_of_two_engines_the_one_that_lives_ends_what_the_other_had_begun(pair: Any, serve_dsec: Any, calm: Any) -> None:
    address, log = serve_dsec(*(server.url for server in pair))
    with RolloutClient(address, patience_s=PATIENCE_S) as client:
        assert follow(submit(client, "starved"), pair[1].kill_engine) == (calm["tokens"], [])
    assert pair[1].url in log.read_text()
    assert pair[0].url not in log.read_text()


def wait_for(said: str, log: Path) -> None:
    for _ in range(int(PATIENCE_S / LOOK_S)):
        if said in log.read_text():
            return
        threading.Event().wait(LOOK_S)
    pytest.fail(log.read_text())
