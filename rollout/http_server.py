"""HTTP in front of the rollout service: the dialects of OpenAI and vLLM on one port; translation only.

Every answer comes out of the log: what is streamed is durable first, and a request under an id of its caller's can
be sent again after any break, of the connection, of the client or of this server.  The port has no authentication of
its own unless a token is set.

See: docs/operating.md, "HTTP dialects"; `rollout/dialects/` for what each field means.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Protocol, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse

from dsec.errors import DsecError
from rollout.dialects import chat, completions, vllm
from rollout.dialects.options import StreamOptions
from rollout.errors import NotFoundError, RequestError, RolloutError
from rollout.generation import Ask, Drawn, Ended, context_bound, generate
from rollout.service import RolloutService
from rollout.state import State
from toolcall_dsl import DslError
from wal import WalError

BODY_BYTES_MAX = 32 << 20
STATUS: dict[str, int] = {
    "BAD_REQUEST": 400,
    "BAD_MESSAGES": 400,
    "BAD_TASK": 400,
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429,
    "ENGINE_ERROR": 503,
    "UNREACHABLE": 503,
}
"""Of our error codes; any other is a 500."""
CLIENT_GONE = 499
"""Nobody reads it; nginx's word for it."""
Piece = Drawn | Ended
T = TypeVar("T")


class Writer(Protocol):
    """A dialect's answers."""

    def whole(self, states: list[State]) -> dict[str, Any]:
        """The answer in one piece."""
        ...

    def piece(self, index: int, token_ids: tuple[int, ...], logprobs: tuple[float, ...]) -> dict[str, Any]:
        """Some more tokens of a choice."""
        ...

    def end(self, index: int, state: State) -> dict[str, Any]:
        """The last piece of a choice."""
        ...

    def counts(self, states: list[State]) -> dict[str, Any]:
        """The chunk after the last, if it was asked for."""
        ...


def make_app(service: RolloutService, token: str = "") -> FastAPI:
    """The application over a started service; with `token`, every call but /health needs it as a bearer."""
    app = FastAPI(title="dsec", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    _add_errors(app)
    _add_guard(app, token)
    _add_generation(app, service)
    _add_engine(app, service)
    return app


def _add_generation(app: FastAPI, service: RolloutService) -> None:
    model = service.engine.info.name

    @app.post("/v1/chat/completions")
    async def chat_completions(body: chat.ChatRequest, request: Request) -> Response:
        _check_model(body.model, model)
        ask = chat.ask_of(body, context_bound(service))
        writer = chat.Writer(body, ask, model, service.tokenizer)
        return await _answer(service, ask, writer, request, stream=body.stream, options=body.stream_options)

    @app.post("/v1/completions")
    async def text_completions(body: completions.CompletionRequest, request: Request) -> Response:
        _check_model(body.model, model)
        ask = completions.ask_of(body, service.tokenizer, context_bound(service))
        writer = completions.Writer(body, ask, model, service.tokenizer)
        return await _answer(service, ask, writer, request, stream=body.stream, options=body.stream_options)

    @app.post("/inference/v1/generate")
    async def tokens(body: vllm.GenerateRequest, request: Request) -> Response:
        _check_model(body.model, model)
        ask = vllm.ask_of(body, context_bound(service))
        writer = vllm.Writer(body, ask)
        return await _answer(service, ask, writer, request, stream=body.stream, options=body.stream_options)

    @app.post("/inference/v1/abort_requests")
    async def abort(body: vllm.AbortRequest) -> Response:
        known = [name for name in body.request_ids if name in service.ledger.jobs]
        for name in known:
            await service.cancel(name)
        return JSONResponse({"aborted": known})


def _add_engine(app: FastAPI, service: RolloutService) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        info = service.engine.info
        card = {
            "id": info.name,
            "object": "model",
            "created": 0,
            "owned_by": "dsec",
            "root": info.weights_digest,
            "max_model_len": context_bound(service),
        }
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.post("/pause")
    async def pause(mode: str = "abort", clear_cache: bool = False) -> Response:
        match mode:
            case "keep" | "wait" | "abort":
                await service.engine.pause(mode)
            case _:
                raise RequestError(f"mode is {mode[:20]!r}, must be keep, wait or abort")
        return JSONResponse({"status": "paused", "cleared_cache": False, "clear_cache_asked": clear_cache})

    @app.post("/resume")
    async def resume() -> Response:
        await service.engine.resume()
        return JSONResponse({"status": "resumed"})

    @app.get("/is_paused")
    async def is_paused() -> Response:
        return JSONResponse({"is_paused": service.engine.is_paused})


def _check_model(asked: str | None, served: str) -> None:
    if asked not in (None, "", served):
        raise NotFoundError(f"no model {asked[:80]!r} here: this service has {served!r}")


async def _answer(
    service: RolloutService,
    ask: Ask,
    writer: Writer,
    request: Request,
    *,
    stream: bool | None,
    options: StreamOptions | None,
) -> Response:
    pieces = generate(service, ask)
    if stream:
        first = await _unless_gone(request, anext(pieces))  # what is wrong with the request is said before a 200 is
        if first is None:
            return Response(status_code=CLIENT_GONE)
        counts = options is not None and options.include_usage
        return StreamingResponse(_events(pieces, first, writer, counts=counts), media_type="text/event-stream")
    states = await _unless_gone(request, _collect(pieces))
    return Response(status_code=CLIENT_GONE) if states is None else JSONResponse(writer.whole(states))


async def _collect(pieces: AsyncGenerator[Piece, None]) -> list[State]:
    async with aclosing(pieces):
        ended = {piece.index: piece.state async for piece in pieces if isinstance(piece, Ended)}
    return [ended[index] for index in sorted(ended)]


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """What comes of the work; None, and the work given up, if the client went away."""
    task, gone = asyncio.ensure_future(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    pieces: AsyncGenerator[Piece, None], first: Piece, writer: Writer, *, counts: bool
) -> AsyncIterator[bytes]:
    """Server-sent events; an error after the first token is an event of its own, as vLLM has it."""
    states: dict[int, State] = {}

    def told(piece: Piece) -> dict[str, Any]:
        if isinstance(piece, Ended):
            states[piece.index] = piece.state
            return writer.end(piece.index, piece.state)
        return writer.piece(piece.index, piece.token_ids, piece.logprobs)

    async with aclosing(pieces):
        try:
            yield _event(told(first))
            async for piece in pieces:
                yield _event(told(piece))
            if counts:
                yield _event(writer.counts([states[index] for index in sorted(states)]))
        except (RolloutError, DsecError, WalError, DslError) as error:
            yield _event({"error": _error(error)})
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _error(error: RolloutError | DsecError | WalError | DslError) -> dict[str, Any]:
    status = STATUS.get(error.code, 500)
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    return {"message": str(error), "type": kind, "param": None, "code": error.code}


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        lines = [f"{'.'.join(map(str, each['loc'][1:])) or 'body'}: {each['msg']}" for each in error.errors()[:5]]
        said = {"message": "; ".join(lines), "type": "invalid_request_error", "param": None, "code": "BAD_REQUEST"}
        return JSONResponse({"error": said}, status_code=400)

    async def ours(_: Request, error: Exception) -> Response:
        if not isinstance(error, RolloutError | DsecError | WalError | DslError):
            raise error
        return JSONResponse({"error": _error(error)}, status_code=STATUS.get(error.code, 500))

    for root in (RolloutError, DsecError, WalError, DslError):
        app.add_exception_handler(root, ours)


def _add_guard(app: FastAPI, token: str) -> None:
    """Who may call, and how much they may send; a page in somebody's browser may not call at all."""

    @app.middleware("http")
    async def guard(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        if (why := _refusal(request, token)) is not None:
            status, message = why
            said = {"message": message, "type": "invalid_request_error", "param": None, "code": "REFUSED"}
            return JSONResponse({"error": said}, status_code=status)
        return await call(request)


def _refusal(request: Request, token: str) -> tuple[int, str] | None:
    if request.url.path == "/health":
        return None
    if token and not secrets.compare_digest(
        request.headers.get("authorization", "").encode(), f"Bearer {token}".encode()
    ):
        return 401, "give the service's token: Authorization: Bearer TOKEN"
    if not token and "origin" in request.headers:
        return 403, "a page of another origin may not call this service"
    length = request.headers.get("content-length", "0")
    if request.method == "POST" and "transfer-encoding" in request.headers:
        return 411, "send a Content-Length"
    if not length.isdigit() or int(length) > BODY_BYTES_MAX:
        return 413, f"a body has at most {BODY_BYTES_MAX} bytes"
    return None


class _Server(uvicorn.Server):
    """Signals are its process's, which stops it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """A server that listens; `port` is the one it got."""

    def __init__(self, server: uvicorn.Server, listening: socket.socket) -> None:
        self.port: int = listening.getsockname()[1]
        self._server, self._listening = server, listening
        self._task = asyncio.create_task(server.serve(sockets=[listening]))

    async def stop(self) -> None:
        """Take no more calls, give running ones a second; the log keeps what they got."""
        self._server.should_exit = True
        await self._task
        self._listening.close()


def start_http_server(service: RolloutService, address: str, token: str = "") -> HttpServer:
    """Serve a started service at `HOST:PORT` (port 0: any).  RequestError if it cannot be bound."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) >= 1 << 16:
        raise RequestError(f"cannot listen on {address!r}: give HOST:PORT, with a port from 0 (any) to 65535")
    try:
        listening = socket.create_server((host.strip("[]"), int(port)))
    except OSError as error:
        raise RequestError(f"cannot listen on {address}: {error.strerror or error}; choose another") from error
    config = uvicorn.Config(
        make_app(service, token), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
    )
    return HttpServer(_Server(config), listening)
