"""HTTP in front of rollout services: the dialects of OpenAI and vLLM, and Quick Instructions; translation only.

Every answer comes out of the log: what is streamed is durable first, and a request under an id of its caller's can
be sent again after any break, of the connection, of the client or of this server.  Among several workers each
answers for its own requests; one that another has is answered with that worker's name.

See: docs/serving.md, "HTTP dialects"; `rollout/dialects/` for what each field means.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsec.errors import DsecError, UnreachableError
from dsec.listen import Listen
from rollout import generation
from rollout.dialects import chat, completions, quick, vllm
from rollout.dialects.http_errors import add_errors, told_of
from rollout.dialects.http_guard import Guard
from rollout.dialects.options import StreamOptions
from rollout.errors import EngineError, NotFoundError, RequestError, RolloutError
from rollout.generation import Ask, Drawn, Ended, context_bound, generate
from rollout.rpc.listening import told
from rollout.service import RolloutService
from rollout.state import State
from toolcall_dsl import DslError
from wal import WalError

CONNECTIONS_MAX = 1024
HEAD_S = 10.0
"""For the head of a request to arrive in."""
CLIENT_GONE = 499
"""Nobody reads it; nginx's word for it."""
Piece = Drawn | Ended
T = TypeVar("T")


class Writer(Protocol):
    """A dialect's answers."""

    def whole(self, states: list[State]) -> dict[str, Any]:
        """The answer in one piece."""
        ...

    def piece(self, drawn: Drawn) -> dict[str, Any]:
        """Some more tokens of a choice."""
        ...

    def end(self, index: int, state: State) -> dict[str, Any]:
        """The last piece of a choice."""
        ...

    def counts(self, states: list[State]) -> dict[str, Any]:
        """The chunk after the last, if it was asked for."""
        ...


Find = Callable[..., Awaitable[RolloutService | str]]
"""`find(request_id, creates=..., beside=...)`: who has or takes a request, or one about another; or where that is."""


def make_app(find: Find, token: str = "") -> Guard:
    """The application over services that are open; `find` is `Worker.locate`."""
    app = FastAPI(title="dsec", docs_url=None, redoc_url=None, openapi_url=None)
    add_errors(app)
    _add_generation(app, find)
    _add_engine(app, find)
    return Guard(app, token)


async def _find(find: Find, request_id: str | None, *, creates: bool = True, beside: str = "") -> RolloutService:
    """The service for a request; one without a name is for whoever is asked."""
    where = await find(request_id or "", creates=creates and bool(request_id), beside=beside)
    if isinstance(where, str):
        name = beside or str(request_id)
        raise HTTPException(421, f"request {name[:128]!r} is with the worker at {where}: ask that one")
    return where


def _add_generation(app: FastAPI, find: Find) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(body: chat.ChatRequest, request: Request) -> Response:
        service = await _find(find, body.request_id)
        model = _checked_model(body.model, service)
        ask = await asyncio.to_thread(chat.ask_of, body, context_bound(service))
        writer = chat.Writer(body, ask, model, service.tokenizer)
        return await _answer(service, ask, writer, request, stream=body.stream, options=body.stream_options)

    @app.post("/v1/completions")
    async def text_completions(body: completions.CompletionRequest, request: Request) -> Response:
        service = await _find(find, body.request_id)
        model = _checked_model(body.model, service)
        ask = await asyncio.to_thread(completions.ask_of, body, service.tokenizer, context_bound(service))
        writer = completions.Writer(body, ask, model, service.tokenizer)
        return await _answer(service, ask, writer, request, stream=body.stream, options=body.stream_options)

    @app.post("/inference/v1/generate")
    async def tokens(body: vllm.GenerateRequest, request: Request) -> Response:
        service = await _find(find, body.request_id)
        _checked_model(body.model, service)
        ask = await asyncio.to_thread(vllm.ask_of, body, context_bound(service))
        writer = vllm.Writer(body, ask)
        return await _answer(service, ask, writer, request, stream=body.stream, options=body.stream_options)

    @app.post("/v1/quick_instructions")
    async def quick_instructions(body: quick.QuickRequest, request: Request) -> Response:
        service = await _find(find, body.request_id, beside=body.rollout_id.partition("/")[0])
        work = quick.answer(body, service, _checked_model(body.model, service))
        said = await _unless_gone(request, work)
        return Response(status_code=CLIENT_GONE) if said is None else JSONResponse(said)

    @app.post("/inference/v1/abort_requests")
    async def abort(body: vllm.RequestIds) -> Response:
        return JSONResponse({"aborted": [name async for name in _done(find, body, RolloutService.cancel)]})

    @app.post("/inference/v1/ack_requests")
    async def acknowledge(body: vllm.RequestIds) -> Response:
        return JSONResponse({"acknowledged": [name async for name in _done(find, body, generation.acknowledge)]})


async def _done(
    find: Find, body: vllm.RequestIds, do: Callable[[RolloutService, str], Awaitable[int]]
) -> AsyncIterator[str]:
    """Those of the requests that there are, once it was done."""
    for name in body.request_ids:
        service = await _find(find, name, creates=False)
        if name in service.ledger.jobs:
            await do(service, name)
            yield name


def _add_engine(app: FastAPI, find: Find) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        service = await _find(find, None)
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
    async def health(request: Request) -> Response:
        try:
            failure = (await _find(find, None)).engine.failure
        except UnreachableError as error:  # it starts, or has no log now
            failure = str(error)
        if failure:
            raise EngineError(f"nothing can be drawn: {failure if request.scope['may_call'] else 'the log says why'}")
        return Response()

    @app.get("/live")
    async def live() -> Response:
        return Response()

    @app.post("/pause")
    async def pause(mode: str = "abort", clear_cache: bool = False) -> Response:
        match mode:
            case "keep" | "wait" | "abort":
                await (await _find(find, None)).engine.pause(mode)
            case _:
                raise RequestError(f"mode is {mode[:20]!r}, must be keep, wait or abort")
        return JSONResponse({"status": "paused", "cleared_cache": False, "clear_cache_asked": clear_cache})

    @app.post("/resume")
    async def resume() -> Response:
        await (await _find(find, None)).engine.resume()
        return JSONResponse({"status": "resumed"})

    @app.get("/is_paused")
    async def is_paused() -> Response:
        return JSONResponse({"is_paused": (await _find(find, None)).engine.is_paused})


def _checked_model(asked: str | None, service: RolloutService) -> str:
    served = service.engine.info.name
    if asked and asked != served:
        raise NotFoundError(f"no model {asked[:80]!r} here: this service has {served!r}")
    return served


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
        return writer.piece(piece)

    async with aclosing(pieces):
        try:
            yield _event(told(first))
            async for piece in pieces:
                yield _event(told(piece))
            if counts:
                yield _event(writer.counts([states[index] for index in sorted(states)]))
        except (RolloutError, DsecError, WalError, DslError) as error:
            yield _event(told_of(error)[0])
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


class _Connection(H11Protocol):
    """Closes if the head of a request does not arrive in time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as its base does
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def _wait_for_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


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


def listen(where: Listen) -> socket.socket:
    """A socket there (port 0: any).  RequestError if it cannot be bound, or is none of TCP."""
    if where.address.kind == "unix":
        raise RequestError(f"cannot listen for HTTP on {where.address.url}: give HOST:PORT, or tls:HOST:PORT")
    host, _, port = where.address.target.rpartition(":")
    try:
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        return socket.create_server((host.strip("[]"), int(port)), family=family)
    except OSError as error:
        raise RequestError(
            f"cannot listen on {told(where.address.url)}: {error.strerror or error}; choose another"
        ) from error


def start_http_server(
    find: Find, listening: socket.socket, token: str = "", certificate: tuple[Path, Path] | None = None
) -> HttpServer:
    """Serve open services on a socket of `listen`, which closes with the server.

    `certificate`: files of the chain and of its key, for TLS.  RequestError if they are none.
    """
    config = uvicorn.Config(
        make_app(find, token),
        http=_Connection,
        ws="none",
        log_config=None,
        log_level="error",  # who sends what is no HTTP is told, and writes nothing into our log
        access_log=False,
        lifespan="off",
        limit_concurrency=CONNECTIONS_MAX,
        timeout_graceful_shutdown=1,
        ssl_certfile=certificate and certificate[0],
        ssl_keyfile=certificate and certificate[1],
    )
    try:
        config.load()
    except OSError as error:
        raise RequestError(f"cannot use the certificate {certificate and certificate[0]}: {error}") from error
    return HttpServer(_Server(config), listening)
