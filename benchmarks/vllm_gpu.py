"""What vLLM does on a GPU only, seen through its wire: what a crash, a pause and a fork cost, and what they change.

Claims, each a check of its own, over models with random weights that are written here:
`seeds`: a request that goes on from logged tokens with its seed draws what the unbroken one drew (model runner V2).
`pause`: a stream that was paused (`keep`) goes on as if nothing had been.
`kv`: KV that went to files is read back after kill -9, and the tokens stay the same.
`routes`: the experts of lost tokens come back with one more token, row for row (model runner V1, which has no seeds).
`fork`: a Quick Instruction over a long context costs its own tokens only, also from files after kill -9; times need
weights of a real size, hence a model of Qwen3-8B's shape.
`v4`: DeepSeek-V4 with its own kernels, in small: whether it starts, decodes, and goes on after a break; `v4-kv` and
`v4-routes` are `kv` and `routes` over it.

Servers are started one after another on --port, by the Python that has vLLM.  Without a GPU or vLLM nothing is done.
See: docs/serving.md, "Engines".
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from vllm_server import Answer, Server, Setup
from vllm_v4 import read_hashed_experts, write_small_v4

from rollout.engines.vllm.launch import Offload, Preset, tiny_preset
from rollout.engines.vllm.tiny import write_tiny_model

EPILOG = """example:
  python benchmarks/vllm_gpu.py --python .venv-vllm/bin/python
  python benchmarks/vllm_gpu.py --only seeds,kv --json --logs /tmp/vllm-logs
"""
VOCABULARY = 4000
Row = tuple[str, str]


def context(length: int, seed: int) -> list[int]:
    """Tokens that no other seed has in common."""
    chance = random.Random(seed)  # noqa: S311 - tokens, not secrets
    return [chance.randrange(10, VOCABULARY) for _ in range(length)]


def memory(gib: int, *more: str) -> tuple[str, ...]:
    """A fixed room for KV, so that nothing is measured at the start; `--enforce-eager` saves a minute of it."""
    return (f"--kv-cache-memory-bytes={gib << 30}", "--enforce-eager", *more)


def resumed(server: Server, prompt: list[int], whole: list[int], cuts: list[int], seed: int, salt: str) -> list[bool]:
    """For each cut: whether prompt and `whole[:cut]` go on as `whole` did; with `salt`, nothing of them is cached."""
    same = []
    for cut in cuts:
        own = f"{salt}-{cut}" if salt else ""
        rest = server.ask(prompt + whole[:cut], len(whole) - cut, seed, own).tokens
        same.append(rest == whole[cut:])
    return same


def check_seeds(setup: Setup) -> Iterator[Row]:
    """Float32 and bfloat16, each with the prefix cached and computed again."""
    preset = tiny_preset(write_tiny_model(setup.scratch / "tiny"))
    for dtype in ("float32", "bfloat16"):
        with Server(setup, preset, f"seeds-{dtype}", *memory(2, f"--dtype={dtype}")) as server:
            yield f"seeds, {dtype}: start", f"{server.start_s:.0f} s"
            for how in ("cached", "computed again"):
                same: list[bool] = []
                for seed in range(4):
                    prompt = context(40, seed)
                    whole = server.ask(prompt, 128, seed).tokens
                    salt = "" if how == "cached" else f"s{seed}"
                    same += resumed(server, prompt, whole, list(range(1, 128, 9)), seed, salt)
                yield f"seeds, {dtype}, prefix {how}: cuts continued as unbroken", f"{sum(same)} of {len(same)}"


def check_pause(setup: Setup) -> Iterator[Row]:
    """Twice in one stream, a second each."""
    with Server(setup, tiny_preset(write_tiny_model(setup.scratch / "tiny")), "pause", *memory(2)) as server:
        prompt = context(40, 50)
        whole = server.ask(prompt, 1200, 5).tokens
        answer, late = Answer(), []
        reader = threading.Thread(target=lambda: list(server.stream(answer, prompt, 1200, 5)))
        reader.start()
        for count in (100, 500):
            while len(answer.tokens) < count:
                time.sleep(0.001)
            server.post("/pause?mode=keep&clear_cache=false")
            time.sleep(0.2)
            before = len(answer.tokens)
            time.sleep(1.0)
            late.append(len(answer.tokens) - before)
            server.post("/resume")
        reader.join()
        yield "pause keep, twice in a stream of 1,200: the same tokens", str(answer.tokens == whole)
        yield "pause keep: tokens that came while it stood", str(sum(late))


def check_kv(setup: Setup) -> Iterator[Row]:
    """A stream is killed in the middle, and continued by the next process."""
    preset = tiny_preset(write_tiny_model(setup.scratch / "tiny"))
    offload = Offload(folder=setup.scratch / "kv", weight_version="0", memory_gib=4)
    prompt, partial = context(100, 60), Answer()
    with Server(setup, preset, "kv-before", *memory(2), offload=offload) as server:
        whole = server.ask(prompt, 1000, 6, "whole").tokens
        for count in server.stream(partial, prompt, 1000, 6):
            if count >= 700:
                server.kill()
                break
    kept = partial.tokens
    with Server(setup, preset, "kv-after", *memory(2), offload=offload) as server:
        yield "kv: start after kill -9", f"{server.start_s:.0f} s"
        server.ask(context(100 + len(kept), 61), 1, 6)  # what a first request of this length costs only once
        cold = server.ask(context(100 + len(kept), 62), 1, 6)
        rest = server.ask(prompt + kept, 1000 - len(kept), 6)
        yield "kv: tokens read from files, of prompt and logged", f"{rest.cached} of {100 + len(kept)}"
        yield "kv: first token, from files and computed", f"{ms(rest.first_s)} and {ms(cold.first_s)} ms"
        yield "kv: continued as the unbroken one", str(kept + rest.tokens == whole)


def check_routes(setup: Setup) -> Iterator[Row]:
    """The experts of an unbroken stream, and of one that was lost in the middle."""
    folder = write_tiny_model(setup.scratch / "tiny-moe", experts_count=8)
    preset, prompt = tiny_preset(folder), context(40, 70)
    with Server(setup, preset, "routes-before", *memory(2), returns_routes=True) as server:
        whole = server.ask(prompt, 200, 7)
        lost = Answer()
        for count in server.stream(lost, prompt, 200, 7, "other"):
            if count >= 100:
                server.kill()
                break
    assert whole.routes is not None
    yield "routes, at the end of a stream of 40 + 200 tokens: rows", f"{whole.routes.shape} {whole.routes.dtype}"
    yield "routes, before the end", "none" if lost.routes is None else str(lost.routes.shape)
    kept = whole.tokens[:100]
    with Server(setup, preset, "routes-after", *memory(2), returns_routes=True) as server:
        again = server.ask(prompt + kept, 1, 7)
        assert again.routes is not None
        rows = len(again.routes)
        equal = (again.routes == whole.routes[:rows]).all(axis=(1, 2))
        yield "routes, after kill -9 with max_tokens=1: rows equal", f"{int(equal.sum())} of {rows}"
        cached = server.ask(prompt + kept, 1, 7)
        assert cached.routes is not None
        yield (
            "routes, the same over a cached prefix: rows equal",
            (f"{int((cached.routes == again.routes).all(axis=(1, 2)).sum())} of {rows} ({cached.cached} cached)"),
        )
        same = resumed(server, prompt, whole.tokens, list(range(1, 200, 40)), 7, "")
        yield "routes: cuts continued as unbroken (runner V1)", f"{sum(same)} of {len(same)}"


BIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "hidden_act": "silu",
    "attention_bias": False, "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def check_fork(setup: Setup) -> Iterator[Row]:
    """A context and one token more, over a live parent; against a context of that length that nobody has."""
    folder = write_tiny_model(setup.scratch / "qwen3-8b-shape")
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(BIG, indent=1))
    preset = Preset(model=str(folder), name="8b", context_tokens_count=32768, flags=("--load-format=dummy",))
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
    room = (f"--kv-cache-memory-bytes={16 << 30}", f"--compilation-config={json.dumps(graphs)}")
    offload = Offload(folder=setup.scratch / "kv-big", weight_version="0", memory_gib=16)
    lengths = (1000, 8000, 30000)
    with Server(setup, preset, "fork", *room, offload=offload) as server:
        yield "fork, 8B shape: start", f"{server.start_s:.0f} s"
        for length in lengths:
            yield from _forks(server, length)
    with Server(setup, preset, "fork-after", *room, offload=offload) as server:
        for length in lengths:
            server.ask(context(length + 1, 990 + length), 1)
            cold = [server.ask(context(length, 700 + length + i), 1) for i in range(3)]
            disk = server.ask(context(length, length), 1)
            warm = server.ask(context(length, length), 1)
            times = f"{ms(disk.first_s)}, {ms(warm.first_s)} and {ms(median(cold))} ms"
            yield f"kv after kill -9, 8B shape, {length:,} tokens: first token from files, GPU, computed", times
            yield f"kv after kill -9, {length:,} tokens: read from files", str(disk.cached)


def _forks(server: Server, length: int) -> Iterator[Row]:
    parent, answer = context(length, length), Answer()
    server.ask(context(length, 900 + length), 2)
    reader = threading.Thread(target=lambda: list(server.stream(answer, parent, 400, 1)))
    reader.start()
    while len(answer.tokens) < 10:
        time.sleep(0.001)
    forks, colds, rounds = [], [], 9 if length < 10000 else 3
    for number in range(rounds):
        forks.append(server.ask([*parent, 5], 1, 1, priority=-1))
        colds.append(server.ask([*context(length, 10_000 + length + number), 5], 1, 1, priority=-1))
    alive = reader.is_alive()
    reader.join()
    yield f"fork of {length:,} tokens{', parent decoding' if alive else ''}: cached", str(forks[-1].cached)
    yield f"fork of {length:,} tokens: first token, and computed", f"{ms(median(forks))} and {ms(median(colds))} ms"


def _v4_server(setup: Setup, name: str, runner: str, **how: Any) -> Server:
    environment = (("VLLM_USE_V2_MODEL_RUNNER", str(int(runner == "V2"))), ("VLLM_DEEP_GEMM_WARMUP", "skip"))
    folder = setup.scratch / "v4"
    if not (folder / "model.safetensors").exists():
        write_small_v4(folder)
    preset = Preset(
        model=str(folder),
        name="v4",
        block_tokens_count=256,
        context_tokens_count=8192,
        flags=("--kv-cache-dtype=fp8",),
        environment=environment,
    )
    return Server(setup, preset, name, *memory(4, "--max-num-batched-tokens=2048"), **how)


def check_v4(setup: Setup) -> Iterator[Row]:
    """Four layers with all three kinds of attention, hashed and learned routes, under both model runners."""
    for runner in ("V1", "V2"):
        with _v4_server(setup, f"v4-{runner}", runner) as server:
            yield f"v4, runner {runner}: start", f"{server.start_s:.0f} s"
            yield from _v4(server, runner)


def _v4(server: Server, runner: str) -> Iterator[Row]:
    prompt = context(700, 80)
    whole = server.ask(prompt, 64, 8)
    yield f"v4, {runner}: decodes, first tokens", str(whole.tokens[:8])
    again = server.ask(prompt, 64, 8, "again").tokens
    yield f"v4, {runner}: the same request again, tokens alike", f"{alike(again, whole.tokens)} of 64"
    for how, salt in (("cached", ""), ("computed again", "new")):
        same = resumed(server, prompt, whole.tokens, list(range(1, 64, 8)), 8, salt)
        yield f"v4, {runner}, prefix {how}: cuts continued as unbroken", f"{sum(same)} of {len(same)}"
    for length in (4000, 8000):
        long = context(length, 81)
        server.ask(long, 8, 8)
        forks = [server.ask([*long, 5 + i], 1, 8) for i in range(4)]
        colds = [server.ask(context(length + 1, length + i), 1, 8) for i in range(4)]
        yield f"v4, {runner}, fork of {length:,} tokens: cached", str(forks[-1].cached)
        times = f"{ms(median(forks[1:]))} and {ms(median(colds[1:]))} ms"  # the first ones compile what they need
        yield f"v4, {runner}, fork of {length:,} tokens: first token, and computed", times


def check_v4_kv(setup: Setup) -> Iterator[Row]:
    """V4's compressed KV, windows and compressor states in files; a stream is killed, and the next process goes on."""
    offload = Offload(folder=setup.scratch / "kv-v4", weight_version="0", memory_gib=4)
    prompt, partial = context(3000, 83), Answer()
    with _v4_server(setup, "v4-kv-before", "V2", offload=offload) as server:
        whole = server.ask(prompt, 600, 9, "whole").tokens
        for count in server.stream(partial, prompt, 600, 9):
            if count >= 400:
                server.kill()
                break
    kept = partial.tokens
    yield "v4 kv: a stream beside the unbroken one, tokens alike", f"{alike(kept, whole)} of {len(kept)}"
    files = [path for path in offload.folder.rglob("*") if path.is_file()]
    yield "v4 kv: files, MB", f"{len(files)}, {sum(path.stat().st_size for path in files) / 1e6:.1f}"
    with _v4_server(setup, "v4-kv-after", "V2", offload=offload) as server:
        yield "v4 kv: start after kill -9", f"{server.start_s:.0f} s"
        server.ask(context((3000 + len(kept)) % 256, 90), 1, 9)  # compiles what is left to compute of a read prefix
        colds = [server.ask(context(3000 + len(kept), 84 + i), 1, 9) for i in range(3)]
        rest = server.ask(prompt + kept, 600 - len(kept), 9)
        new = server.ask(prompt + kept, 600 - len(kept), 9, "new")
        yield "v4 kv: tokens read from files, of prompt and logged", f"{rest.cached} of {3000 + len(kept)}"
        yield "v4 kv: first token, from files and computed", f"{ms(rest.first_s)} and {ms(median(colds[1:]))} ms"
        for how, answer in (("from files", rest), ("computed again", new)):
            most = len(answer.tokens)
            yield f"v4 kv, {how}: alike to the unbroken one", f"{alike(answer.tokens, whole[len(kept) :])} of {most}"


def check_v4_routes(setup: Setup) -> Iterator[Row]:
    """The experts of hashed and learned layers, and those of a stream that was lost, with one token more."""
    prompt, lost = context(700, 85), Answer()
    with _v4_server(setup, "v4-routes-before", "V1", returns_routes=True) as server:
        whole = server.ask(prompt, 64, 10)
        for count in server.stream(lost, prompt, 64, 10, "other"):
            if count >= 32:
                server.kill()
                break
    assert whole.routes is not None
    yield "v4 routes, at the end of 700 + 64 tokens: rows", f"{whole.routes.shape} {whole.routes.dtype}"
    table = read_hashed_experts(setup.scratch / "v4")[(prompt + whole.tokens)[: len(whole.routes)]]
    hashed = (np.sort(whole.routes[:, 0]) == np.sort(table)).all(axis=1)
    yield "v4 routes of the hashed layer: rows as its table says", f"{int(hashed.sum())} of {len(hashed)}"
    with _v4_server(setup, "v4-routes-after", "V1", returns_routes=True) as server:
        for how, salt in (("after kill -9 with max_tokens=1", ""), ("the same computed once more", "new")):
            again = server.ask(prompt + whole.tokens[:32], 1, 10, salt).routes
            assert again is not None
            equal = (np.sort(again) == np.sort(whole.routes[: len(again)])).all(axis=2)
            layers = ", ".join(str(int(one)) for one in equal.sum(axis=0))
            yield f"v4 routes, {how}: rows equal in each layer", f"{layers} of {len(again)}"


def alike(one: list[int], other: list[int]) -> int:
    """How many tokens they begin with in common."""
    return next((i for i, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), len(one))


def median(answers: list[Answer]) -> float:
    """Of the times to the first token."""
    return statistics.median(one.first_s for one in answers)


def ms(seconds: float) -> str:
    """Milliseconds, in words."""
    return f"{seconds * 1e3:.1f}"


CHECKS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "seeds": check_seeds, "pause": check_pause, "kv": check_kv, "routes": check_routes, "fork": check_fork,
    "v4": check_v4, "v4-kv": check_v4_kv, "v4-routes": check_v4_routes,
}  # fmt: skip


def facts(python: str) -> dict[str, str]:
    """Versions and device as that Python sees them; empty if it has no vLLM or no GPU."""
    code = (
        "import json, torch; from importlib.metadata import version as v; assert torch.cuda.is_available();"
        "print(json.dumps({n: v(n) for n in ('vllm', 'torch', 'transformers', 'triton')} |"
        "{'device': torch.cuda.get_device_name(0)}))"
    )
    asked = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return json.loads(asked.stdout) if asked.returncode == 0 else {}


def main(arguments: list[str] | None = None) -> int:
    """Run as a command; 1 if a check did not come to its end."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="the Python that has vLLM installed")
    parser.add_argument("--only", default=",".join(CHECKS), help="checks, by name (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8200, help="where the servers listen")
    parser.add_argument("--scratch", type=Path, help="where models and KV files go: 20 GB for all checks")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this directory")
    parser.add_argument("--quick", action="store_true", help="seeds and pause only")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_args(arguments)
    found = facts(options.python)
    if not found:
        print(f"{options.python} has no vLLM, or sees no GPU: nothing to measure")
        return 0
    rows, failed = [], {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        logs = options.logs or Path(scratch) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        setup = Setup(options.python, options.port, logs, Path(scratch), found["vllm"])
        for name in ("seeds", "pause") if options.quick else options.only.split(","):
            try:
                for row in CHECKS[name](setup):
                    rows.append(row)
                    if not options.json:
                        print(": ".join(row), flush=True)
            except (AssertionError, OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
                failed[name] = f"{type(error).__name__}: {error}"
                print(f"{name} failed: {failed[name]}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"figures": dict(rows), "failed": failed, "facts": found}))
    else:
        print(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
