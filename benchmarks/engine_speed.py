"""How fast the embedded engine decodes and prefills, against transformers on the same weights.

Claim: on one core the C engine gives at least 300 tokens/s to a single stream, an order of magnitude above
transformers' DeepseekV4ForCausalLM (bf16 weights upcast to float32, cached decode), with the same arithmetic
precision.  Measured through the public port, so batching, sampling and asyncio are inside the figures.  Both
sides get one compute thread; rounds alternate between them, figures are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
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
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.engines.embedded.engine import EmbeddedEngine

EPILOG = """example:
  python benchmarks/engine_speed.py --quick
  python benchmarks/engine_speed.py --json > engine_speed.json
"""
PROMPTS = Path(__file__).resolve().parents[1] / "tests/golden/embedded_prompts.json"
STREAMS = (1, 8, 16)


def load_prompts() -> list[tuple[int, ...]]:
    """Real prompts of the checkpoint's task families, 366 to 389 tokens."""
    return [tuple(entry["token_ids"]) for entry in json.loads(PROMPTS.read_text())]


class EmbeddedSide:
    """Measures the engine through its port; nothing is retained between requests."""

    def __init__(self, prompts: list[tuple[int, ...]]) -> None:
        self.prompts = prompts
        self.engine = EmbeddedEngine(limits=Limits(state_bytes_max=0, prefill_tokens_max=128))

    async def decode(self, streams_count: int, tokens_count: int) -> float:
        """Tokens a second over all streams, from the first token of the last prompt to the end."""
        ready, tokens, begin = asyncio.Event(), 0, 0.0
        waiting = streams_count

        async def stream(index: int) -> None:
            nonlocal waiting, tokens, begin
            first = True
            async for chunk in self.engine.sample(self._request(index, tokens_count)):
                if first:
                    first, waiting = False, waiting - 1
                    if waiting == 0:
                        begin = time.perf_counter()
                        ready.set()
                elif ready.is_set():
                    tokens += len(chunk.token_ids)

        await asyncio.gather(*(stream(index) for index in range(streams_count)))
        return tokens / (time.perf_counter() - begin)

    async def prefill(self) -> float:
        """Prompt tokens a second, first token included."""
        prompt = self.prompts[0]
        begin = time.perf_counter()
        async for _ in self.engine.sample(self._request(0, 1)):
            pass
        return len(prompt) / (time.perf_counter() - begin)

    def _request(self, index: int, tokens_count: int) -> SampleRequest:
        return SampleRequest(
            session=str(index),
            token_ids=self.prompts[index % len(self.prompts)],
            sampling=Sampling(temperature=1.0, seed=index),
            stream_key=index,
            tokens_count_max=tokens_count,
            stop_ids=frozenset(),
        )


class OracleSide:
    """Measures transformers with its own cache; a batch repeats one prompt, so that it needs no padding."""

    def __init__(self, prompts: list[tuple[int, ...]]) -> None:
        # by name: the default install has neither, and only the baseline needs them
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(1)
        self.torch = torch
        self.prompt = prompts[0]
        self.model = transformers.DeepseekV4ForCausalLM.from_pretrained(DEFAULT_CHECKPOINT, dtype=torch.float32).eval()

    def decode(self, streams_count: int, tokens_count: int) -> float:
        """Greedy cached decode of `tokens_count` tokens after the prompt, over all streams."""
        torch = self.torch
        with torch.no_grad():
            prompt = torch.tensor([self.prompt] * streams_count)
            out = self.model(prompt, use_cache=True, logits_to_keep=1)
            begin = time.perf_counter()
            for _ in range(tokens_count):
                token = out.logits[:, -1:].argmax(-1)
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
        return streams_count * tokens_count / (time.perf_counter() - begin)

    def prefill(self) -> float:
        """Prompt tokens a second."""
        torch = self.torch
        with torch.no_grad():
            begin = time.perf_counter()
            self.model(torch.tensor([self.prompt]), use_cache=True, logits_to_keep=1)
        return len(self.prompt) / (time.perf_counter() - begin)


async def measure(rounds: int, own_tokens: int, oracle_tokens: int) -> dict[str, Any]:
    """Medians of `rounds` alternating rounds."""
    prompts = load_prompts()
    own, oracle = EmbeddedSide(prompts), OracleSide(prompts)
    await own.engine.open()
    names = [f"decode_{count}_streams_tokens_per_s" for count in STREAMS] + ["prefill_tokens_per_s"]
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds + 1):  # the first one only warms up
        for name, count in zip(names, (*STREAMS, 0), strict=True):
            if count:
                pair = (await own.decode(count, own_tokens), oracle.decode(count, oracle_tokens))
            else:
                pair = (await own.prefill(), oracle.prefill())
            if number:
                samples[name].append(pair)
    build = own.engine.info.build
    await own.engine.close()
    figures = {name: statistics.median(a for a, _ in pairs) for name, pairs in samples.items()}
    baselines = {name: statistics.median(b for _, b in pairs) for name, pairs in samples.items()}
    ratios = {name: statistics.median(a / b for a, b in pairs) for name, pairs in samples.items()}
    return {"figures": figures, "baselines": baselines, "ratios": ratios, "facts": {"rounds": rounds, "build": build}}


def show(result: dict[str, Any], console: Console) -> None:
    """A table for people."""
    table = Table(title="Embedded engine against transformers, tokens a second (median)")
    for heading in ("", "embedded", "transformers", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in result["figures"].items():
        table.add_row(name, f"{value:,.0f}", f"{result['baselines'][name]:,.1f}", f"{result['ratios'][name]:.1f}x")
    console.print(table)
    console.print(f"{result['facts']['rounds']} rounds, one compute thread a side, {platform.machine()}")


def main(arguments: list[str] | None = None) -> int:
    """Run as a command; 1 if the single stream is below 300 tokens/s."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds of fewer tokens, under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # the baseline's deprecations
    rounds, own_tokens, oracle_tokens = (3, 64, 8) if options.quick else (7, 200, 24)
    result = asyncio.run(measure(rounds, own_tokens, oracle_tokens))
    if options.json:
        print(json.dumps(result))
    else:
        show(result, Console())
    return 0 if result["figures"]["decode_1_streams_tokens_per_s"] >= 300 else 1


if __name__ == "__main__":
    sys.exit(main())
