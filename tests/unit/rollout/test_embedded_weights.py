"""Weights and tokenizers that are not what they say are refused by file and name, and harm nobody who draws."""

import asyncio
import contextlib
import ctypes
import itertools
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from rollout.engine import SampleRequest, Sampling
from rollout.engines.embedded.binding import Chunk, Model, State
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT, load_checkpoint
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.engines.embedded.weights import loaded
from rollout.errors import EngineError
from rollout.main import load_tokenizer
from toolcall_dsl import TokenizerError

NORM, HEAD, SINKS = "model.norm.weight", "lm_head.weight", "model.layers.2.self_attn.sinks"
ROUTES, EXPERTS = "model.layers.0.mlp.gate.tid2eid", "model.layers.3.mlp.experts.gate_up_proj"
OTHER = "model.layers.0.input_layernorm.weight"


class Stored(msgspec.Struct):
    """A tensor of a weights file."""

    dtype: str
    shape: list[int]
    content: bytes


Tensors = dict[str, Stored]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEFAULT_CHECKPOINT, tmp_path / "checkpoint"))


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Write the weights again, sound but for what `change` does to the tensors."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {
        name: Stored(entry["dtype"], entry["shape"], data[slice(*(8 + size + at for at in entry["data_offsets"]))])
        for name, entry in header.items()
    }
    change(tensors)
    told, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + len(tensor.content)
        told[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(told).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensor.content for tensor in tensors.values()))


def change_header(folder: Path, change: Callable[[dict], object]) -> None:
    """Let the header say something else of the same bytes."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def with_words(name: str, *words: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        content = bytearray(tensors[name].content)
        struct.pack_into(f"<{len(words)}H", content, 10, *words)
        tensors[name].content = bytes(content)

    return change


def widened(tensors: Tensors, name: str, low: int = 0) -> None:
    halves = memoryview(tensors[name].content).cast("H")
    wide = b"".join(struct.pack("<HH", low, half) for half in halves)
    tensors[name] = Stored("F32", tensors[name].shape, wide)


def scalar(dtype: str = "BF16") -> Stored:
    return Stored(dtype, [1], b"\0\0")


FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop(SINKS), f"tensor {SINKS} is missing"),
    "extra": (lambda t: t.update(odd=scalar()), "1 tensors are none of this model's: odd"),
    "of a layer beyond the last": (lambda t: t.update({"model.layers.6.attn_hc.base": scalar()}), "layers.6.attn_hc"),
    "with a NaN": (with_words(NORM, 0x7FC0), f"tensor {NORM} holds NaN or infinity$"),
    "with NaNs": (
        lambda t: (with_words(NORM, 0x7FC0)(t), with_words(EXPERTS, 0x7FC0)(t)),
        r"holds NaN or infinity \(2 tensors do\)$",
    ),
    "with an infinity": (with_words(EXPERTS, 0xFF80), f"tensor {EXPERTS} holds NaN or infinity"),
    "of another shape": (
        lambda t: setattr(t[HEAD], "shape", [256, 4096]),
        rf"tensor {HEAD} is BF16 \[256, 4096\], not BF16 \[4096, 256\]",
    ),
    "of another type": (
        lambda t: setattr(t[HEAD], "dtype", "F16"),
        rf"tensor {HEAD} is F16 \[4096, 256\], not BF16",
    ),
    "quantized": (lambda t: t.update({HEAD: Stored("F8_E4M3", [4096, 256], bytes(1 << 20))}), "is F8_E4M3"),
    "of more precision than bf16": (
        lambda t: widened(t, NORM, 1),
        f"tensor {NORM} is F32 and holds values",
    ),
    "there twice": (lambda t: t.update({"head.weight": t[HEAD]}), "tensor head.weight is there twice"),
    "a route of floats": (lambda t: setattr(t[ROUTES], "dtype", "F64"), f"{ROUTES} is F64 .* not I64"),
}
LIES: dict[str, tuple[Callable[[dict], object], str]] = {
    "not an object": (lambda header: [header], "its header is not a JSON object"),
    "entries that are none": (lambda header: header.update({NORM: 3}), f"no dtype, shape and offsets of tensor {NORM}"),
    "a shape that is none": (lambda header: header[NORM].update(shape="big"), "no dtype, shape and offsets"),
    "a negative shape": (lambda header: header[NORM].update(shape=[-256]), "no dtype, shape and offsets"),
    "a shape of more sizes than anybody multiplies": (
        lambda header: header[NORM].update(shape=[20_000_000] * 1000),
        f"no dtype, shape and offsets of tensor {NORM}, or a shape of more than 8 dimensions$",
    ),
    "no offsets": (lambda header: header[NORM].update(data_offsets=None), "no dtype, shape and offsets"),
    "offsets beyond the file": (
        lambda header: header[NORM].update(data_offsets=[1 << 40, (1 << 40) + 512]),
        f"tensor {NORM} lies outside the file",
    ),
    "offsets before the file": (lambda header: header[NORM].update(data_offsets=[-512, 0]), "lies outside the file"),
    "bytes that are another's": (
        lambda header: header[NORM].update(data_offsets=header[OTHER]["data_offsets"]),
        f"the bytes before tensor {NORM} are nobody's, or another's too",
    ),
    "fewer bytes than the shape": (lambda header: header[NORM].update(shape=[300]), "has not the bytes of BF16"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_that_is_not_what_the_model_needs_is_named(folder: Path, fault: str) -> None:
    change, why = FAULTS[fault]
    rewrite(folder, change)
    with pytest.raises(EngineError, match=rf"^{folder}/model.safetensors: .*{why}"):
        Model(load_checkpoint(folder))


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_found_out(folder: Path, lie: str) -> None:
    change, why = LIES[lie]
    change_header(folder, change)
    with pytest.raises(EngineError, match=rf"^{folder}/model.safetensors: damaged: .*{why}"):
        load_checkpoint(folder)


def nothing_left(*_: object, **__: object) -> None:
    raise MemoryError


@pytest.mark.parametrize("what", ["weights.bytearray", "weights._bf16", "checkpoint.locate", "checkpoint.merged_ids"])
def test_who_finds_no_memory_for_the_weights_says_that(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    rewrite(folder, lambda tensors: widened(tensors, NORM))
    monkeypatch.setattr(f"rollout.engines.embedded.{what}", nothing_left, raising=False)
    with pytest.raises(EngineError, match=rf"^{folder}.*: cannot be read: out of memory$"):
        Model(load_checkpoint(folder))


@pytest.mark.parametrize("data", [b"\xff" * 8, struct.pack("<Q", 4) + b"{{{{", struct.pack("<Q", 2) + b"{}"])
def test_a_file_that_is_no_safetensors_is_refused(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(EngineError, match=r"model.safetensors: (damaged|tensor model.embed_tokens.weight is missing)"):
        load_checkpoint(folder)


def test_bytes_behind_the_last_tensor_are_refused(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(EngineError, match="4 bytes behind the last tensor are nobody's"):
        load_checkpoint(folder)


def test_weights_in_shards_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(EngineError, match="the weights must be in one, not in shards"):
        load_checkpoint(folder)


@pytest.mark.parametrize("replaced", [False, True])
def test_weights_that_change_between_check_and_load_are_refused(folder: Path, *, replaced: bool) -> None:
    checkpoint, path = load_checkpoint(folder), folder / "model.safetensors"
    if replaced:
        path.rename(folder / "old")
        shutil.copyfile(folder / "old", path)
    else:
        with path.open("r+b") as file:
            file.truncate(1000)
    with pytest.raises(EngineError, match=rf"^{path}: was written to while it was loaded"):
        Model(checkpoint)


def test_weights_that_are_cut_short_while_they_are_copied_are_those_that_were_read(folder: Path) -> None:
    checkpoint, path = load_checkpoint(folder), folder / "model.safetensors"
    first = checkpoint.tensors[0]
    assert first
    stored = path.read_bytes()[first.pieces[0].begin : first.pieces[0].end]
    with loaded(path, checkpoint.tensors, checkpoint.weights_stamp) as addresses:
        os.truncate(path, 0)
        assert addresses[0]
        assert ctypes.string_at(addresses[0], len(stored)) == stored


def test_weights_that_are_written_to_while_they_are_read_end_nothing(folder: Path) -> None:
    path = folder / "model.safetensors"
    stored, is_over = path.read_bytes(), threading.Event()

    def write_in_place() -> None:
        for share in itertools.cycle((1, 2, 3, 4)):
            path.write_bytes(stored[: len(stored) * share // 4])
            if is_over.is_set():
                return

    writer = threading.Thread(target=write_in_place)
    writer.start()
    for _ in range(40):
        with contextlib.suppress(EngineError):
            Model(load_checkpoint(folder)).close()
    is_over.set()
    writer.join()


def logits_of(folder: Path | None = None) -> list[float]:
    model = Model(load_checkpoint(folder))
    state = State(model)
    (logits,) = model.step([Chunk(state, [0, 5, 6, 900], wants_logits=True)])
    state.close()
    model.close()
    assert logits is not None
    return logits


def test_layers_of_mtp_full_precision_of_bf16_values_and_other_names_change_nothing(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["mtp.0.attn.wq_a.weight"] = Stored("F8_E4M3", [2], b"\x7f\x7f")
        tensors["model.mtp.1.emb.weight"] = scalar()
        widened(tensors, NORM)
        widened(tensors, "model.layers.1.attn_hc.fn")
        tensors["head.weight"] = tensors.pop(HEAD)
        tensors["layers.2.attn.attn_sink"] = tensors.pop(SINKS)

    rewrite(folder, change)
    assert logits_of(folder) == logits_of()


@pytest.mark.parametrize(
    ("gone", "theirs"),
    [
        ("model.layers.0.mlp.experts.down_proj", "layers.0.ffn.experts.0.w2.weight"),
        (SINKS, "layers.2.attn.attn_sink"),
        (NORM, "norm.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_named_as_either_kind_of_file_would(folder: Path, gone: str, theirs: str) -> None:
    rewrite(folder, lambda tensors: tensors.pop(gone))
    with pytest.raises(EngineError, match=rf"tensor {gone} is missing \(DeepSeek's name: {theirs}\)$"):
        load_checkpoint(folder)


def test_a_tensor_with_a_nan_is_named_as_the_file_does(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        with_words(NORM, 0x7FC0)(tensors)
        tensors["norm.weight"] = tensors.pop(NORM)

    rewrite(folder, change)
    with pytest.raises(EngineError, match=r"tensor norm.weight holds NaN"):
        Model(load_checkpoint(folder))


def test_a_state_of_another_config_is_refused(folder: Path) -> None:
    """With the same weights: what its keys were rotated by is not in them."""
    change_json(folder / "config.json", lambda config: config["rope_parameters"]["main"].update(rope_theta=2e4))
    models = [Model(load_checkpoint(each)) for each in (None, folder)]
    states = [State(model) for model in models]
    models[0].step([Chunk(states[0], [0, 5, 6])])
    with pytest.raises(EngineError, match="not a packed state of this model"):
        states[1].unpack(states[0].pack())
    for state, model in zip(states, models, strict=True):
        state.close()
        model.close()


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_control_tokens_that_the_vocabulary_lacks_are_named_before_anything_is_served(folder: Path) -> None:
    def change(tokenizer: dict) -> None:
        gone = {"<｜Assistant｜>", "</think>", "<｜read_url｜>"}
        tokenizer["added_tokens"] = [entry for entry in tokenizer["added_tokens"] if entry["content"] not in gone]

    change_json(folder / "tokenizer.json", change)
    with pytest.raises(EngineError, match=r"lacks the control tokens <｜Assistant｜>, </think>, <｜read_url｜>$"):
        load_checkpoint(folder)
    with pytest.raises(TokenizerError, match=r"lacks the control tokens <｜Assistant｜>, </think>, <｜read_url｜>$"):
        load_tokenizer(folder)


def named(tokenizer: dict, token: str) -> dict:
    return next(entry for entry in tokenizer["added_tokens"] if entry["content"] == token)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tokenizer: tokenizer.pop("model"), "lacks added_tokens or model.vocab"),
        (lambda tokenizer: tokenizer.update(added_tokens=[3]), "lacks added_tokens or model.vocab"),
        (
            lambda tokenizer: tokenizer["model"]["vocab"].update(odd=4096),
            "'odd' has the id 4096, beyond vocab_size 4096",
        ),
        (lambda tokenizer: tokenizer["model"]["vocab"].update(odd="x"), "'odd' has the id 'x'"),
        (
            lambda tokenizer: tokenizer["model"]["vocab"].update(odd=4034),
            "tokens 'odd' and '<｜User｜>' share the id 4034",
        ),
        (
            lambda tokenizer: named(tokenizer, "<｜Assistant｜>").update(id=4034),
            "tokens '<｜User｜>' and '<｜Assistant｜>' share the id 4034",
        ),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(folder: Path, change: Callable[[dict], object], why: str) -> None:
    change_json(folder / "tokenizer.json", change)
    with pytest.raises(EngineError, match=rf"^{folder}/tokenizer.json: .*{why}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(("length", "context"), [(None, 4096), (1e30, 4096), (10**30, 4096), (100.5, 100), (2, 2)])
def test_a_context_is_bounded_by_the_tokenizer_if_it_says_so(folder: Path, length: object, context: int) -> None:
    change_json(folder / "tokenizer_config.json", lambda config: config.update(model_max_length=length))
    assert load_checkpoint(folder).dimensions.context_tokens_max == context


@pytest.mark.parametrize("length", ["2048", True, 1, -5, float("nan")])
def test_a_bound_that_is_none_is_refused(folder: Path, length: object) -> None:
    change_json(folder / "tokenizer_config.json", lambda config: config.update(model_max_length=length))
    with pytest.raises(EngineError, match=rf"^{folder}/tokenizer_config.json: model_max_length is "):
        load_checkpoint(folder)


def request(session: str) -> SampleRequest:
    return SampleRequest(
        session=session,
        token_ids=(0, 5, 6, 900),
        sampling=Sampling(temperature=1.0, seed=3),
        stream_key=1,
        tokens_count_max=300,
        stop_ids=frozenset(),
    )


async def drawn(engine: EmbeddedEngine, session: str) -> list[int]:
    return [token_id async for chunk in engine.sample(request(session)) for token_id in chunk.token_ids]


def swap_meanings(tokenizer: dict) -> None:
    first, second = tokenizer["added_tokens"][:2]
    first["id"], second["id"] = second["id"], first["id"]


async def test_bad_weights_are_refused_while_requests_run_and_these_never_notice(tmp_path: Path) -> None:
    engine = EmbeddedEngine()
    await engine.open()
    expected, before = await drawn(engine, "alone"), engine.info
    bad = []
    for index, (change, why) in enumerate(FAULTS.values()):
        bad.append((Path(shutil.copytree(DEFAULT_CHECKPOINT, tmp_path / str(index))), why))
        rewrite(bad[-1][0], change)
    other = Path(shutil.copytree(DEFAULT_CHECKPOINT, tmp_path / "other"))
    change_json(other / "tokenizer.json", swap_meanings)
    bad.append((other, r"another model \(the ids of tokenizer.json\)"))
    running = asyncio.gather(*(drawn(engine, f"s{n}") for n in range(3)))
    for folder, why in bad:
        with pytest.raises(EngineError, match=why):
            await engine.update(folder, 1)
    assert await running == [expected] * 3
    assert engine.info == before
    assert await drawn(engine, "after") == expected
    await engine.close()
