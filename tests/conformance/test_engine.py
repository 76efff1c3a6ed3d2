"""What every engine behind `rollout/engine.py` must do; one list of behaviours, run against each engine."""

import hashlib
import importlib
import json
import pkgutil
import random
import shutil
import struct
from pathlib import Path

import msgspec
import pytest

from rollout import conformance, context
from rollout.conformance.check import Check, Subject, Trait
from rollout.conformance.suite import ENGINE_CHECKS, checks_for
from rollout.engine import Engine, EngineInfo
from rollout.engines.embedded.batching import Limits
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.engines.pool import EnginePool
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.testing import VOCAB_COUNT, WireDouble, write_checkpoint
from rollout.main import load_tokenizer
from rollout.testing import Reply, ScriptedEngine, check_engine

GOLDEN = Path(__file__).parents[1] / "golden/embedded_prompts.json"
PROMPTS = [tuple(prompt["token_ids"]) for prompt in json.loads(GOLDEN.read_text())]
TOKENIZER = load_tokenizer()
STORY = " ".join(f"line {number} of the file says so" for number in range(12))
EOS_ID = 1
ALL: frozenset[Trait] = frozenset({"draws", "keeps", "exact", "versions", "masks", "fills", "shapes"})
LIMITS = {
    "embedded": Limits(),
    "embedded, one at a time and nothing kept": Limits(
        running_max=1, state_bytes_max=0, prefill_tokens_max=7, rounds_max=1
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


def other_weights(folder: Path, number: int) -> Path:
    """The shipped checkpoint with the rows of its head in another order."""
    target = folder / f"weights-{number}"
    if target.exists():
        return target
    shutil.copytree(DEFAULT_CHECKPOINT, target)
    path = target / "model.safetensors"
    data = path.read_bytes()
    start = 8 + struct.unpack_from("<Q", data)[0]
    begin, end = (start + offset for offset in json.loads(data[8:start])["lm_head.weight"]["data_offsets"])
    shift = begin + 512 * 37 * number
    path.write_bytes(data[:begin] + data[shift:end] + data[begin:shift] + data[end:])
    return target


def shorter(folder: Path) -> Path:
    """The shipped checkpoint with half the context."""
    target = folder / "shorter"
    if not target.exists():
        shutil.copytree(DEFAULT_CHECKPOINT, target)
        path = target / "tokenizer_config.json"
        said = json.loads(path.read_text())
        path.write_text(json.dumps({**said, "model_max_length": said["model_max_length"] // 2}))
    return target


def other_script(folder: Path, number: int) -> Path:
    target = folder / f"script-{number}"
    target.mkdir(exist_ok=True)
    (target / "weights").write_bytes(hashlib.sha256(bytes([number])).digest())
    return target


def embedded(folder: Path, limits: Limits) -> Subject:
    prompts = tuple(PROMPTS[i % 4][: 40 + 83 * i] for i in range(5))
    return Subject(
        make=lambda: EmbeddedEngine(limits=limits),
        checkpoint=lambda number: other_weights(folder, number),
        folder=folder,
        prompts=(PROMPTS[0], *prompts),
        stop_id=EOS_ID,
        vague=(0, 17, 900),
        long_count=240,
        traits=ALL if limits.state_bytes_max else ALL - {"keeps"},
        misfit=lambda: shorter(folder),
    )


def story(_session: str, _turn: int) -> Reply:
    return Reply(reasoning=STORY, content=STORY)


def scripted(folder: Path) -> Subject:
    texts = ("Remove the file a.txt.", "Write b.txt.", "Count the lines of c.", "Sort d.txt.")
    return Subject(
        make=lambda: ScriptedEngine(TOKENIZER, story, chunk_tokens_count=3),
        checkpoint=lambda number: other_script(folder, number),
        folder=folder,
        prompts=tuple(tuple(i for s in context.prompt(text, TOKENIZER, "high") for i in s.token_ids) for text in texts),
        stop_id=EOS_ID,
        traits=ALL - {"draws", "fills", "shapes"},
    )


def vllm(folder: Path, *, is_pool: bool) -> Subject:
    """Over the double of its wire, once or twice; tests/external/vllm has the server itself."""
    source = random.Random(5)
    base = folder / "hash-0"
    prompts = tuple((0, *(source.randrange(2, VOCAB_COUNT) for _ in range(210 + 30 * i))) for i in range(4))

    def make() -> Engine:
        engines = [EngineWithServer(write_checkpoint(base, 0)) for _ in "ab"]
        return EnginePool(dict(zip("ab", engines, strict=True)), 60.0) if is_pool else engines[0]

    return Subject(
        make=make,
        checkpoint=lambda number: write_checkpoint(folder / f"hash-{number}", number),
        folder=folder,
        prompts=prompts,
        stop_id=EOS_ID,
        vague=(0, 17, 300),
        traits=ALL - {"keeps", "versions"},
        misfit=lambda: write_checkpoint(folder / "smaller", 0, VOCAB_COUNT // 2),
    )


class EngineWithServer(VllmEngine):
    """An adapter that has a server of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__("http://127.0.0.1:1")
        self.server = WireDouble(folder, tells_routes=True)

    async def open(self) -> None:
        await self.server.start()
        self._connection.url = self.server.url
        await super().open()

    async def close(self) -> None:
        await super().close()
        await self.server.stop()


def subjects(folder: Path) -> dict[str, Subject]:
    others = {"vllm": vllm(folder, is_pool=False), "a pool of vLLM": vllm(folder, is_pool=True)}
    others["scripted"] = scripted(folder)
    return {name: embedded(folder, limits) for name, limits in LIMITS.items()} | others


CASES = [
    pytest.param(name, check, id=f"{name}: {check.name}")
    for name, subject in subjects(Path()).items()
    for check in checks_for(subject)
]


@pytest.mark.parametrize(("name", "check"), CASES)
async def test_an_engine_conforms(folder: Path, name: str, check: Check) -> None:
    await check.run(subjects(folder)[name])


def test_every_check_of_engines_is_in_the_list_once() -> None:
    names = [f"rollout.conformance.{found.name}" for found in pkgutil.iter_modules(conformance.__path__)]
    modules = [importlib.import_module(name) for name in names]
    written = {value.name for module in modules for value in vars(module).values() if isinstance(value, Check)}
    assert len(ENGINE_CHECKS) == len(written)
    assert {check.name for check in ENGINE_CHECKS} == written


class NamelessEngine(ScriptedEngine):
    @property
    def info(self) -> EngineInfo:
        return msgspec.structs.replace(super().info, name="")


async def test_who_writes_an_engine_is_told_which_checks_it_fails(folder: Path) -> None:
    subject = scripted(folder)
    flawed = msgspec.structs.replace(subject, make=lambda: NamelessEngine(TOKENIZER, lambda *_: Reply(content=STORY)))
    outcomes = await check_engine(flawed)
    assert [outcome.name for outcome in outcomes] == [check.name for check in checks_for(subject)]
    problems = {outcome.name: outcome.problem for outcome in outcomes if outcome.problem}
    assert "a_cancelled_consumer_leaves_the_engine_usable" not in problems
    assert problems["info_names_the_weights_and_the_build"].startswith("NotConformingError: EngineInfo(name=''")
