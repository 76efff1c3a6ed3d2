"""A double of a vLLM server: its wire as a real one was seen to speak it, over a model that is a hash.

What the model says is a function of its weights and the context alone, so every answer can be checked to the bit; the
server may be told to break in one way.  Real exchanges that its answers must look like: tests/golden/vllm.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from aiohttp import web

from rollout.engines.vllm.testing_model import NAN_DATA, NO_LOGPROB, draw, logprobs_of, processed
from rollout.engines.vllm.testing_ranks import Ranks

VOCAB_COUNT, CONTEXT_TOKENS_MAX = 512, 1024
LAYERS, EXPERTS_COUNT, TOP_K = 3, 8, 2
TOKEN_S = 0.002
"""How long a token takes: whoever interrupts an answer is to find some of it left."""
WireFault = Literal[
    "error in stream",
    "cut",
    "no end",
    "too many",
    "nan",
    "unknown id",
    "endless line",
    "noise",
    "no text",
    "nested",
    "hang",
    "status 500",
    "aborts",
    "other version",
    "no routes",
    "vast routes",
    "mark unanswered",
]


def write_checkpoint(folder: Path, number: int | None, vocab_count: int = VOCAB_COUNT) -> Path:
    """Weights for the double; each number has its own, and None has NaN."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"vocab_size": vocab_count, "num_hidden_layers": LAYERS, "num_experts": EXPERTS_COUNT}
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"weight": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}).encode()
    data = NAN_DATA if number is None else hashlib.sha256(bytes([number])).digest()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return folder


def route_of(token_id: int) -> bytes:
    """The experts of a token, layer after layer."""
    return bytes((token_id + layer + nth) % EXPERTS_COUNT for layer in range(LAYERS) for nth in range(TOP_K))


def _npy(rows: bytes, times: int = 1) -> str:
    """A file that says that it has them so many times."""
    count = times * len(rows) // (LAYERS * TOP_K)
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, {LAYERS}, {TOP_K}), }}".ljust(117) + "\n"
    return base64.b64encode(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + rows).decode()


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


class _Request:
    """One that runs."""

    def __init__(self, body: dict[str, Any], rank: int) -> None:
        self.body, self.rank = body, rank
        self.aborted = asyncio.Event()


class WireDouble:
    """A server on a free port of this host, from `start` to `stop`; started again it has the same port."""

    def __init__(
        self,
        folder: Path,
        *,
        tells_routes: bool = False,
        key: str = "",
        shows_folder: bool = True,
        ranks_count: int = 1,
    ) -> None:
        """`folder`: a checkpoint, of a name that no host has without `shows_folder`; `ranks_count` is of a start."""
        self.folder, self._key, self._tells_routes = folder, key, tells_routes
        self._root = str(folder) if shows_folder else "somebody/model"
        self.port, self.ranks_count = 0, ranks_count
        self.fault: WireFault | None = None
        self.fault_at = 2
        """Events of a stream before the fault."""
        self.calls: list[tuple[str, Any]] = []
        """What was asked: path with query, and body."""
        self.shut = ""
        """What the paths begin with that it does not have."""
        self.holds_scores = False
        """Those that begin stand until they are aborted."""
        self.is_loading, self.may_load = asyncio.Event(), asyncio.Event()
        self.may_load.set()
        self._runner: web.AppRunner | None = None
        self._forget()

    def _forget(self) -> None:
        self._weights = (self.folder / "model.safetensors").read_bytes()
        self._vocab_count: int = json.loads((self.folder / "config.json").read_text())["vocab_size"]
        self.label = "default"
        self.paused: str | None = None
        self._running: dict[str, _Request] = {}
        self.ranks = Ranks(self.ranks_count)
        self._changed = asyncio.Event()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests_count(self) -> int:
        """Those that run."""
        return len(self._running)

    async def idle(self) -> None:
        """Wait until it has no request left."""
        await self._until(lambda: not self._running)

    async def start(self) -> None:
        """As a new process: with its first weights, and nothing kept."""
        self._forget()
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """As a kill: streams break where they are."""
        runner, self._runner = self._runner, None
        if runner is not None:
            for connection in list(runner.server.connections) if runner.server else []:
                if connection.transport is not None:
                    connection.transport.abort()
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body: Any = await request.json() if request.can_read_body else None
        self.calls.append((request.path_qs, body))
        is_guarded = request.path.startswith(("/v1", "/inference"))
        if self._key and is_guarded and request.headers.get("authorization") != f"Bearer {self._key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        match "" if self.shut and request.path.startswith(self.shut) else request.path.strip("/"):
            case "version":
                return web.json_response({"version": "0.32.0"})
            case "v1/models":
                model = {"id": "hash", "root": self._root, "max_model_len": CONTEXT_TOKENS_MAX}
                return web.json_response({"object": "list", "data": [model]})
            case "server_info":
                return web.json_response(self._server_info())
            case "weight_info":
                return web.json_response({"weight_version": self.label})
            case "update_weight_version":
                self.label = body["new_version"]
                if self.fault == "mark unanswered" and self.label.startswith("changing"):
                    self.is_loading.set()
                    await self.may_load.wait()
                    if request.transport is not None:
                        request.transport.abort()
                return web.json_response({"success": True, "new_version": self.label})
            case "collective_rpc":
                return await self._reload(Path(body["kwargs"]["weights_path"]))
            case "is_paused":
                return web.json_response({"is_paused": self.paused is not None})
            case "pause":
                return await self._pause(request.query.get("mode", "abort"), request.query.get("clear_cache", "true"))
            case "resume":
                self.paused = None
                self._changed.set()
                return web.json_response({"status": "resumed"})
            case "inference/v1/abort_requests":
                for name in body["request_ids"]:
                    if name in self._running:
                        self._running[name].aborted.set()
                self._changed.set()
                return web.Response()
            case "inference/v1/generate":
                return await self._generate(request, body)
        return web.json_response({"detail": "Not Found"}, status=404)

    def _server_info(self) -> dict[str, Any]:
        model = {"model": self._root, "max_model_len": CONTEXT_TOKENS_MAX, "dtype": "torch.float32"}
        model |= {"logprobs_mode": "processed_logprobs", "max_logprobs": 33, "return_sampling_mask": True}
        aux = {"enable_return_routed_experts": self._tells_routes}
        spread = {"data_parallel_size": self.ranks_count, "data_parallel_size_local": self.ranks_count}
        config = {"model_config": model, "parallel_config": spread, "aux_output_config": aux}
        return {"vllm_config": config | {"scheduler_config": {"policy": "priority"}}}

    async def _reload(self, folder: Path) -> web.Response:
        self.is_loading.set()
        await self.may_load.wait()
        try:
            self._weights = (folder / "model.safetensors").read_bytes()
        except OSError as error:
            message = f"Call to collective_rpc method failed: {error}"
            return web.json_response({"error": {"message": message, "code": 500}}, status=500)
        return web.json_response({"results": [None]})

    async def _pause(self, mode: str, clears: str) -> web.Response:
        self.paused = mode
        if mode == "abort":
            for running in self._running.values():
                running.aborted.set()
        self._changed.set()
        if mode == "wait":
            await self._until(lambda: self.paused != "wait" or not self._running)
        if clears != "false" and mode != "keep":
            self.ranks.forget()
        return web.json_response({"status": "paused"})

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        params = body["sampling_params"]
        if self.fault == "status 500":
            return web.json_response({"error": {"message": "EngineCore \x1b[31mdied", "code": 500}}, status=500)
        if max(body["token_ids"]) >= self._vocab_count:
            return web.json_response({"error": {"message": "out of vocabulary", "code": 400}}, status=400)
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        ranks = self.ranks
        try:
            rank = ranks.place(request.headers.get("X-data-parallel-rank"))
        except ValueError as error:
            told = {"error": {"message": str(error), "code": 400}}
            if not body.get("stream"):
                return web.json_response(told, status=400)
            await response.prepare(request)
            await _send(response, told)
            return response
        name = f"generate-tokens-{body['request_id']}"
        running = self._running[name] = _Request(body, rank)
        try:
            if not body.get("stream"):
                return web.json_response(await self._whole(running, params))
            await response.prepare(request)
            await self._stream(response, name, running)
        except (ConnectionError, asyncio.CancelledError):
            with contextlib.suppress(ConnectionError):
                await response.write_eof()
        finally:
            del self._running[name]
            ranks.leave(rank)
            self._changed.set()
        return response

    async def _whole(self, running: _Request, params: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece, of one token: what scores and probes ask for."""
        ids, count = running.body["token_ids"], params.get("prompt_logprobs")
        if count is not None and self.fault == "hang":
            await asyncio.Event().wait()
        holds = self.holds_scores and count is not None
        await self._until(lambda: (self.paused is None and not holds) or running.aborted.is_set())
        if running.aborted.is_set():
            ended = {"index": 0, "token_ids": [], "finish_reason": "abort", "weight_versions": []}
            return {"choices": [ended], "prompt_logprobs": None if count is None else [None]}
        choice, _ = self._choice(list(ids), params, [], len(ids))
        choice |= {"finish_reason": "length", "routed_experts": self._routes(ids, 0)}
        answer: dict[str, Any] = {"choices": [choice], "prompt_logprobs": None}
        if count is not None:
            rows: list[Any] = [None]
            for at in range(1, len(ids)):
                row = self._next(ids[:at])
                best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
                rows.append({str(i): {"logprob": row[i], "rank": 1} for i in (ids[at], *best)})
            answer["prompt_logprobs"] = rows
        return answer

    async def _stream(self, response: web.StreamResponse, name: str, running: _Request) -> None:
        body, params = running.body, running.body["sampling_params"]
        ids: list[int] = list(body["token_ids"])
        prompt_count, events_count = len(ids), 0
        room = min(params["max_tokens"], CONTEXT_TOKENS_MAX - prompt_count)
        await self._until(lambda: self.paused is None or running.aborted.is_set())
        cached_count = self.ranks.cached_count(running.rank, body.get("cache_salt", ""), ids)
        spans: list[dict[str, Any]] = []
        reason: str | None = None
        while reason is None:
            await asyncio.sleep(TOKEN_S)
            await self._until(lambda: self.paused != "keep" or running.aborted.is_set())
            choice: dict[str, Any] = {"index": 0, "token_ids": [], "logprobs": {"content": []}}
            if running.aborted.is_set() or (self.fault == "aborts" and events_count == self.fault_at):
                reason = "abort"
            else:
                count = min(1 + (len(ids) % 5 == 0), room - (len(ids) - prompt_count))
                choice, has_stopped = self._choice(ids, params, spans, prompt_count, count)
                is_full = len(ids) - prompt_count == room
                reason = "stop" if has_stopped else "length" if is_full else None
            choice["finish_reason"] = reason
            choice |= {"weight_versions": spans if reason else None, "routed_experts": None}
            choice.setdefault("sampling_mask")
            if reason in {"stop", "length"}:
                choice["routed_experts"] = self._routes(ids[:-1], params.get("routed_experts_prompt_start", 0))
            if self.fault is not None and events_count == self.fault_at and not await self._break(response, choice):
                return
            await _send(response, {"request_id": name, "usage": None, "choices": [choice]})
            events_count += 1
        self.ranks.keep(running.rank, body.get("cache_salt", ""), ids)
        usage: dict[str, Any] = {"prompt_tokens": prompt_count, "completion_tokens": len(ids) - prompt_count}
        usage["prompt_tokens_details"] = {"cached_tokens": cached_count}
        await _send(response, {"request_id": name, "usage": usage, "choices": []})
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()

    def _next(self, ids: Sequence[int]) -> tuple[float, ...]:
        return logprobs_of(self._weights, self._vocab_count, array("I", ids).tobytes())

    def _choice(
        self, ids: list[int], params: dict[str, Any], spans: list[dict[str, Any]], prompt_count: int, count: int = 1
    ) -> tuple[dict[str, Any], bool]:
        """Draw up to `count` tokens behind `ids`, into which they go; whether the last is a stop id."""
        drawn: list[int] = []
        content: list[Any] = []
        masks: list[list[int]] = []
        has_stopped = False
        while len(drawn) < count and not has_stopped:
            logprobs = processed(self._next(ids), params)
            token = draw(logprobs, params, len(ids))
            ranked = sorted(range(len(logprobs)), key=lambda i: (i != token, -logprobs[i], i))
            tops = [{"token_id": i, "logprob": logprobs[i]} for i in ranked[: max(params.get("logprobs") or 1, 1)]]
            content.append({"token_id": token, "logprob": logprobs[token], "rank": 1, "top_logprobs": tops})
            masks.append([i for i in ranked if logprobs[i] > NO_LOGPROB])
            if not spans or spans[-1]["version"] != self.label:
                spans.append({"version": self.label, "start": len(ids) - prompt_count, "end": 0})
            ids.append(token)
            spans[-1]["end"] = len(ids) - prompt_count
            drawn.append(token)
            has_stopped = token in params.get("stop_token_ids", ())
        return {"index": 0, "token_ids": drawn, "logprobs": {"content": content}, "sampling_mask": masks}, has_stopped

    def _routes(self, ids: Sequence[int], start: int) -> str | None:
        if not self._tells_routes or self.fault == "no routes":
            return None
        return _npy(b"".join(map(route_of, ids[start:])), 1 << 50 if self.fault == "vast routes" else 1)

    async def _break(self, response: web.StreamResponse, choice: dict[str, Any]) -> bool:
        """Do as the fault says with an event; False if nothing comes behind it."""
        content = choice["logprobs"]["content"]
        match self.fault:
            case "error in stream":
                await _send(response, {"error": {"message": "EngineCore \x1b[31mdied", "code": 500}})
                await response.write(b"data: [DONE]\n\n")
            case "cut":
                await response.write(b'data: {"request_id": "x", "choices": [{"ind')
                if response._req is not None and response._req.transport is not None:  # noqa: SLF001
                    response._req.transport.abort()  # noqa: SLF001
            case "no end":
                await response.write_eof()
            case "hang":
                await asyncio.Event().wait()
            case "noise":
                await response.write(b"data: {\xff\xfe\x1b[2J}\n\n")
            case "no text":
                await response.write(b'data: {"choices": [{"finish_reason": "\xff"}]}\n\n')
            case "nested":
                await response.write(b'data: {"error": ' + b"[" * 5000 + b"]" * 5000 + b"}\n\n")
            case "endless line":
                with contextlib.suppress(ConnectionError):
                    while True:
                        await response.write(b"data: " + b"x" * (1 << 20))
            case "too many":
                choice["token_ids"] *= 5000
                choice["logprobs"]["content"] = content * 5000
                return True
            case "nan":
                content[-1]["logprob"] = NO_LOGPROB
                return True
            case "unknown id":
                choice["token_ids"][-1] = content[-1]["token_id"] = self._vocab_count
                return True
            case "other version":
                self.label = "77"
                return True
            case _:
                return True
        return False

    async def _until(self, holds: Any) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()
