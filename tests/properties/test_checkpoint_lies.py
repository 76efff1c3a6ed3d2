"""Whatever a config or a header says: it is read, or refused with an EngineError that names its file."""

import json
import mmap
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT, load_checkpoint
from rollout.engines.embedded.config import COUNTS, FIXED, NUMBERS, SHAPED, Dimensions, read_dimensions
from rollout.engines.embedded.tensors import locate
from rollout.errors import EngineError

CONFIG = json.loads((DEFAULT_CHECKPOINT / "config.json").read_text())
WEIGHTS = DEFAULT_CHECKPOINT / "model.safetensors"
DIMENSIONS = load_checkpoint().dimensions
PATH = Path("some/file")
FIELDS = sorted({*COUNTS, *NUMBERS, *FIXED, *SHAPED})
ROPE = ["rope_type", "rope_theta", "partial_rotary_factor", "factor", "beta_fast", "mscale", "attention_factor"]

TRAINED: dict[str, dict[str, object]] = {
    "linear": {"factor": 2},
    "yarn": {"factor": 2},
    "llama3": {"original_max_position_embeddings": 64, "low_freq_factor": 1, "high_freq_factor": 4, "factor": 2},
}

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.integers(-2, 300)
    | st.floats()
    | st.sampled_from(["", "yarn", "linear", "llama3", "moe", "sliding_attention", "\x00", "｜"])
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.sampled_from(ROPE), inner, max_size=4)
)


def read(config: dict[str, object]) -> Dimensions | str:
    """The dimensions, or why there are none."""
    try:
        return read_dimensions(PATH, config, None)[0]
    except EngineError as error:
        return str(error)


@given(changes=st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3))
@example({"rope_scaling": {"type": "yarn", "factor": 1e-300}, "rope_parameters": None})
def test_a_config_is_read_or_refused(changes: dict[str, object]) -> None:
    told = read(CONFIG | changes)
    if isinstance(told, str):
        assert told.startswith(f"{PATH}: ")
        assert len(told) < 1000
    else:
        assert len(told.attention_kinds) == len(told.hash_routed) == told.layers_count
        assert [frequency for frequency in told.frequencies_main if not 0.0 <= frequency <= 1.0] == []


@given(part=st.dictionaries(st.sampled_from(ROPE), leaves, max_size=5), kind=st.sampled_from(sorted(TRAINED)))
def test_rotary_parameters_are_read_or_refused(part: dict[str, object], kind: str) -> None:
    compress = {"rope_theta": 1e4, "partial_rotary_factor": 0.5, **TRAINED[kind], **part, "rope_type": kind}
    told = read(CONFIG | {"rope_parameters": {"main": CONFIG["rope_parameters"]["main"], "compress": compress}})
    if isinstance(told, str):
        assert told.startswith(f"{PATH}: rope_parameters.compress.")
    else:
        assert [frequency for frequency in told.frequencies_compress if not 0.0 <= frequency <= 1.0] == []


@pytest.fixture(scope="module")
def weights() -> bytearray:
    with WEIGHTS.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return bytearray(data)


@given(at=st.integers(0, 8 + 20_000), byte=st.integers(0, 255))
def test_a_header_with_a_changed_byte_is_read_or_refused(weights: bytearray, at: int, byte: int) -> None:
    old, weights[at] = weights[at], byte
    refusal, table = "", ()
    try:
        with memoryview(weights) as data:
            table = locate(PATH, data, DIMENSIONS, is_tied=False)
    except EngineError as error:
        refusal = str(error)
    finally:
        weights[at] = old
    pieces = [piece for tensor in table if tensor for piece in tensor.pieces]
    assert refusal.startswith(f"{PATH}: ") != bool(pieces)
    assert [piece for piece in pieces if not 0 < piece.begin <= piece.end <= len(weights)] == []
