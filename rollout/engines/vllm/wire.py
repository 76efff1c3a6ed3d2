"""vLLM's tokens-in, tokens-out wire, as values: what is asked, what a line of the stream says.

Pure: bytes in, values out.  The other side is a peer that may be broken: a line has a bound, an event has a shape, and
what does not fit is an EngineError with what it said made visible.

See: vLLM 0.32, entrypoints/scale_out/token_in_token_out/protocol.py; tests/golden/vllm, real exchanges.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from dsec.terminal import shortened, visible_line
from rollout.engine import EngineInfo, Routes, Routing, Sampled, SampleRequest, Scored, TopLogprobs
from rollout.errors import EngineError, RequestError, RolloutError

GENERATE, ABORT = "/inference/v1/generate", "/inference/v1/abort_requests"
RANK_HEADER = "X-data-parallel-rank"
"""Which of a server's data-parallel ranks draws; without it vLLM takes the least loaded."""
ID_PREFIX = "generate-tokens-"
"""What the server puts before a request's id, which is its name for /abort_requests."""
NO_LOGPROB = -9999.0
"""What the server writes for NaN, minus infinity, and a logprob that it does not have."""
LINE_BYTES_MAX = 16 << 20
"""Of an event without routes: a few tokens, each with the ids that a cut kept."""
WORDS_MAX = 400
TEMPERATURE_MIN = 0.01
"""Below it the server silently takes this."""
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..{'descr': '([|<>][iu][1248])', 'fortran_order': (True|False), "
    rb"'shape': \((\d{1,9}), (\d{1,9}), (\d{1,9})\), } *\n",
    re.DOTALL,
)
"""The head of a .npy as it is written: numpy reads it as Python, which is not for text of a peer."""
_NOT_THE_CALLERS = {401, 403, 404, 408, 429}
_NO_RANK = "data_parallel_rank "
"""Begins what a server says to a rank that it has not: it was started again with fewer."""
_STARTING = {502, 503, 504}
"""Of a server, or of a proxy before it, that is not up yet."""


class Candidate(msgspec.Struct, frozen=True):
    """A token and its logprob."""

    token_id: int
    logprob: float


class Drawn(msgspec.Struct, frozen=True):
    """A token that was drawn; `top_logprobs` begin with it, whatever its rank."""

    token_id: int
    logprob: float
    top_logprobs: tuple[Candidate, ...] = ()


class Logprobs(msgspec.Struct, frozen=True):
    """Of each token of a chunk."""

    content: tuple[Drawn, ...] | None = None


class Version(msgspec.Struct, frozen=True):
    """The label of the weights that drew a run of tokens."""

    version: str


class Choice(msgspec.Struct, frozen=True):
    """Some tokens; the last three fields come with the last chunk only."""

    token_ids: tuple[int, ...] | None = None
    logprobs: Logprobs | None = None
    sampling_mask: tuple[tuple[int, ...], ...] | None = None
    finish_reason: str | None = None
    routed_experts: str | None = None
    weight_versions: tuple[Version, ...] | None = None


class PromptDetails(msgspec.Struct, frozen=True):
    """Of the prompt."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """Counts, after the last chunk."""

    prompt_tokens_details: PromptDetails | None = None


class Event(msgspec.Struct, frozen=True):
    """A line of the stream; `error` is anything."""

    choices: tuple[Choice, ...] = ()
    usage: Usage | None = None
    error: Any = None


class Lines:
    """Cuts a stream of server-sent events into the payloads of its lines, none of them longer than a bound."""

    def __init__(self, line_bytes_max: int) -> None:
        self._line_bytes_max = line_bytes_max
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads of the lines that ended.  EngineError."""
        self._rest += data
        if b"\n" not in data:
            lines: list[bytes] = []
        else:
            *lines, rest = bytes(self._rest).split(b"\n")
            self._rest = bytearray(rest)
        if max(map(len, [*lines, self._rest])) > self._line_bytes_max:
            raise EngineError(f"a line of more than {self._line_bytes_max} bytes")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


def decode_json(data: bytes, what: str, kind: Any = Any) -> Any:
    """A value of a kind, from JSON that others wrote.  EngineError, which begins with `what`, for what is none."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError) as error:  # of bytes that are no UTF-8, of what is nested too deeply
        raise EngineError(f"{what}: {error}: {words(data)!r}") from error


def seed_of(seed: int, stream_key: int) -> int:
    """One seed for a stream, the same however often it is gone on with: vLLM adds the position itself, or does not."""
    digest = hashlib.blake2b(f"{seed}/{stream_key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def body_of(request: SampleRequest, request_id: str, count: int, salt: str, *, has_priorities: bool) -> dict[str, Any]:
    """The body that asks for `count` tokens.

    Nothing ends an answer but our stop ids and the count; so nothing of the server's generation config gets in.
    """
    sampling, tops = request.sampling, request.top_logprobs_count
    return {
        "request_id": request_id,
        "token_ids": request.token_ids,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": salt,
        "priority": -request.priority if has_priorities else 0,  # there, lower goes first
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed_of(sampling.seed, request.stream_key),
            "max_tokens": count,
            "stop_token_ids": sorted(request.stop_ids),
            "ignore_eos": True,
            "detokenize": False,
            "logprobs": tops + 1 if tops else 0,  # one of them is the drawn token, whatever its rank
        },
    }


def score_body(token_ids: Sequence[int], request_id: str, salt: str, tops_count: int) -> dict[str, Any]:
    """The body that asks for the logprobs of a prompt; the server draws a token behind it, of which nothing is made."""
    return {
        "request_id": request_id,
        "token_ids": tuple(token_ids),
        "cache_salt": salt,
        "sampling_params": {
            "temperature": 0.0,
            "max_tokens": 1,
            "ignore_eos": True,
            "detokenize": False,
            "prompt_logprobs": tops_count,
        },
    }


def is_aborted(told: Any) -> bool:
    """An answer in one piece was ended before it was one."""
    choices = told.get("choices") if isinstance(told, dict) else None
    return isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") == "abort" for choice in choices
    )


def scored_of(told: Any, token_ids: Sequence[int], tops_count: int, info: EngineInfo) -> Scored:
    """The logprobs of a prompt's tokens.  EngineError."""
    rows = told.get("prompt_logprobs") if isinstance(told, dict) else None
    if not isinstance(rows, list) or len(rows) != len(token_ids):
        raise EngineError(f"{len(token_ids)} tokens were to be scored, and not as many came back")
    scored = [
        _prompt_row(row, token, tops_count, info.vocab_count)
        for row, token in zip(rows[1:], token_ids[1:], strict=True)
    ]
    return Scored(
        logprobs=tuple(logprob for logprob, _ in scored),
        policy_version=info.policy_version,
        top_logprobs=tuple(top for _, top in scored) if tops_count else (),
    )


def event_of(payload: bytes) -> Event:
    """What a line says.  EngineError for what is no event, and the error that it tells."""
    event: Event = decode_json(payload, "not an event of the stream", Event)
    if event.error is not None:
        raise error_of(payload, 0)
    return event


def error_of(body: bytes, status: int) -> RolloutError:
    """The error that a body tells, under an HTTP status or (0) in a stream that was begun."""
    code, text = status, words(body)
    try:
        told = decode_json(body, "no error")
    except EngineError:
        told = None
    if isinstance(told, dict):
        told = told.get("error", told.get("detail", told))
    if isinstance(told, dict):
        code = told["code"] if told.get("code") in range(1000) else status
        text = words(str(told.get("message", told)).encode())
    elif isinstance(told, str):
        text = words(told.encode())
    said = f"vLLM answered {code or 'an error'}: {text}"
    if 400 <= code < 500 and code not in _NOT_THE_CALLERS and not text.startswith(_NO_RANK):
        return RequestError(said)
    failure = EngineError(said)
    failure.is_absent = status in _STARTING
    return failure


def words(said: bytes) -> str:
    """What a peer said, for a message: short, on one line, nothing in it that a terminal obeys."""
    return shortened(visible_line(said[: 2 * WORDS_MAX].decode(errors="replace")), WORDS_MAX)


def sampled_of(choice: Choice, tops_count: int, policy_version: int) -> Sampled:
    """The tokens of a chunk.  EngineError where one lacks its logprob."""
    ids = choice.token_ids or ()
    content = choice.logprobs.content or () if choice.logprobs else ()
    if tuple(each.token_id for each in content) != ids:
        raise EngineError(f"{len(ids)} tokens, and logprobs of others")
    logprobs = tuple(each.logprob for each in content)
    if any(not math.isfinite(each) or each <= NO_LOGPROB for each in logprobs):
        raise EngineError("a token without a logprob, or NaN")
    finish = choice.finish_reason
    return Sampled(
        token_ids=ids,
        logprobs=logprobs,
        finish="stop" if finish == "stop" else "length" if finish == "length" else None,
        policy_version=policy_version,
        top_logprobs=tuple(likeliest(each.top_logprobs, tops_count) for each in content) if tops_count else (),
        masks=tuple(tuple(sorted(mask)) for mask in choice.sampling_mask or ()),
    )


def likeliest(candidates: tuple[Candidate, ...], count: int) -> TopLogprobs:
    """The first `count` of them, without those that a cut left no chance."""
    kept = (each for each in candidates if each.logprob > NO_LOGPROB)
    ordered = sorted(kept, key=lambda each: (-each.logprob, each.token_id))[:count]
    return TopLogprobs(tuple(each.token_id for each in ordered), tuple(each.logprob for each in ordered))


def _prompt_row(row: dict[str, Any] | None, token_id: int, count: int, vocab_count: int) -> tuple[float, TopLogprobs]:
    """The logprob of a token of the prompt, and the likeliest ones.  EngineError."""
    try:
        found = {int(name): float(each["logprob"]) for name, each in (row or {}).items()}
        logprob = found[token_id]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        raise EngineError("a token of the prompt without its logprob") from None
    top = likeliest(tuple(Candidate(*each) for each in found.items()), count)
    if not NO_LOGPROB < logprob <= 0 or max(top.logprobs, default=0) > 0:
        raise EngineError("a logprob that is none")
    if min(found) < 0 or max(found) >= vocab_count:
        raise EngineError("a token that the vocabulary does not have")
    return logprob, top


def routes_of(text: str, start: int, end: int, routing: Routing) -> Routes:
    """The experts of the tokens `start` to `end`, as the server tells them.  EngineError."""
    rows, shape = read_npy(text), (end - start, len(routing.layer_ids), routing.top_k)
    if rows.shape != shape or rows.dtype.kind not in "iu":
        raise EngineError(f"routed_experts have the shape {rows.shape} of {rows.dtype}, not {shape} of integers")
    if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < routing.experts_count:
        raise EngineError(f"routed_experts name an expert that is none of the {routing.experts_count}")
    return Routes(start, rows.astype(f"<u{routing.width}").tobytes())


def read_npy(text: object) -> Any:
    """The integers in base64 of a .npy file, of three dimensions.  EngineError."""
    import numpy as np  # only where routes are told

    try:
        data = base64.b64decode(str(text), validate=True)
        if (head := _NPY.match(data)) is None:
            raise ValueError("not integers of three dimensions")
        rows, shape = np.frombuffer(data, head[1].decode(), offset=head.end()), tuple(map(int, head.groups()[2:]))
        return rows.reshape(shape, order="F" if head[2] == b"True" else "C")
    except ValueError as error:
        raise EngineError(f"routed_experts are no .npy: {words(str(error).encode())}") from error
