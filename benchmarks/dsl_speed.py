"""What the chat language costs: encoding and parsing against PyPI renderers and vLLM's Python parser.

All contenders take turns within each round, on the same tokenizer and the same data; figures are
medians over rounds.  A baseline that this interpreter lacks runs in a worker process under
`--python`; one that is nowhere is reported as missing.  renderers decodes ids and parses text;
vLLM's parser runs without vLLM around it (three imports of its server replaced by stubs): its
state machine over the whole text and its argument converter, without tool ids and type coercion.

See: docs/formats/toolcall_dsl.md, "Costs".
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER_FILE = ROOT / "rollout/engines/embedded/checkpoint/tokenizer.json"
LONG_BYTES = 1_000_000
MIDDLE_BYTES = 10_000
"""renderers takes time that grows with the square of a turn, so it gets no longer argument than this."""
TURNS = 100
RENDERERS_NEEDS = "renderers 0.1.12 and httpx"
Passes = dict[str, Callable[[], object]]

WORDS = [
    "the",
    "parser",
    "reads",
    "a",
    "file;",
    "then",
    "it",
    "runs",
    "make",
    "2>&1",
    "and",
    "looks",
    "for",
    "错误",
    "\n",
]


def prose(rng: random.Random, words_count: int) -> str:
    """Text with some lines and some characters beyond ASCII."""
    return " ".join(rng.choices(WORDS, k=words_count))


def call(rng: random.Random) -> dict[str, Any]:
    """One call with two texts and two JSON values."""
    arguments = {"command": prose(rng, 40), "path": "src/a.py", "timeout": 30, "flags": ["-v", {"deep": True}]}
    return {"name": "bash", "arguments": json.dumps(arguments, ensure_ascii=False)}


def workload() -> dict[str, Any]:
    """A conversation of tool turns to encode, and its assistant turns (with one long one) to parse."""
    rng = random.Random(1)  # noqa: S311  the same data each time
    schema = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
    tools = [{"type": "function", "function": {"name": "bash", "description": "run", "parameters": schema}}]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": prose(rng, 100)},
        {"role": "user", "content": prose(rng, 200)},
    ]
    for turn in range(TURNS):
        calls = [{"id": f"{turn}-{i}", "type": "function", "function": call(rng)} for i in range(2)]
        answer = {"role": "assistant", "reasoning_content": prose(rng, 150), "content": prose(rng, 20)}
        messages.append(answer | {"tool_calls": calls})
        messages += [{"role": "tool", "tool_call_id": each["id"], "content": prose(rng, 60)} for each in calls]
    return {"tools": tools, "messages": messages}


def completions(told: Mapping[str, Any]) -> tuple[list[str], str, str]:
    """What a model would have sampled: the turns of the conversation, and two turns with one long argument each."""
    from toolcall_dsl import V4_0731, encode_text

    context = [{"role": "system", "content": "", "tools": told["tools"]}, {"role": "user", "content": ""}]
    turns = [message for message in told["messages"] if message["role"] == "assistant"]
    texts = [encode_text([turn], thinking=True, context=context, dialect=V4_0731) for turn in turns]
    line = "for index, value in enumerate(values):  # a < b\n"
    long: list[str] = []
    for size in (MIDDLE_BYTES, LONG_BYTES):
        function = {"name": "write", "arguments": json.dumps({"text": line * (size // len(line))})}
        calls = [{"id": "l", "function": function}]
        turn = {"role": "assistant", "reasoning_content": "r", "content": "", "tool_calls": calls}
        long.append(encode_text([turn], thinking=True, context=context, dialect=V4_0731))
    return texts, long[0], long[1]


def ours(told: Mapping[str, Any]) -> Passes:
    """This package."""
    from toolcall_dsl import V4_0731, Tokenizer, encode, parse, parse_text

    tokenizer = Tokenizer.from_file(TOKENIZER_FILE)
    messages = [{**told["messages"][0], "tools": told["tools"]}, *told["messages"][1:]]

    def encoded() -> list[int]:
        segments = encode(messages, tokenizer, thinking=True, dialect=V4_0731)
        return [token_id for segment in segments for token_id in segment.token_ids]

    def parsed(ids: list[int]) -> int:
        return len(parse(ids, tokenizer, thinking=True, dialect=V4_0731).calls)

    def parsed_text(text: str) -> int:
        return len(parse_text(text, thinking=True, dialect=V4_0731).calls)

    return {
        "encode": encoded,
        "parse_turns_ids": lambda: sum(map(parsed, told["turns_ids"])),
        "parse_turns_text": lambda: sum(map(parsed_text, told["turns"])),
        "parse_10kb_ids": lambda: parsed(told["middle_ids"]),
        "parse_10kb_text": lambda: parsed_text(told["middle"]),
        "parse_1mb_ids": lambda: parsed(told["long_ids"]),
        "parse_1mb_text": lambda: parsed_text(told["long"]),
    }


def renderers(told: Mapping[str, Any]) -> Passes:
    """DeepSeekV4Renderer of PyPI renderers."""
    import tokenizers
    from renderers.configs import DeepSeekV4RendererConfig
    from renderers.deepseek_v4 import DeepSeekV4Renderer

    inner = tokenizers.Tokenizer.from_file(str(TOKENIZER_FILE))

    class Adapter:
        unk_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            encoding = inner.encode(text, add_special_tokens=False)
            return {"input_ids": encoding.ids, "offset_mapping": encoding.offsets}

        def encode(self, text: str, **_: Any) -> list[int]:
            return list(inner.encode(text, add_special_tokens=False).ids)

        def decode(self, ids: list[int], **_: Any) -> str:
            return str(inner.decode(ids, skip_special_tokens=False))

        def convert_tokens_to_ids(self, token: str) -> int | None:
            found: int | None = inner.token_to_id(token)
            return found

    config = DeepSeekV4RendererConfig(enable_thinking=True, drop_thinking=False)
    renderer = DeepSeekV4Renderer(Adapter(), config)
    tools = [tool["function"] for tool in told["tools"]]

    def parsed(ids: list[int]) -> int:
        return len(renderer.parse_response(ids).tool_calls)

    return {
        "encode": lambda: renderer.render(told["messages"], tools=tools, add_generation_prompt=True).token_ids,
        "parse_turns_ids": lambda: sum(map(parsed, told["turns_ids"])),
        "parse_10kb_ids": lambda: parsed(told["middle_ids"]),
    }


def vllm(told: Mapping[str, Any]) -> Passes:
    """VLLM's parser of an unpacked wheel, its server imports replaced by stubs."""
    if "vllm" not in told:
        raise ModuleNotFoundError("vllm")

    def stub(name: str, *folders: str, **members: object) -> None:
        module = types.ModuleType(name)
        module.__path__ = list(folders)
        vars(module).update(members)
        sys.modules[name] = module

    stub("vllm")
    stub("vllm.parser", f"{told['vllm']}/vllm/parser")
    stub("vllm.parser.engine", f"{told['vllm']}/vllm/parser/engine")
    stub("vllm.parser.engine.parser_engine", ParserEngine=object)
    stub("vllm.tool_parsers")
    stub("vllm.tool_parsers.utils", find_tool_properties=lambda *_: {})
    parser = importlib.import_module("vllm.parser.deepseek_v4")
    machine = importlib.import_module("vllm.parser.engine.streaming_parser_engine")
    kinds = importlib.import_module("vllm.parser.engine.events").EventType
    config = parser.deepseek_v4_config(thinking=True)

    def parsed(text: str) -> int:
        raw: dict[int, list[str]] = {}
        for event in machine.StreamingParserEngine(config, None).parse_complete(text):
            if event.type is kinds.ARG_VALUE_CHUNK:
                raw.setdefault(event.tool_index, []).append(event.value)
        return len([parser._dsml_arg_converter("".join(parts), partial=False) for parts in raw.values()])  # noqa: SLF001

    return {
        "parse_turns_text": lambda: sum(map(parsed, told["turns"])),
        "parse_10kb_text": lambda: parsed(told["middle"]),
        "parse_1mb_text": lambda: parsed(told["long"]),
    }


def serve(name: str, path: str) -> None:
    """A worker: for each case named on stdin, its seconds and what it gave, on stdout; first the cases."""
    passes = CONTENDERS[name](json.loads(Path(path).read_text()))
    print(json.dumps(sorted(passes)), flush=True)
    for line in sys.stdin:
        start_s = time.perf_counter()
        given = passes[line.strip()]()
        print(json.dumps([time.perf_counter() - start_s, given]), flush=True)


class Worker:
    """A contender in a process of its own."""

    def __init__(self, python: str, name: str, path: Path) -> None:
        """ModuleNotFoundError if that interpreter has no such contender."""
        command = [python, __file__, "--worker", name, "--workload", str(path)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        first = self._answer()
        if first is None:
            error = self._process.communicate()[1].strip().splitlines()
            raise ModuleNotFoundError(error[-1] if error else "no answer")
        self.cases: list[str] = first

    def run(self, case: str) -> tuple[float, object]:
        """Seconds of one pass, and what it gave."""
        if self._process.stdin is None:
            raise SystemExit("the worker has no stdin")
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        seconds, given = self._answer()
        return seconds, given

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> Any:
        line = self._process.stdout.readline() if self._process.stdout else ""
        return json.loads(line) if line else None


CONTENDERS: dict[str, Callable[[Mapping[str, Any]], Passes]] = {"dsec": ours, "renderers": renderers, "vllm": vllm}


def stream_us(ids: list[int]) -> list[float]:
    """Microseconds a token in each tenth of a turn that is fed token by token."""
    from toolcall_dsl import V4_0731, StreamParser, Tokenizer

    parser = StreamParser(Tokenizer.from_file(TOKENIZER_FILE), thinking=True, dialect=V4_0731)
    size = len(ids) // 10
    tenths: list[float] = []
    for tenth in range(10):
        part = ids[tenth * size : (tenth + 1) * size]
        start_s = time.perf_counter()
        for token_id in part:
            parser.feed((token_id,))
            while parser.next_event() is not None:
                pass
        tenths.append((time.perf_counter() - start_s) / size * 1e6)
    return tenths


def measure(told: dict[str, Any], python: str, rounds: int) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """(median seconds of each case of each contender, why a contender is missing)."""
    workers: dict[str, Worker] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="dsl_speed.") as folder:
        path = Path(folder, "workload.json")
        path.write_text(json.dumps(told))
        for name in CONTENDERS:
            try:
                workers[name] = Worker(sys.executable if name == "dsec" else python, name, path)
            except ModuleNotFoundError as error:
                missing[name] = str(error)
    taken: dict[str, dict[str, list[float]]] = {name: {case: [] for case in w.cases} for name, w in workers.items()}
    for index in range(rounds + 1):
        for case in workers["dsec"].cases:
            given = {}
            for name, worker in workers.items():
                if case in worker.cases:
                    seconds, given[name] = worker.run(case)
                    taken[name][case] += [seconds] * bool(index)
            if any(value != given["dsec"] for value in given.values()):
                raise SystemExit(f"{case}: the contenders do not agree, so this measurement is worth nothing")
    for worker in workers.values():
        worker.close()
    return {name: {case: statistics.median(s) for case, s in cases.items()} for name, cases in taken.items()}, missing


def report(python: str, unpacked: str | None, rounds: int) -> dict[str, Any]:
    """The JSON object: figures (ours), baselines, ratios (their time by ours), what is missing."""
    from toolcall_dsl import V4_0731, Tokenizer
    from toolcall_dsl.testing import sampled_ids

    tokenizer = Tokenizer.from_file(TOKENIZER_FILE)
    told = workload()
    told["turns"], told["middle"], told["long"] = completions(told)
    told["turns_ids"] = [sampled_ids(text, tokenizer, dialect=V4_0731) for text in told["turns"]]
    for name in ("middle", "long"):
        told[f"{name}_ids"] = sampled_ids(told[name], tokenizer, dialect=V4_0731)
    if unpacked:
        told["vllm"] = unpacked
    medians, missing = measure(told, python, rounds)
    ids = ours(told)["encode"]()
    texts = {"turns": "".join(told["turns"]), "10kb": told["middle"], "1mb": told["long"]}
    sizes = {f"parse_{name}_{kind}": len(text.encode()) for name, text in texts.items() for kind in ("ids", "text")}
    sizes["encode"] = len(tokenizer.decode(ids).encode())  # type: ignore[arg-type]
    speeds = {
        name: {case: {"mb_per_s": round(sizes[case] / median_s / 1e6, 2)} for case, median_s in cases.items()}
        for name, cases in medians.items()
    }
    runs = [stream_us(told["long_ids"]) for _ in range(max(3, rounds // 3))]
    tenths = [statistics.median(column) for column in zip(*runs, strict=True)]
    stream = {"first": round(tenths[0], 2), "middle": round(tenths[5], 2), "last": round(tenths[9], 2)}
    figures: dict[str, Any] = {
        **speeds.pop("dsec"),
        "stream_us_per_token": stream,
        "long_tokens": len(told["long_ids"]),
    }
    ratios: dict[str, Any] = {
        f"{case}_vs_{name}": round(median_s / medians["dsec"][case], 2)
        for name, cases in medians.items()
        if name != "dsec"
        for case, median_s in cases.items()
    }
    ratios["stream_last_by_first_tenth"] = round(tenths[9] / tenths[0], 2)
    return {"figures": figures, "baselines": speeds, "ratios": ratios, "missing": missing}


def show(told: dict[str, Any]) -> None:
    """For people."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="MB/s of text (times as fast as the baseline)")
    names = list(told["baselines"])
    for column in ("case", "dsec", *names):
        shown.add_column(column, justify="right")
    for case, row in told["figures"].items():
        if isinstance(row, dict) and "mb_per_s" in row:
            cells = [
                f"{other[case]['mb_per_s']} ({told['ratios'][f'{case}_vs_{name}']}x)" if case in other else ""
                for name, other in told["baselines"].items()
            ]
            shown.add_row(case, str(row["mb_per_s"]), *cells)
    console = Console()
    console.print(shown)
    console.print("us a token, fed one by one into a 1 MB argument:", told["figures"]["stream_us_per_token"])
    for name, why in told["missing"].items():
        console.print(f"baseline {name} is missing: {why}")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description="Encoding and parsing speed of the chat language against renderers and vLLM's parser.",
        epilog=f"--python PATH is an interpreter that has {RENDERERS_NEEDS} (and regex, for vLLM), such as the one of"
        " `make test-external`; --vllm DIR an unpacked wheel of vllm 0.33.0. example: python benchmarks/dsl_speed.py"
        " --quick --json --python .venv-external/bin/python > dsl_speed.json",
    )
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 21 (under a minute)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: figures, baselines, ratios")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the baselines")
    parser.add_argument("--vllm", metavar="DIR", help="an unpacked vLLM wheel")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--workload", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options.worker, options.workload)
        return
    told = report(options.python, options.vllm, 5 if options.quick else 21)
    print(json.dumps(told)) if options.json else show(told)


if __name__ == "__main__":
    main()
