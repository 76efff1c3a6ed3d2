"""A checkpoint folder that cannot be run is refused with the file and the rule."""

import json
import platform
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT, load_checkpoint
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.engines.embedded.library import LIBRARY, load_library
from rollout.errors import EngineError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEFAULT_CHECKPOINT, tmp_path / "checkpoint"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_header(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def test_the_shipped_checkpoint_loads_with_its_facts() -> None:
    checkpoint = load_checkpoint()
    assert checkpoint.dimensions.context_tokens_max == 2048
    assert len(checkpoint.weights_digest) == 64
    assert (checkpoint.fork_token_id, checkpoint.header_token_id) == (4034, 4035)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(EngineError, match=f"{name}: no such file"):
        load_checkpoint(folder)


@pytest.mark.parametrize("kept_bytes", [0, 4, 1000, 20_000_000])
def test_weights_that_were_cut_short_are_refused(folder: Path, kept_bytes: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(EngineError, match=r"model.safetensors: (damaged|cannot be read)"):
        load_checkpoint(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_header(folder, lambda header: header.pop("model.layers.2.self_attn.sinks"))
    with pytest.raises(EngineError, match=r"layers.2.self_attn.sinks is missing"):
        load_checkpoint(folder)


def test_a_tensor_of_another_type_is_named(folder: Path) -> None:
    change_header(folder, lambda header: header["lm_head.weight"].update(dtype="F16"))
    with pytest.raises(EngineError, match=r"lm_head.weight is F16 .* not BF16"):
        load_checkpoint(folder)


def test_a_route_to_an_expert_that_does_not_exist_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = struct.unpack_from("<Q", data)[0]
    begin = json.loads(data[8 : 8 + size])["model.layers.0.mlp.gate.tid2eid"]["data_offsets"][0]
    data[8 + size + begin] = 8
    path.write_bytes(data)
    with pytest.raises(EngineError, match="layer 0 routes a token to an expert that does not exist"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"hc_mult": 2}, "hc_mult 4"),
        ({"hidden_size": 250}, "multiples of 16"),
        ({"num_attention_heads": 4}, "multiples of 8"),
        ({"num_hidden_layers": 5}, "a kind for every layer"),
        ({"n_routed_experts": 6}, "experts"),
        ({"layer_types": ["full_attention"] * 6}, "full_attention"),
        ({"hidden_size": 512}, "model.embed_tokens.weight"),
    ],
    ids=str,
)
def test_a_config_that_the_kernels_cannot_run_is_refused(folder: Path, changes: dict, rule: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(EngineError, match=rule):
        load_checkpoint(folder)


def test_a_config_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(EngineError, match="cannot be read as JSON"):
        load_checkpoint(folder)


async def test_an_engine_with_a_broken_checkpoint_fails_to_open_and_stays_closed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    engine = EmbeddedEngine(folder)
    with pytest.raises(EngineError, match="no such file"):
        await engine.open()
    await engine.close()


CPUINFO = "processor\t: 0\nvendor_id\t: Any\nvmx flags\t: avx2 fma\nflags\t\t: {}\n\n"
X86_64_V3 = "fpu sse2 avx avx2 fma bmi1 bmi2 f16c movbe abm"


def test_a_processor_that_lacks_the_instructions_of_the_build_is_told_before_any_of_them_runs(tmp_path: Path) -> None:
    """The library says what it needs: nothing on machines where it was built without."""
    old, new, other = (tmp_path / name for name in ("old", "new", "other"))
    old.write_text(CPUINFO.format("fpu sse2 avx bmi1 bmi2 f16c movbe abm avx2_not fma4"))
    new.write_text(CPUINFO.format(X86_64_V3))
    other.write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert load_library(LIBRARY, new)
    assert load_library(LIBRARY, other)
    assert load_library(LIBRARY, tmp_path / "nowhere")
    if platform.machine() == "x86_64":
        with pytest.raises(EngineError, match="this processor lacks avx2, fma: run on one of 2015 or later"):
            load_library(LIBRARY, old)
    else:
        assert load_library(LIBRARY, old)
