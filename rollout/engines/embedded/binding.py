"""The C engine seen from Python: models, states, steps and decoding, as plain functions of ids.

ctypes because the interface is ten functions of flat memory, and because it releases the
interpreter lock during a call.  The C side trusts its arguments, so this module is where ids,
bounds and lifetimes are checked; nothing above it touches a pointer.

Invariants: those of `v4.h`.
See: `v4.h`, docs/formats/engine_state.md.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Sequence
from pathlib import Path

import msgspec

from rollout.engine import Sampling
from rollout.engines.embedded.checkpoint import LAYERS_MAX, Checkpoint
from rollout.errors import EngineError

LIBRARY = Path(__file__).parent / "v4.so"
STOPS_MAX = 16
BATCH_TOKENS_MAX = 128
U64_MASK = (1 << 64) - 1


class _Config(ctypes.Structure):
    """`v4_config`."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "vocab_count",
                "hidden_dim",
                "layers_count",
                "heads_count",
                "head_dim",
                "rope_dim",
                "query_rank",
                "output_groups",
                "output_rank",
                "window_tokens",
                "index_heads",
                "index_dim",
                "index_topk",
                "csa_rate",
                "hca_rate",
                "experts_count",
                "experts_active",
                "expert_dim",
                "sinkhorn_rounds",
                "context_tokens_max",
                "batch_tokens_max",
            )
        ),
        *((name, ctypes.c_float) for name in ("norm_eps", "mix_eps", "swiglu_limit", "route_scale")),
        *((name, ctypes.c_double) for name in ("theta_main", "theta_compress")),
        ("attention_kinds", ctypes.c_int32 * LAYERS_MAX),
        ("hash_routed", ctypes.c_int32 * LAYERS_MAX),
    )


class _Sampling(ctypes.Structure):
    """`v4_sampling`."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("stream_key", ctypes.c_uint64),
        ("temperature", ctypes.c_double),
        ("top_p", ctypes.c_double),
        ("top_k", ctypes.c_int32),
    )


class _Chunk(ctypes.Structure):
    """`v4_chunk`."""

    _fields_ = (
        ("state", ctypes.c_void_p),
        ("token_ids", ctypes.POINTER(ctypes.c_uint32)),
        ("logits", ctypes.POINTER(ctypes.c_float)),
        ("tokens_count", ctypes.c_int32),
    )


class _Stream(ctypes.Structure):
    """`v4_stream`."""

    _fields_ = (
        ("state", ctypes.c_void_p),
        ("sampling", _Sampling),
        ("token_id", ctypes.c_uint32),
        ("stops_count", ctypes.c_int32),
        ("stop_ids", ctypes.c_uint32 * STOPS_MAX),
    )


@functools.cache
def load_library(path: Path = LIBRARY, cpuinfo: Path = Path("/proc/cpuinfo")) -> ctypes.CDLL:
    """The compiled engine.  EngineError if it is not built, or if this processor cannot run it."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(
            f"{path}: the decode engine is not built ({error}); run: python setup.py build_ext"
        ) from error
    _check_processor(library, path, cpuinfo)
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32
    for name, result, arguments in (
        ("v4_build", ctypes.c_char_p, ()),
        ("v4_create", pointer, (ctypes.POINTER(_Config), ctypes.POINTER(pointer))),
        ("v4_destroy", None, (pointer,)),
        ("v4_state_create", pointer, (pointer,)),
        ("v4_state_destroy", None, (pointer,)),
        ("v4_state_reset", None, (pointer, pointer)),
        ("v4_state_position", ctypes.c_uint32, (pointer,)),
        ("v4_packed_bytes", size, (pointer, ctypes.c_uint32)),
        ("v4_state_pack", None, (pointer, pointer, pointer)),
        ("v4_state_unpack", integer, (pointer, pointer, pointer, size)),
        ("v4_step", None, (pointer, ctypes.POINTER(_Chunk), integer)),
        ("v4_sample", ctypes.c_uint32, (pointer, pointer, ctypes.POINTER(_Sampling), ctypes.c_uint32, pointer)),
        ("v4_decode", integer, (pointer, ctypes.POINTER(_Stream), integer, integer, pointer, pointer)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _check_processor(library: ctypes.CDLL, path: Path, cpuinfo: Path) -> None:
    """Without this a processor that lacks an instruction ends the whole process with SIGILL."""
    wanted = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "v4_processor_flags"))).decode().split()
    try:
        text = cpuinfo.read_text()
    except OSError:  # no Linux, or no /proc: the build's own machine, most likely
        return
    lines = [line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")]
    missing = [flag for flag in wanted if lines and flag not in lines[0]]
    if missing:
        raise EngineError(
            f"{path}: was built for x86-64-v3 and this processor lacks {', '.join(missing)}: run on one of 2015 or "
            "later (a virtual machine may hide what its host has: give it the host's processor type)"
        )


def build_digest() -> str:
    """What the library was built from: a digest of sources and flags, compiled in."""
    return str(load_library().v4_build().decode("ascii"))


class State:
    """What one sequence leaves behind: about 1 MB, `position` tokens long.

    Not safe to use while a step that holds it runs.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.pointer = model.library.v4_state_create(model.pointer)
        if not self.pointer:
            raise EngineError("out of memory for a sequence state; lower running_max")

    @property
    def position(self) -> int:
        """Tokens that the state has taken in."""
        return int(self.model.library.v4_state_position(self.pointer))

    def reset(self) -> None:
        """Back to the empty sequence."""
        self.model.library.v4_state_reset(self.model.pointer, self.pointer)

    def pack(self) -> bytearray:
        """All of it as bytes, about 1.5 KB a token until the window is full."""
        size = self.model.library.v4_packed_bytes(self.model.pointer, self.position)
        packed = bytearray(size)
        self.model.library.v4_state_pack(self.model.pointer, self.pointer, (ctypes.c_char * size).from_buffer(packed))
        return packed

    def unpack(self, packed: bytearray) -> None:
        """Become the packed state, bit for bit.  EngineError if it is of another model or damaged."""
        window = (ctypes.c_char * len(packed)).from_buffer(packed)
        if self.model.library.v4_state_unpack(self.model.pointer, self.pointer, window, len(packed)):
            raise EngineError("not a packed state of this model, or cut short")

    def close(self) -> None:
        """Free the memory; the state must not be used again."""
        pointer, self.pointer = self.pointer, None
        if pointer:
            self.model.library.v4_state_destroy(pointer)


class Chunk(msgspec.Struct):
    """Ids to append to a state; with `wants_logits`, those of the last one come back."""

    state: State
    token_ids: Sequence[int]
    wants_logits: bool = False


class Stream(msgspec.Struct):
    """A sequence to decode: `token_id` was drawn (or is the prompt's last) and is not in the state yet."""

    state: State
    token_id: int
    sampling: Sampling
    stream_key: int
    stop_ids: Sequence[int]


class Drawn(msgspec.Struct, frozen=True):
    """One token and its logprob under the distribution it was drawn from."""

    token_id: int
    logprob: float


class Model:
    """A loaded checkpoint.  One thread at a time may step, decode or sample."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.library = load_library()
        self.dimensions = checkpoint.dimensions
        config = _Config(batch_tokens_max=BATCH_TOKENS_MAX)
        for name in checkpoint.dimensions.__struct_fields__:
            value = getattr(checkpoint.dimensions, name)
            if isinstance(value, tuple):
                getattr(config, name)[: len(value)] = value
            else:
                setattr(config, name, value)
        path = checkpoint.folder / "model.safetensors"
        try:
            with path.open("rb") as file:
                # copy-on-write: ctypes takes addresses only of writable buffers, and nothing writes here
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise EngineError(f"{path}: cannot be mapped: {error}") from error
        anchor = ctypes.c_char.from_buffer(data)
        base = ctypes.addressof(anchor)
        table = (ctypes.c_void_p * len(checkpoint.tensors))(
            *(None if tensor is None else base + tensor.begin for tensor in checkpoint.tensors)
        )
        self.pointer = self.library.v4_create(ctypes.byref(config), table)
        del anchor
        data.close()
        if not self.pointer:
            raise EngineError(f"{path}: out of memory while loading")

    def close(self) -> None:
        """Free the weights; states must be closed before."""
        pointer, self.pointer = self.pointer, None
        if pointer:
            self.library.v4_destroy(pointer)

    def step(self, chunks: Sequence[Chunk]) -> list[list[float] | None]:
        """Append every chunk to its state, sharing the weight loads; logits where wanted.

        At most BATCH_TOKENS_MAX tokens together, each state once.
        """
        table = (_Chunk * len(chunks))()
        outputs: list[ctypes.Array[ctypes.c_float] | None] = []
        total = 0
        for row, chunk in zip(table, chunks, strict=True):
            count = len(chunk.token_ids)
            self._check_ids(chunk.state, chunk.token_ids, count)
            total += count
            row.state, row.tokens_count = chunk.state.pointer, count
            row.token_ids = (ctypes.c_uint32 * count)(*chunk.token_ids)
            out = (ctypes.c_float * self.dimensions.vocab_count)() if chunk.wants_logits else None
            if out is not None:
                row.logits = out
            outputs.append(out)
        self._check_batch(total, [chunk.state for chunk in chunks])
        self.library.v4_step(self.pointer, table, len(chunks))
        return [None if out is None else list(out) for out in outputs]

    def sample(self, logits: Sequence[float], sampling: Sampling, stream_key: int, position: int) -> Drawn:
        """Draw the token at `position` of a context from its logits."""
        values = (ctypes.c_float * self.dimensions.vocab_count)(*logits)
        logprob = ctypes.c_float()
        how = _sampling(sampling, stream_key)
        token_id = self.library.v4_sample(self.pointer, values, ctypes.byref(how), position, ctypes.byref(logprob))
        return Drawn(token_id, logprob.value)

    def decode(self, streams: Sequence[Stream], rounds_max: int) -> list[list[Drawn]]:
        """Draw up to `rounds_max` tokens for every stream; ends with the round that drew a stop id.

        Each list starts with the token after `token_id`; its last one is not in the state yet.
        """
        count = len(streams)
        table = (_Stream * count)()
        for row, stream in zip(table, streams, strict=True):
            self._check_ids(stream.state, (stream.token_id,), rounds_max)
            row.state, row.token_id = stream.state.pointer, stream.token_id
            row.sampling = _sampling(stream.sampling, stream.stream_key)
            row.stops_count = len(stream.stop_ids)
            row.stop_ids[: len(stream.stop_ids)] = tuple(stream.stop_ids)
        self._check_batch(count, [stream.state for stream in streams])
        token_ids = (ctypes.c_uint32 * (count * rounds_max))()
        logprobs = (ctypes.c_float * (count * rounds_max))()
        rounds = self.library.v4_decode(self.pointer, table, count, rounds_max, token_ids, logprobs)
        return [[Drawn(token_ids[r * count + s], logprobs[r * count + s]) for r in range(rounds)] for s in range(count)]

    def _check_ids(self, state: State, token_ids: Sequence[int], tokens_count: int) -> None:
        if not token_ids or min(token_ids) < 0 or max(token_ids) >= self.dimensions.vocab_count:
            raise EngineError(f"token ids must be 0 to {self.dimensions.vocab_count - 1}, at least one")
        if state.position + tokens_count > self.dimensions.context_tokens_max:
            raise EngineError(f"a context holds at most {self.dimensions.context_tokens_max} tokens")

    def _check_batch(self, tokens_count: int, states: Sequence[State]) -> None:
        if not 0 < tokens_count <= BATCH_TOKENS_MAX or len({state.pointer for state in states}) != len(states):
            raise EngineError(f"a batch is 1 to {BATCH_TOKENS_MAX} tokens, and holds each state once")


def _sampling(sampling: Sampling, stream_key: int) -> _Sampling:
    return _Sampling(
        seed=sampling.seed & U64_MASK,
        stream_key=stream_key & U64_MASK,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
    )
