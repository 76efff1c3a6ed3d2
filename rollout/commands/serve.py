"""Commands for workers: `dsec serve`, `dsec workers` and `dsec index`."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from dsec.errors import UnreachableError
from dsec.listen import Listen, read_certificate, read_token
from dsec.sandbox import Substrate
from dsec.terminal import counted, render_columns
from rollout.commands.run import EDGE_HELP, ENGINE_HELP, given_knobs, tokenizer_option
from rollout.config import RolloutConfig, WorkerConfig
from rollout.engine import Engine
from rollout.errors import RequestError
from rollout.main import STATES, load_tokenizer, make_engine, make_substrate
from rollout.rpc.grpc_server import REQUEST_BYTES_MAX, Server, handlers_of, start_server
from rollout.rpc.listening import KEY, address_of, listen_at, told
from rollout.service import RolloutService
from rollout.stopping import done_before, stop_signal
from rollout.workers.forward import Router
from rollout.workers.index import Index, Snapshot, sqlite_url
from rollout.workers.partitions import Parts, copy_log, find_logs
from rollout.workers.worker import Worker
from toolcall_dsl import Tokenizer

if TYPE_CHECKING:
    from rollout.dialects.http_server import HttpServer
_WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NOT_IN_ORDER = 3
_TELL_S = 1.0
_ALONE_ID = "server"
"""The only worker of a directory that is served alone."""
INDEX_HELP = (
    "Where the workers of the root agree: sqlite:///FILE or postgresql://USER@HOST/DATABASE.  "
    "[default: ROOT/index.db, for workers of one host]"
)
_REBUILD_EXAMPLE = "\b\nExample:\n  dsec index rebuild /srv/rollouts"
_index_option = click.option("--index", "url", metavar="URL", envvar="DSEC_INDEX_URL", default="", help=INDEX_HELP)


@click.command(
    short_help="Serve rollouts over gRPC and HTTP.",
    epilog="\b\nExamples:\n  dsec serve --out runs/server --listen 127.0.0.1:7710 --http 127.0.0.1:7780\n"
    "  dsec serve --root /srv/rollouts --worker-id a --listen 127.0.0.1:7711\n"
    "  dsec serve --engine http://10.0.0.1:8000 --engine http://10.0.0.2:8000 --tokenizer /models/v4-flash",
)
@click.option("--out", type=click.Path(path_type=Path), help="One run directory, alone.  [default: runs/server]")
@click.option("--root", type=click.Path(path_type=Path), help="Run directories that workers share.")
@_index_option
@click.option("--worker-id", default="", help="Name of this worker among those of --root.  [default: HOST-PORT]")
@click.option(
    "--listen",
    metavar="URL",
    default="127.0.0.1:7710",
    show_default=True,
    help="HOST:PORT, tls:HOST:PORT or unix:PATH; port 0 takes a free one.",
)
@click.option("--http", metavar="URL", default="", help="Speak OpenAI's and vLLM's HTTP there, too; tls: is https.")
@click.option("--token-file", type=click.Path(path_type=Path), help=f"What both ports ask for  [default: {KEY}]")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="The certificate and its chain, PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key, PEM.")
@click.option("--advertise", default="", help="URL where other workers reach this one.  [default: as --listen]")
@click.option("--concurrency", type=click.IntRange(1, 1024), help="Rollouts that sample at once.  [default: 16]")
@click.option("--grace-s", type=float, help="How long a stop may take.  [default: 30]")
@click.option("--edge", "edge_url", metavar="URL", default="", help=EDGE_HELP)
@click.option("--engine", "engines", metavar="URL", multiple=True, help=ENGINE_HELP)
@tokenizer_option
def serve(
    out: Path | None,
    root: Path | None,
    url: str,
    worker_id: str,
    listen: str,
    http: str,
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    advertise: str,
    concurrency: int | None,
    grace_s: float | None,
    edge_url: str,
    engines: tuple[str, ...],
    tokenizer: Path | None,
) -> None:
    """Serve rollouts over gRPC (rollout.pb.v1.RolloutService, health, reflection) until a signal comes.

    Unfinished rollouts of the directory's log are taken up at once.  With --root, any number of workers share a
    directory of logs: each runs what was submitted to it, passes on calls about what another one runs, and takes over
    the logs of one that died or was stopped.  A signal stops rollouts at a token boundary.

    Where others than this host's own programs can connect there must be a token, which gRPC clients find in
    DSEC_ROLLOUT_KEY and HTTP ones give as a bearer.  It and all else passes in the clear but for tls:.
    """
    if root is not None and out is not None:
        raise RequestError("--out serves one run directory alone, --root shares a directory of them: give one of them")
    if root is None and (url or worker_id):
        raise RequestError("--index and --worker-id are for workers that share a directory: give --root, too")
    if not _WORKER_ID.fullmatch(worker_id or "x"):
        raise RequestError(f"--worker-id {worker_id!r}: use 1 to 64 letters, digits, '.', '_' and '-'")
    doors = _doors(listen, http, advertise, read_token(token_file, KEY), tls_cert, tls_key)
    config = WorkerConfig() if grace_s is None else WorkerConfig(grace_s=grace_s)
    bounds = RolloutConfig(**given_knobs(concurrency=concurrency, engines=engines, tokenizer=tokenizer))
    directory = root or out or Path("runs/server")
    index = Index(url or sqlite_url(directory))
    tokenizer_given = load_tokenizer(bounds.tokenizer)
    engine = make_engine(bounds, directory / STATES)

    def make(address: str) -> Worker:
        def substrate(directory: Path, number: int) -> Substrate:
            return make_substrate(directory, bounds, edge_url, number)

        parts = Parts(engine, tokenizer_given, bounds, substrate, has_served_edge=bool(edge_url))
        name = worker_id or (f"{socket.gethostname()}-{re.split('[:/]', address)[-1]}" if root else _ALONE_ID)
        return Worker(directory, index, parts, config, name, is_alone=root is None)

    if not asyncio.run(_serve(directory, doors, make, engine, root is None)):
        click.echo(f"dsec: not stopped in order within {config.grace_s:g} s; the logs have what was done", err=True)
        os._exit(_NOT_IN_ORDER)


@dataclass(frozen=True)
class Doors:
    """Where a worker is reached, and by whom."""

    listen: Listen
    advertise: str
    http: Listen | None
    http_certificate: tuple[Path, Path] | None
    token: str


def _doors(listen: str, http: str, advertise: str, token: str, cert: Path | None, key: Path | None) -> Doors:
    certificate = read_certificate(cert, key)
    grpc_at = listen_at(listen, token, certificate)
    http_at = listen_at(http, token, certificate) if http else None
    is_https = http_at is not None and http_at.certificate is not None
    advertised = told(address_of(advertise).url) if advertise else ""
    return Doors(grpc_at, advertised, http_at, (cert, key) if is_https and cert and key else None, token)


async def _serve(directory: Path, doors: Doors, make: Callable[[str], Worker], engine: Engine, is_alone: bool) -> bool:
    stopped = stop_signal()
    router = Router(handlers_of, REQUEST_BYTES_MAX, doors.token)
    server = await start_server(None, doors.listen, [router])
    http = None
    try:
        await server.tell(is_ready=False)
        http = _start_http(doors, router, engine)
        worker = make(doors.advertise or server.address)
        is_open = await done_before(stopped, worker.open(doors.advertise or server.address))
    except BaseException:
        await _hang_up(server, http)
        raise
    if not is_open:
        await _hang_up(server, http)
        click.echo("dsec: stopped before it served", err=True)
        return True
    router.worker = worker
    where = server.address
    if http is not None and doors.http is not None:
        scheme = "https" if doors.http_certificate else "http"
        where += f" and {scheme}://{doors.http.url_with(http.port).partition(':')[2]}"
    await server.serve()
    telling = asyncio.create_task(_tell(server, engine))
    what = f"log {directory}/wal" if is_alone else f"worker {worker.worker_id} of {directory}"
    click.echo(f"dsec: serving {where}, {what}, {counted(worker.running_count, 'rollout')} taken up")
    broken = asyncio.create_task(worker.failed())
    ends: list[asyncio.Future[Any]] = [stopped, broken]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    telling.cancel()
    if http is not None:
        await http.stop()
    for owned in worker.owned.values():
        owned.service.watchers.send_away()  # while they can still be told to ask again: gRPC's own stop only cancels
    await server.stop()
    unfinished = counted(worker.running_count, "rollout")
    is_in_order = await worker.close()
    click.echo(f"dsec: stopped, {unfinished} unfinished", err=True)
    await router.close()
    if broken.done():
        broken.result()
    broken.cancel()
    return is_in_order


def _start_http(doors: Doors, router: Router, engine: Engine) -> HttpServer | None:
    """The HTTP port, if one is asked for; until the router has its worker it says that this one is starting."""
    if doors.http is None:
        return None
    from rollout.dialects.http_server import listen, start_http_server  # a third of the start, and few ask for it

    async def locate(request_id: str, *, creates: bool, beside: str = "") -> RolloutService | str:
        if router.worker is None:
            waits = f" (no engine draws yet: {engine.failure})" if engine.failure else ""
            raise UnreachableError(f"this worker is starting: ask again{waits}")
        return await router.worker.locate(request_id, creates=creates, beside=beside)

    return start_http_server(locate, listen(doors.http), doors.token, doors.http_certificate)


async def _hang_up(server: Server, http: HttpServer | None) -> None:
    """After a start that came to nothing."""
    if http is not None:
        await http.stop()
    await server.stop()


async def _tell(server: Server, engine: Engine) -> None:
    """Say over and over whether anything can be drawn."""
    while True:
        await server.tell(is_ready=not engine.failure)
        await asyncio.sleep(_TELL_S)


@click.command(short_help="Who shares a root, and who owns what.", epilog="\b\nExample:\n  dsec workers /srv/rollouts")
@click.argument("root", type=click.Path(path_type=Path))
@_index_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def workers(root: Path, url: str, as_json: bool) -> None:
    """Print the workers of ROOT with their leases and load, and the partitions with their owners and epochs."""
    snapshot = asyncio.run(_look(_existing(root, url)))
    if as_json:
        click.echo(msgspec.json.encode(snapshot))
        return
    names = {worker.owner: worker.worker_id for worker in snapshot.workers}
    rows = []
    for each in snapshot.workers:
        lease = f"{each.lease_s:.0f} s" if each.lease_s > 0 else f"lapsed {-each.lease_s:.0f} s ago"
        mine = sum(partition.owner == each.owner for partition in snapshot.partitions)
        running = str(each.running) if each.lease_s > 0 else "-"  # it said so when it lived
        rows.append((each.worker_id, each.address, lease, running, str(mine)))
    click.echo(render_columns(("WORKER", "ADDRESS", "LEASE", "RUNNING", "PARTITIONS"), rows))
    owned = [(each.name, str(each.epoch), names.get(each.owner or "", "nobody")) for each in snapshot.partitions]
    click.echo("\n" + render_columns(("PARTITION", "EPOCH", "OWNER"), owned))


async def _look(index: Index) -> Snapshot:
    await index.open()
    try:
        return await index.snapshot()
    finally:
        await index.close()


@click.group(short_help="The index that workers share.", epilog=_REBUILD_EXAMPLE)
def index() -> None:
    """The index of a root: who has what, and how rollouts stand.  The logs are the truth."""


@index.command(short_help="Make the index again from the logs.", epilog=_REBUILD_EXAMPLE)
@click.argument("root", type=click.Path(path_type=Path))
@_index_option
@tokenizer_option
def rebuild(root: Path, url: str, tokenizer: Path | None) -> None:
    """Copy what the logs of ROOT say into the index.

    Beside running workers it mends what is there; with none, it forgets first what no log says.
    """
    if not root.is_dir():
        raise RequestError(f"there is no directory {root}")
    logs, rollouts = asyncio.run(_rebuild(root, Index(url or sqlite_url(root)), load_tokenizer(tokenizer)))
    click.echo(f"dsec: {logs} logs, {rollouts} rollouts")


async def _rebuild(root: Path, index: Index, tokenizer: Tokenizer) -> tuple[int, int]:
    logs = list(find_logs(root))
    await index.open()
    try:
        if not (await index.snapshot()).living():
            await index.forget_jobs()
        return len(logs), sum([await copy_log(index, name, log, tokenizer) for name, log in logs])
    finally:
        await index.close()


def _existing(root: Path, url: str) -> Index:
    """RequestError rather than a new file."""
    if not url and not Path(sqlite_url(root).removeprefix("sqlite:///")).exists():
        raise RequestError(f"{root} has no index: no worker was ever there (for an index elsewhere give --index)")
    return Index(url or sqlite_url(root))
