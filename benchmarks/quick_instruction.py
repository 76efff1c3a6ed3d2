"""What a Quick Instruction saves: questions on a context that is kept, against prompts of their own that prefill again.

Claim: at 1,000 tokens of context a question computes a twentieth of the tokens or less, and takes that much less time.
For contexts of 100 to 2,000 tokens a rollout is drawn; then one question (`query`), and all six at once, are asked
about it, in turns with the same prompts put to an engine that keeps nothing between requests.  Both sides draw the very
same answers, which is checked.  "computed" are tokens that went through the model for it: of the prompt what was not
found kept, and the answer.  Times are from the call to the last answer, medians; `--answer-tokens` bounds an answer
(those of `action` and `authority` have two).  The engine's port is measured by itself, and the service with its durable
log, also while 64 rollouts share its 16 slots: how long a question waits there, and a usual request.  `--vllm URL` does
the port's part with a vLLM server (block size, prefix cache and scheduler are its own): what is not kept there is a
context of the same length that the server never saw.  `--vllm-python` starts one on this host's processors, with random
weights.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plots import panels
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from vllm_server import SIZES, on_processors

from dsec.testing import FakeSubstrate
from rollout.config import RolloutConfig
from rollout.engine import Engine, SampleRequest, Sampling
from rollout.engines.embedded.batching import Limits as EngineLimits
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.engines.vllm.engine import VllmEngine
from rollout.generation import Ask, Ended, drawn_ids, generate
from rollout.jobs import PRIORITY_MAX, make_conversation, make_job
from rollout.main import load_tokenizer
from rollout.quick import ask
from rollout.request import Job, Limits, NoReward
from rollout.service import RolloutService
from toolcall_dsl import V4, encode, token_ids_of
from toolcall_dsl.quick import instruction, shared_prefix

EXAMPLE = "example: python benchmarks/quick_instruction.py --contexts 1000 --repeats 5"
TOKENIZER = load_tokenizer()
EOS = TOKENIZER.control(V4.eos)
CONTEXTS = (100, 250, 500, 1000, 2000)
REPLY_TOKENS = 24
"""Of the rollout that is asked about."""
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "count",
    "files",
)
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Took:
    """All questions of a round: seconds, tokens that were computed, and the answers."""

    seconds: float
    computed: int
    answers: tuple[Ids, ...]


def prompt_of(length: int, number: int) -> Ids:
    """A question of about so many tokens, another one for each number, from its first word on."""
    words = [WORDS[at * (number % 5 + 1) % len(WORDS)] for at in range(length)]
    ids = TOKENIZER.encode_plain(f"{length} {number} {' '.join(words)}")[: length - 11]
    said = [{"role": "user", "content": f"{TOKENIZER.decode(ids)}. Write a poem about alpha."}]
    return tuple(token_ids_of(encode(said, TOKENIZER, thinking=True)))


def tasks_of(url: str) -> list[tuple[str, str | None]]:
    """All six, the one of the single question first."""
    return [
        ("query", None),
        ("action", None),
        ("authority", None),
        ("domain", None),
        ("read_url", url),
        ("title", None),
    ]


def questions_of(prompt: Ids, reply: Ids, count: int, number: int) -> list[Ids]:
    """The prompts of that many questions about a context; `number` makes the address a new one."""
    asked = [instruction(task, thinking=True, url=url) for task, url in tasks_of(f"https://a.io/{number:03}")[:count]]
    question = tuple(shared_prefix(prompt, TOKENIZER))
    answered = (*prompt, *reply) if reply[-1:] == (EOS,) else (*prompt, *reply, EOS)
    places = {"question": question, "answer": answered}
    return [(*places[each.place], *token_ids_of(each.segments(TOKENIZER))) for each in asked]


async def draw(engine: Engine, session: str, token_ids: Ids, tokens_count: int) -> tuple[Ids, int]:
    """A continuation, and how much of its prompt was computed for it."""
    request = SampleRequest(
        session=session,
        token_ids=token_ids,
        sampling=Sampling(),
        stream_key=1,
        tokens_count_max=tokens_count,
        stop_ids=frozenset({EOS}),
    )
    drawn: list[int] = []
    computed = len(token_ids)
    async with aclosing(engine.sample(request)) as chunks:
        async for chunk in chunks:
            drawn += chunk.token_ids
            computed -= chunk.cached_tokens_count
    return tuple(drawn), computed


async def through_the_port(engine: Engine, prompts: Sequence[Ids], tokens_count: int) -> Took:
    """All prompts at once."""
    began = time.perf_counter()
    asked = [draw(engine, f"ask-{number}", prompt, tokens_count) for number, prompt in enumerate(prompts)]
    drawn = await asyncio.gather(*asked)
    seconds = time.perf_counter() - began
    for number in range(len(prompts)):
        await engine.release(f"ask-{number}")
    answers = tuple(answer for answer, _ in drawn)
    return Took(seconds, sum(computed + len(answer) for answer, computed in drawn), answers)


async def through_the_service(
    service: RolloutService, prompts: Sequence[Ids], tokens_count: int, priority: int = PRIORITY_MAX
) -> Took:
    """All prompts as one request: what it takes to ask without Quick Instructions."""
    began = time.perf_counter()
    wanted = Ask(
        request_id=f"again-{time.monotonic_ns()}",
        prompts=tuple(make_conversation(str(number), token_ids=prompt) for number, prompt in enumerate(prompts)),
        sampling=Sampling(),
        tokens_count_max=tokens_count,
        priority=priority,
    )
    async with aclosing(generate(service, wanted)) as pieces:
        ended = {piece.index: piece.state async for piece in pieces if isinstance(piece, Ended)}
    seconds = time.perf_counter() - began
    answers = tuple(drawn_ids(ended[number]) for number in range(len(prompts)))
    cached = sum(spent.cached_tokens_count for state in ended.values() for spent in state.spent)
    return Took(seconds, sum(map(len, prompts)) + sum(map(len, answers)) - cached, answers)


async def ask_the_service(service: RolloutService, rollout_id: str, count: int, number: int, tokens: int) -> Took:
    """That many questions about a rollout."""
    asked = [task if url is None else (task, url) for task, url in tasks_of(f"https://a.io/{number:03}")[:count]]
    began = time.perf_counter()
    name = f"ask-{time.monotonic_ns()}"
    answers = await ask(service, rollout_id, asked, answer_tokens_count_max=tokens, request_id=name)
    seconds = time.perf_counter() - began
    computed = sum(each.prompt_tokens_count - each.cached_tokens_count + each.answer_tokens_count for each in answers)
    return Took(seconds, computed, tuple(drawn_ids(service.ledger.rollouts[each.rollout_id]) for each in answers))


Round = Callable[[int, int], Awaitable[tuple[Took, Took]]]
"""A round `number` of `count` questions: on what is kept, and again."""


async def rows_of(where: str, length: int, repeats: int, play: Round, *, is_same: bool) -> list[dict[str, Any]]:
    """For one question and for six: medians of the rounds, and of their ratios."""
    rows = []
    for count in (1, 6):
        rounds = [await play(number, count) for number in range(repeats + 1)][1:]  # the first only warms up
        if is_same and any(kept.answers != again.answers for kept, again in rounds):
            raise SystemExit(f"{where}, {length} tokens: the answers differ, which may not be")
        rows.append(
            {
                "where": where,
                "context": length,
                "questions": count,
                "computed": statistics.median(kept.computed for kept, _ in rounds),
                "computed_again": statistics.median(again.computed for _, again in rounds),
                "computed_ratio": statistics.median(again.computed / kept.computed for kept, again in rounds),
                "ms": 1e3 * statistics.median(kept.seconds for kept, _ in rounds),
                "ms_again": 1e3 * statistics.median(again.seconds for _, again in rounds),
                "time_ratio": statistics.median(again.seconds / kept.seconds for kept, again in rounds),
            }
        )
    return rows


async def of_the_port(length: int, options: argparse.Namespace, engine: Engine, other: Engine) -> list[dict[str, Any]]:
    """Through the port: `other` is the engine that keeps nothing, or the same one, which never saw what it is asked."""
    prompt = prompt_of(length, 0)
    reply, _ = await draw(engine, "rollout", prompt, REPLY_TOKENS)
    seen = itertools.count(time.time_ns() % 1_000_000_000)  # also to a server that this script asked before

    async def play(number: int, count: int) -> tuple[Took, Took]:
        prompts = questions_of(prompt, reply, count, number)
        kept = await through_the_port(engine, prompts, options.answer_tokens)
        if other is engine:
            fresh = (prompt_of(length, next(seen)) for _ in range(count))
            prompts = [questions_of(each, reply, count, number)[n] for n, each in enumerate(fresh)]
        return kept, await through_the_port(other, prompts, options.answer_tokens)

    name = "vLLM" if other is engine else "engine"
    return await rows_of(name, length, options.repeats, play, is_same=other is not engine)


async def of_the_service(
    length: int, options: argparse.Namespace, service: RolloutService, other: RolloutService
) -> list[dict[str, Any]]:
    """Through the service, about a rollout that has ended; of as many as it takes, the first that ended by itself."""
    prompt = prompt_of(length, 0)
    drawn = Sampling(temperature=1.0, seed=length)
    limits = Limits(turns_count_max=1, turn_tokens_count_max=REPLY_TOKENS)
    asked = [make_conversation("talk", token_ids=prompt)]
    job = Job(request_id=f"of-{length}", sampling=drawn, limits=limits, reward=NoReward())
    await service.submit(make_job(job, asked, group_size=64, group_prefix=f"of-{length}/"), asked)
    await service.wait(job.request_id)
    members = [service.ledger.rollouts[name] for name, _, _ in service.ledger.members(job.request_id)]
    whole = [state for state in members if state.token_ids[-1] == EOS]
    if not whole:
        raise SystemExit(f"{length} tokens: no rollout of {len(members)} ended by itself: choose another length")

    async def play(number: int, count: int) -> tuple[Took, Took]:
        prompts = questions_of(prompt, whole[0].token_ids[len(prompt) :], count, number)
        kept = await ask_the_service(service, whole[0].opened.rollout_id, count, number, options.answer_tokens)
        return kept, await through_the_service(other, prompts, options.answer_tokens)

    return await rows_of("service", length, options.repeats, play, is_same=True)


async def on_a_busy_service(options: argparse.Namespace, *, is_quick: bool) -> list[float]:
    """Seconds of questions, asked ten a second while 64 rollouts share 16 slots; or of the same as usual requests."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        service = RolloutService(folder, EmbeddedEngine(), FakeSubstrate(), TOKENIZER, RolloutConfig())
        await stack.enter_async_context(service)
        await service.start()
        asked = [make_conversation("talk", token_ids=prompt_of(250, 0))]
        limits = Limits(turns_count_max=1, turn_tokens_count_max=256)
        job = Job(request_id="busy", sampling=Sampling(temperature=10.0, seed=1), limits=limits, reward=NoReward())
        await service.submit(make_job(job, asked, group_size=64, group_prefix="busy/"), asked)
        working = asyncio.create_task(service.wait("busy"))

        async def one(number: int) -> float:
            await asyncio.sleep(0.5 + number / 10)
            if is_quick:
                return (await ask_the_service(service, "busy/talk.0", 1, number, options.answer_tokens)).seconds
            prompts = questions_of(asked[0].token_ids, (EOS,), 1, number)
            return (await through_the_service(service, prompts, options.answer_tokens, priority=0)).seconds

        took = await asyncio.gather(*(one(number) for number in range(20)))
        await working
        return sorted(took)


async def of_busy(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds at half and at nine tenths of the questions, with a Quick Instruction's priority and without."""
    quick, usual = [await on_a_busy_service(options, is_quick=is_quick) for is_quick in (True, False)]
    return {
        "quick_p50_ms": 1e3 * quick[10],
        "quick_p90_ms": 1e3 * quick[18],
        "usual_p50_ms": 1e3 * usual[10],
        "usual_p90_ms": 1e3 * usual[18],
    }


def forgetful() -> EmbeddedEngine:
    """An engine that keeps nothing."""
    return EmbeddedEngine(limits=EngineLimits(state_bytes_max=0))


async def measure(options: argparse.Namespace, tell: Callable[[], object]) -> list[dict[str, Any]]:
    """All rows."""
    rows: list[dict[str, Any]] = []
    async with AsyncExitStack() as stack:
        if options.vllm:
            engine: Engine = VllmEngine(options.vllm)
            await engine.open()
            stack.push_async_callback(engine.close)
            for length in options.contexts:
                rows += await of_the_port(length, options, engine, engine)
                tell()
            return rows
        engine, other = EmbeddedEngine(), forgetful()
        for each in (engine, other):
            await each.open()
            stack.push_async_callback(each.close)
        services = []
        for each in (EmbeddedEngine(), forgetful()):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            service = RolloutService(folder, each, FakeSubstrate(), TOKENIZER, RolloutConfig())
            services.append(await stack.enter_async_context(service))
            await service.start()
        for length in options.contexts:
            rows += await of_the_port(length, options, engine, other)
            rows += await of_the_service(length, options, *services)
            tell()
    return sorted(rows, key=lambda row: row["where"])


def draw_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """How many times fewer tokens, and how many times faster, over the length of the context."""
    where = sorted({row["where"] for row in rows})
    lines = [(place, count) for place in where for count in (1, 6)]
    contexts = sorted({row["context"] for row in rows})

    def lines_of(figure: str, lines: Sequence[tuple[str, int]]) -> dict[str, list[float]]:
        return {
            f"{place}, {count} asked": [
                row[figure] for row in rows if (row["where"], row["questions"]) == (place, count)
            ]
            for place, count in lines
        }

    drawn = {
        "tokens computed again / kept": lines_of("computed_ratio", lines),
        "time again / kept": lines_of("time_ratio", lines),
        "ms until all are answered": {
            **lines_of("ms", lines[:1]),
            f"{lines[0][0]}, a prompt of its own": lines_of("ms_again", lines[:1]).popitem()[1],
        },
    }
    panels(path, "tokens of context", contexts, drawn, title="Quick Instructions against prompts that prefill again")


def show(rows: list[dict[str, Any]], busy: dict[str, float] | None, options: argparse.Namespace) -> None:
    """A table for people."""
    title = f"Quick Instructions, answers of at most {options.answer_tokens} tokens, medians of {options.repeats}"
    table = Table("", "context", "asked", "tokens", "again", "ratio", "ms", "again", "ratio", title=title)
    for row in rows:
        counts = (f"{row['computed']:,.0f}", f"{row['computed_again']:,.0f}", f"{row['computed_ratio']:.1f}x")
        times = (f"{row['ms']:.1f}", f"{row['ms_again']:.1f}", f"{row['time_ratio']:.1f}x")
        table.add_row(row["where"], str(row["context"]), str(row["questions"]), *counts, *times)
    Console(width=100).print(table)
    if busy is not None:
        times = [f"{busy[f'{kind}_p50_ms']:,.0f} (p90 {busy[f'{kind}_p90_ms']:,.0f}) ms" for kind in ("quick", "usual")]
        print(f"on a service with every slot taken: a question {times[0]}, a usual request of the same {times[1]}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="lengths, 20 to 2000 tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--answer-tokens", type=int, default=4, help="the most that an answer has")
    parser.add_argument("--vllm", metavar="URL", help="a vLLM server (--enable-prompt-tokens-details) as the engine")
    parser.add_argument("--vllm-python", metavar="PYTHON", help="start one of this Python's vLLM, on the processors")
    parser.add_argument("--vllm-size", choices=SIZES, default="160m", help="of its model")
    parser.add_argument("--quick", action="store_true", help="contexts of 100 and 1,000, two repeats")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--figure", type=Path, help="where to draw the picture")
    options = parser.parse_args()
    if options.quick:
        options.contexts, options.repeats = (100, 1000), 2
    if not all(20 <= length <= 2000 for length in options.contexts):
        parser.error("--contexts: 20 to 2000 tokens")
    with ExitStack() as stack:
        if options.vllm_python:
            options.vllm = stack.enter_context(on_processors(options.vllm_python, options.vllm_size))
        progress = stack.enter_context(Progress(console=Console(stderr=True), disable=options.json))
        bar = progress.add_task("contexts", total=len(options.contexts))
        rows = asyncio.run(measure(options, lambda: progress.advance(bar)))
        busy = None if options.vllm else asyncio.run(of_busy(options))
    if options.figure is not None:
        draw_figure(rows, options.figure)
    if options.json:
        print(
            json.dumps({"answer_tokens": options.answer_tokens, "repeats": options.repeats, "rows": rows, "busy": busy})
        )
    else:
        show(rows, busy, options)


if __name__ == "__main__":
    main()
