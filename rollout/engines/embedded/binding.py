"""The C engine seen from Python: models, states, steps and decoding, as plain functions of ids.

ctypes because the interface is a dozen functions of flat memory, and because it releases the
interpreter lock during a call.  The C side trusts its arguments, so this module is where ids,
bounds and lifetimes are checked; nothing above it touches a pointer.

Invariants: those of `v4.h`.
See: `v4.h`, docs/formats/engine_state.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import msgspec

from rollout.engine import Routing, Sampling, TopLogprobs
from rollout.engines.embedded.checkpoint import Checkpoint
from rollout.engines.embedded.library import CChunk, CConfig, CReport, CSampling, CStream, load_library
from rollout.engines.embedded.weights import loaded
from rollout.errors import EngineError

BATCH_TOKENS_MAX = 128
THREADS_MAX = 16
U64_MASK = (1 << 64) - 1


class NoRoomError(EngineError):
    """Memory is too short for weights, or for what would be told of tokens; nothing else has changed."""


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
        """All of it as bytes, about 1.5 KB a token until the window is full.  EngineError: out of memory."""
        size = self.model.library.v4_packed_bytes(self.model.pointer, self.position)
        try:
            packed = bytearray(size)
        except MemoryError as error:
            raise EngineError(f"out of memory for the {size} bytes of a packed state; lower state_bytes_max") from error
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
    """Ids to append to a state; with `wants_logits`, those of the last one come back.

    `routes`, if there is room in it for the rows of all ids, is filled with the experts that they go through.
    """

    state: State
    token_ids: Sequence[int]
    wants_logits: bool = False
    routes: bytearray = msgspec.field(default_factory=bytearray)


class Stream(msgspec.Struct):
    """A sequence to decode: `token_id` was drawn (or is the prompt's last) and is not in the state yet.

    At most `rounds_max` tokens are drawn for it.
    """

    state: State
    token_id: int
    sampling: Sampling
    stream_key: int
    stop_ids: Sequence[int]
    rounds_max: int
    top_count: int = 0
    wants_mask: bool = False
    wants_routes: bool = False
    wants_hidden: bool = False

    @property
    def wants_report(self) -> bool:
        """Whether it wants anything but tokens and logprobs."""
        return bool(self.top_count or self.wants_mask or self.wants_routes or self.wants_hidden)


class Drawn(msgspec.Struct, frozen=True):
    """One token and its logprob under the distribution it was drawn from; the rest only if asked for.

    `routes` are those of the token before it, which was read for the draw; `hidden` is what the head was given.
    """

    token_id: int
    logprob: float
    top: TopLogprobs | None = None
    mask: tuple[int, ...] | None = None
    routes: bytes = b""
    hidden: bytes = b""


class _Reports:
    """A table of `v4_report` with the memory that its rows point to."""

    def __init__(self, rows_count: int) -> None:
        self.table = (CReport * rows_count)()
        self._memory: list[object] = []

    def want(
        self, row: int, top_count: int, mask_count_max: int = 0, routes_bytes: int = 0, hidden_dim: int = 0
    ) -> None:
        """Room in a row for so many of the likeliest tokens, for a mask, for routes, for a hidden state; 0 for none.

        NoRoomError.
        """
        report = self.table[row]
        try:
            if top_count:
                report.top_count = top_count
                report.top_ids, report.top_logprobs = (ctypes.c_uint32 * top_count)(), (ctypes.c_float * top_count)()
            if mask_count_max:
                report.mask_ids = (ctypes.c_uint32 * mask_count_max)()
            if routes_bytes:
                report.routes = (ctypes.c_uint8 * routes_bytes)()
            if hidden_dim:
                report.hidden = (ctypes.c_uint16 * hidden_dim)()
        except MemoryError as error:
            raise NoRoomError("out of memory for what is to be told beside the tokens; ask for less of it") from error
        self._memory += [report.top_ids, report.top_logprobs, report.mask_ids, report.routes, report.hidden]

    def top(self, row: int) -> TopLogprobs | None:
        """What was told of the row, if it was asked for."""
        report = self.table[row]
        count = report.top_count
        return (
            TopLogprobs(tuple(report.top_ids[:count]), tuple(report.top_logprobs[:count])) if report.top_ids else None
        )

    def mask(self, row: int) -> tuple[int, ...] | None:
        """The ids that were kept, if they were asked for and anything was cut."""
        report = self.table[row]
        return tuple(report.mask_ids[: report.mask_count]) if report.mask_count else None

    def drawn(self, row: int, token_id: int, logprob: float, routes_bytes: int, hidden_dim: int) -> Drawn:
        """A token with all that was told of it."""
        report = self.table[row]
        routes = ctypes.string_at(report.routes, routes_bytes) if report.routes else b""
        hidden = ctypes.string_at(report.hidden, 2 * hidden_dim) if report.hidden else b""
        return Drawn(token_id, logprob, self.top(row), self.mask(row), routes, hidden)


class Model:
    """A loaded checkpoint.  One thread at a time may step, decode, score or sample.  NoRoomError while it is loaded.

    `threads_count` threads, the caller among them, then share the work; how many (1 to THREADS_MAX) changes no bit.
    """

    def __init__(self, checkpoint: Checkpoint, threads_count: int = 1) -> None:
        self.library = load_library()
        self.dimensions = checkpoint.dimensions
        self.weights_digest = checkpoint.weights_digest
        self.fork_token_id = checkpoint.fork_token_id
        self.header_token_id = checkpoint.header_token_id
        self.routing = Routing(
            layer_ids=tuple(range(self.dimensions.layers_count)),
            experts_count=self.dimensions.experts_count,
            top_k=self.dimensions.experts_active,
        )
        config = CConfig(batch_tokens_max=BATCH_TOKENS_MAX)
        for name in checkpoint.dimensions.__struct_fields__:
            value = getattr(checkpoint.dimensions, name)
            if isinstance(value, tuple):
                getattr(config, name)[: len(value)] = value
            else:
                setattr(config, name, value)
        self.pointer: int | None = None
        try:
            self._load(checkpoint, config, threads_count)
        except EngineError:
            self.close()
            raise

    def _load(self, checkpoint: Checkpoint, config: CConfig, threads_count: int) -> None:
        path = checkpoint.folder / "model.safetensors"
        with loaded(path, checkpoint.tensors, checkpoint.weights_stamp) as addresses:
            odd = [
                tensor.name
                for tensor, address in zip(checkpoint.tensors, addresses, strict=True)
                if tensor and not self.library.v4_is_finite(address, tensor.words_count)
            ]
            if odd:
                more = f" ({len(odd)} tensors do)" if odd[1:] else ""
                raise EngineError(f"{path}: tensor {odd[0]} holds NaN or infinity{more}")
            table = (ctypes.c_void_p * len(addresses))(*addresses)
            self.pointer = self.library.v4_create(ctypes.byref(config), table, threads_count)
            if not self.pointer:
                raise NoRoomError(f"{path}: out of memory while loading")

    def close(self) -> None:
        """Free the weights; states must be closed before."""
        pointer, self.pointer = self.pointer, None
        if pointer:
            self.library.v4_destroy(pointer)

    def step(self, chunks: Sequence[Chunk]) -> list[list[float] | None]:
        """Append every chunk to its state, sharing the weight loads; logits where wanted.

        At most BATCH_TOKENS_MAX tokens together, each state once.
        """
        table = (CChunk * len(chunks))()
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
                row.logits, row.logits_count = out, 1
            if chunk.routes:
                row.routes = (ctypes.c_uint8 * (count * self.routing.row_bytes)).from_buffer(chunk.routes)
            outputs.append(out)
        self._check_batch(total, [chunk.state for chunk in chunks])
        self.library.v4_step(self.pointer, table, len(chunks))
        return [None if out is None else list(out) for out in outputs]

    def sample(self, logits: Sequence[float], sampling: Sampling, stream_key: int, position: int) -> Drawn:
        """Draw the token at `position` of a context from its logits."""
        values = (ctypes.c_float * self.dimensions.vocab_count)(*logits)
        logprob = ctypes.c_float()
        how = _sampling(sampling, stream_key)
        token_id = self.library.v4_sample(
            self.pointer, values, ctypes.byref(how), position, ctypes.byref(logprob), None
        )
        return Drawn(token_id, logprob.value)

    def score(
        self, state: State, token_ids: Sequence[int], top_count: int = 0, *, wants_hidden: bool = False
    ) -> list[Drawn]:
        """Append all ids but the last to a state, and tell of each but the first how likely it was (2 to 129 ids).

        NoRoomError.
        """
        count = len(token_ids) - 1
        self._check_ids(state, token_ids, count)
        self._check_batch(count, [state])
        logprobs = (ctypes.c_float * count)()
        hidden_dim = self.dimensions.hidden_dim if wants_hidden else 0
        reports = _Reports(count)
        for row in range(count):
            reports.want(row, top_count, hidden_dim=hidden_dim)
        ids = (ctypes.c_uint32 * (count + 1))(*token_ids)
        self.library.v4_score(self.pointer, state.pointer, ids, count, logprobs, reports.table)
        return [reports.drawn(row, token_ids[row + 1], logprobs[row], 0, hidden_dim) for row in range(count)]

    def decode(self, streams: Sequence[Stream]) -> list[list[Drawn]]:
        """Draw tokens for every stream, until it has its `rounds_max` or drew a stop id.

        Each list starts with the token after `token_id`; its last one is not in the state yet.  NoRoomError.
        """
        count, rounds_max = len(streams), max(stream.rounds_max for stream in streams)
        table = (CStream * count)()
        for row, stream in zip(table, streams, strict=True):
            self._check_ids(stream.state, (stream.token_id,), stream.rounds_max)
            row.state, row.token_id, row.rounds_max = stream.state.pointer, stream.token_id, stream.rounds_max
            row.sampling = _sampling(stream.sampling, stream.stream_key)
            row.stops_count = len(stream.stop_ids)
            row.stop_ids[: len(stream.stop_ids)] = tuple(stream.stop_ids)
        self._check_batch(count, [stream.state for stream in streams])
        token_ids = (ctypes.c_uint32 * (count * rounds_max))()
        logprobs = (ctypes.c_float * (count * rounds_max))()
        reports = self._wanted(streams, rounds_max)
        self.library.v4_decode(self.pointer, table, count, token_ids, logprobs, reports.table if reports else None)
        rows = [range(s, table[s].drawn_count * count, count) for s in range(count)]
        if reports is None:
            return [[Drawn(token_ids[row], logprobs[row]) for row in of] for of in rows]
        routes_bytes, hidden_dim = self.routing.row_bytes, self.dimensions.hidden_dim
        return [
            [reports.drawn(row, token_ids[row], logprobs[row], routes_bytes, hidden_dim) for row in of] for of in rows
        ]

    def _wanted(self, streams: Sequence[Stream], rounds_max: int) -> _Reports | None:
        """Room for what the streams want to know beside tokens and logprobs; None if they do not."""
        if not any(stream.wants_report for stream in streams):
            return None
        reports = _Reports(len(streams) * rounds_max)
        for row in range(len(streams) * rounds_max):
            stream = streams[row % len(streams)]
            reports.want(
                row,
                stream.top_count,
                self.dimensions.vocab_count if stream.wants_mask else 0,
                self.routing.row_bytes if stream.wants_routes else 0,
                self.dimensions.hidden_dim if stream.wants_hidden else 0,
            )
        return reports

    def _check_ids(self, state: State, token_ids: Sequence[int], tokens_count: int) -> None:
        if not token_ids or min(token_ids) < 0 or max(token_ids) >= self.dimensions.vocab_count:
            raise EngineError(f"token ids must be 0 to {self.dimensions.vocab_count - 1}, at least one")
        if state.position + tokens_count > self.dimensions.context_tokens_max:
            raise EngineError(f"a context holds at most {self.dimensions.context_tokens_max} tokens")

    def _check_batch(self, tokens_count: int, states: Sequence[State]) -> None:
        if not 0 < tokens_count <= BATCH_TOKENS_MAX or len({state.pointer for state in states}) != len(states):
            raise EngineError(f"a batch is 1 to {BATCH_TOKENS_MAX} tokens, and holds each state once")


def _sampling(sampling: Sampling, stream_key: int) -> CSampling:
    return CSampling(
        seed=sampling.seed & U64_MASK,
        stream_key=stream_key & U64_MASK,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
    )
