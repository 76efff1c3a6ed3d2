"""How fast the embedded engine decodes and prefills, beside transformers and a plain torch loop on the same weights.

Goals, with as many compute threads on every side: a single stream at least 10 times as fast as transformers; 16 streams
together at least 4 times as fast as one; a prefill at least 3 times as fast as its tokens one by one; the first token
after a forked prefix of 350 tokens within 5 ms; the memory of a sequence at most twice its state's arithmetic size.
The engine is measured through its port, so batching, sampling and asyncio are inside its figures.  `transformers` is
`DeepseekV4ForCausalLM.generate` (bf16 weights upcast to float32, greedy, cached), the `torch loop` the same modules
called token by token without `generate`.  Rounds alternate between the sides; figures are medians, ratios those of the
rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import importlib
import json
import os
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rollout.engine import SampleRequest, Sampling
from rollout.engines.embedded.batching import Limits
from rollout.engines.embedded.binding import Chunk, Model, State
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT, load_checkpoint
from rollout.engines.embedded.engine import EmbeddedEngine

EPILOG = """example:
  python benchmarks/engine_speed.py --quick
  python benchmarks/engine_speed.py --threads 1 --json > engine_speed.json
"""
PROMPTS = Path(__file__).resolve().parents[1] / "tests/golden/embedded_prompts.json"
STREAMS = (1, 8, 16, 32)
PREFIX_TOKENS = 350
STATES = 32


def load_prompts() -> list[tuple[int, ...]]:
    """Real prompts of the checkpoint's task families, 366 to 389 tokens."""
    return [tuple(entry["token_ids"]) for entry in json.loads(PROMPTS.read_text())]


def request(name: str, token_ids: tuple[int, ...], tokens_count: int) -> SampleRequest:
    """Some tokens after a prompt, whatever they are."""
    return SampleRequest(
        session=name,
        token_ids=token_ids,
        sampling=Sampling(temperature=1.0, seed=1),
        stream_key=hash(name),
        tokens_count_max=tokens_count,
        stop_ids=frozenset(),
    )


class EmbeddedSide:
    """Measures the engine through its port; nothing is retained between requests, but for forks."""

    def __init__(self, prompts: list[tuple[int, ...]], threads_count: int) -> None:
        self.prompts = prompts
        self.engine = EmbeddedEngine(
            limits=Limits(state_bytes_max=0, prefill_tokens_max=128, threads_count=threads_count)
        )
        self.forking = EmbeddedEngine(limits=Limits(prefill_tokens_max=128, threads_count=threads_count))

    async def open(self) -> None:
        """Load the weights, twice."""
        await self.engine.open()
        await self.forking.open()

    async def close(self) -> None:
        """Free them."""
        await self.engine.close()
        await self.forking.close()

    async def decode(self, streams_count: int, tokens_count: int) -> float:
        """Tokens a second over all streams, from the first token of the last prompt to the first end of a stream."""
        told: list[list[tuple[float, int]]] = [[] for _ in range(streams_count)]
        tokens_count += 4 * streams_count  # the first ones draw while the last ones' prompts go through

        async def stream(index: int) -> None:
            prompt = self.prompts[index % len(self.prompts)]
            async for chunk in self.engine.sample(request(str(index), prompt, tokens_count)):
                told[index].append((time.perf_counter(), len(chunk.token_ids)))

        await asyncio.gather(*(stream(index) for index in range(streams_count)))
        begin, end = max(chunks[0][0] for chunks in told), min(chunks[-1][0] for chunks in told)
        return sum(count for chunks in told for at, count in chunks if begin < at <= end) / (end - begin)

    async def prefill(self) -> float:
        """Prompt tokens a second, first token included."""
        return len(self.prompts[0]) / await self._first_token(self.engine, "prefill", self.prompts[0])

    async def fork(self, count: int) -> float:
        """Milliseconds to the first token of a session that shares a prefix with one that has ended."""
        prefix = self.prompts[0][:PREFIX_TOKENS]
        await self._first_token(self.forking, "parent", (*prefix, 17))
        times = []
        for number in range(count):
            times.append(await self._first_token(self.forking, f"child {number}", (*prefix, 18 + number)))
            await self.forking.release(f"child {number}")
        return 1000 * statistics.median(times)

    async def _first_token(self, engine: EmbeddedEngine, name: str, token_ids: tuple[int, ...]) -> float:
        begin = time.perf_counter()
        async for _ in engine.sample(request(name, token_ids, 1)):
            pass
        return time.perf_counter() - begin


class OracleSide:
    """Measures transformers with its own cache; a batch repeats one prompt, so that it needs no padding."""

    def __init__(self, prompts: list[tuple[int, ...]], threads_count: int) -> None:
        # by name: the default install has neither, and only the baselines need them
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(threads_count)
        self.torch = torch
        self.prompt = prompts[0]
        self.model = transformers.DeepseekV4ForCausalLM.from_pretrained(DEFAULT_CHECKPOINT, dtype=torch.float32).eval()

    def generate(self, streams_count: int, tokens_count: int) -> float:
        """Tokens a second over all streams, from the first one on."""
        prompt = self.torch.tensor([self.prompt] * streams_count)
        times: list[float] = []

        def note(ids: Any, _: Any) -> Any:
            times.append(time.perf_counter())
            return self.torch.zeros(len(ids), dtype=self.torch.bool)

        self.model.generate(
            prompt,
            attention_mask=self.torch.ones_like(prompt),
            max_new_tokens=tokens_count + 1,
            min_new_tokens=tokens_count + 1,
            do_sample=False,
            stopping_criteria=[note],
        )
        return streams_count * (len(times) - 1) / (times[-1] - times[0])

    def loop(self, streams_count: int, tokens_count: int) -> float:
        """The same without `generate`: the network, its cache, the likeliest token."""
        decoder, head = self.model.model, self.model.lm_head
        with self.torch.inference_mode():
            out = decoder(self.torch.tensor([self.prompt] * streams_count), use_cache=True)
            token = head(out.last_hidden_state[:, -1:]).argmax(-1)
            begin = time.perf_counter()
            for _ in range(tokens_count):
                out = decoder(token, past_key_values=out.past_key_values, use_cache=True)
                token = head(out.last_hidden_state).argmax(-1)
        return streams_count * tokens_count / (time.perf_counter() - begin)

    def prefill(self) -> float:
        """Prompt tokens a second, first token included."""
        with self.torch.inference_mode():
            begin = time.perf_counter()
            out = self.model.model(self.torch.tensor([self.prompt]), use_cache=True)
            self.model.lm_head(out.last_hidden_state[:, -1:]).argmax(-1)
        return len(self.prompt) / (time.perf_counter() - begin)


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_memory(prompts: list[tuple[int, ...]]) -> dict[str, float]:
    """Resident bytes that a sequence adds, after a prompt and with a full window, and its state's arithmetic size."""
    model, figures, kept = Model(load_checkpoint()), {}, []
    text = tuple(token_id for prompt in prompts for token_id in prompt)
    for name, token_ids in (("prompt", prompts[0]), ("full_window", text[:1100])):
        chunks = [token_ids[i : i + 128] for i in range(0, len(token_ids), 128)]
        warm = State(model)  # touches what all steps share
        for chunk in chunks:
            model.step([Chunk(warm, chunk)])
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what loading has freed is not taken again uncounted
        before, states = resident_bytes(), [State(model) for _ in range(STATES)]
        for chunk in chunks:
            for state in states:
                model.step([Chunk(state, chunk)])
        figures[f"{name}_bytes"] = (resident_bytes() - before) / STATES
        figures[f"{name}_arithmetic_bytes"] = float(len(warm.pack()))
        kept += [warm, *states]  # what is freed might be taken again, and not counted
    for state in kept:
        state.close()
    model.close()
    return figures


async def measure(
    rounds: int, own_tokens: int, oracle_tokens: int, beside: tuple[int, ...], threads_count: int
) -> dict[str, Any]:
    """Every figure of every side in each round; baselines at `beside` streams, at several in the last round alone."""
    prompts = load_prompts()
    memory = measure_memory(prompts)
    own, oracle = EmbeddedSide(prompts, threads_count), OracleSide(prompts, threads_count)
    await own.open()
    samples: list[dict[str, tuple[float, ...]]] = []
    for number in range(rounds + 1):
        row: dict[str, tuple[float, ...]] = {}
        for count in STREAMS:
            figures = [await own.decode(count, own_tokens)]
            if count in beside and (count == 1 or number == rounds):
                figures += [oracle.generate(count, oracle_tokens), oracle.loop(count, oracle_tokens)]
            row[f"decode_{count}_tokens_per_s"] = tuple(figures)
        row["prefill_tokens_per_s"] = (await own.prefill(), oracle.prefill())
        row["fork_first_token_ms"] = (await own.fork(20),)
        samples.append(row)
    facts = {"rounds": rounds, "threads": threads_count, "build": own.engine.info.build}
    await own.close()
    return {"facts": facts, "memory": memory, **summarize(samples[1:])}  # the first one only warmed up


def summarize(samples: list[dict[str, tuple[float, ...]]]) -> dict[str, Any]:
    """Medians: of each side, and of each round's ratios."""

    def middle(name: str, side: int) -> float:
        return statistics.median(sample[name][side] for sample in samples if len(sample[name]) > side)

    def ratio(over: str, under: str, side: int = 0) -> float:
        return statistics.median(sample[over][0] / sample[under][side] for sample in samples)

    names = list(samples[-1])
    single = "decode_1_tokens_per_s"
    return {
        "figures": {name: middle(name, 0) for name in names},
        "transformers": {name: middle(name, 1) for name in names if len(samples[-1][name]) > 1},
        "torch_loop": {name: middle(name, 2) for name in names if len(samples[-1][name]) > 2},
        "ratios": {
            "single_stream_over_transformers": ratio(single, single, 1),
            "single_stream_over_torch_loop": ratio(single, single, 2),
            "16_streams_over_single": ratio("decode_16_tokens_per_s", single),
            "prefill_over_single": ratio("prefill_tokens_per_s", single),
        },
    }


def goals_of(result: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """Each goal: what it is about, what was measured, what is wanted, whether it is met."""
    ratios, memory = result["ratios"], result["memory"]
    fork = result["figures"]["fork_first_token_ms"]
    after_prompt = memory["prompt_bytes"] / memory["prompt_arithmetic_bytes"]
    at_full = memory["full_window_bytes"] / memory["full_window_arithmetic_bytes"]
    rows = [
        ("single stream / transformers", ratios["single_stream_over_transformers"], 10, True),
        ("16 streams / single stream", ratios["16_streams_over_single"], 4, True),
        ("prefill / single stream", ratios["prefill_over_single"], 3, True),
        (f"first token after a forked prefix of {PREFIX_TOKENS}, ms", fork, 5, False),
        ("memory / arithmetic size, after a prompt", after_prompt, 2, False),
        ("memory / arithmetic size, window full", at_full, 2, False),
    ]
    return [
        (what, value, f"{'>=' if least else '<='} {bound}", value >= bound if least else value <= bound)
        for what, value, bound, least in rows
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    table = Table(title="Embedded engine beside transformers and a torch loop (medians)")
    for heading in ("", "embedded", "transformers", "torch loop"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in result["figures"].items():
        others = [result[side].get(name) for side in ("transformers", "torch_loop")]
        table.add_row(name, f"{value:,.1f}", *("" if other is None else f"{other:,.1f}" for other in others))
    for name, value in result["memory"].items():
        table.add_row(name, f"{value:,.0f}")
    console.print(table)
    goals = Table(title="Goals")
    for heading in ("", "measured", "wanted", "met"):
        goals.add_column(heading, justify="right" if heading else "left")
    for what, value, wanted, is_met in goals_of(result):
        goals.add_row(what, f"{value:.2f}", wanted, "yes" if is_met else "no")
    console.print(goals)
    facts = result["facts"]
    console.print(f"{facts['rounds']} rounds, {facts['threads']} compute threads a side, {platform.machine()}")


def main(arguments: list[str] | None = None) -> int:
    """Run as a command; 1 if a single stream is not 10 times as fast as transformers."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds of fewer tokens, baselines at 1 stream")
    parser.add_argument("--threads", type=int, default=2, help="compute threads of every side (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # the baselines' deprecations
    plan = (3, 64, 8, (1,)) if options.quick else (5, 200, 16, (1, 16))
    result = asyncio.run(measure(*plan, options.threads))
    result["goals"] = {what: {"measured": value, "met": is_met} for what, value, _, is_met in goals_of(result)}
    if options.json:
        print(json.dumps(result))
    else:
        show(result, Console())
    return 0 if result["ratios"]["single_stream_over_transformers"] >= 10 else 1


if __name__ == "__main__":
    sys.exit(main())
