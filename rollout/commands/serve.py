"""Commands for workers: `dsec serve`, `dsec workers` and `dsec index`."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec
from rich import box
from rich.table import Table

from dsec.sandbox import Substrate
from dsec.terminal import visible
from rollout.commands.run import EDGE_HELP
from rollout.commands.screen import make_console
from rollout.config import RolloutConfig, WorkerConfig
from rollout.dialects.http_server import listen as listen_http
from rollout.dialects.http_server import start_http_server
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.errors import RequestError
from rollout.main import load_tokenizer, make_substrate
from rollout.rpc.grpc_server import REQUEST_BYTES_MAX, handlers_of, start_server
from rollout.workers.forward import Router
from rollout.workers.index import Index, Snapshot, sqlite_url
from rollout.workers.partitions import Parts, copy_log, find_logs
from rollout.workers.worker import Worker

_WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NOT_IN_ORDER = 3
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
    "  dsec serve --root /srv/rollouts --worker-id a --listen 127.0.0.1:7711",
)
@click.option("--out", type=click.Path(path_type=Path), help="One run directory, alone.  [default: runs/server]")
@click.option("--root", type=click.Path(path_type=Path), help="Run directories that workers share.")
@_index_option
@click.option("--worker-id", default="", help="Name of this worker among those of --root.  [default: HOST-PORT]")
@click.option("--listen", default="127.0.0.1:7710", show_default=True, help="HOST:PORT; port 0 takes a free one.")
@click.option("--http", metavar="HOST:PORT", default="", help="Speak OpenAI's and vLLM's HTTP dialects there, too.")
@click.option("--http-token-file", type=click.Path(path_type=Path), help="Its first line is what --http callers give.")
@click.option("--advertise", default="", help="HOST:PORT where other workers reach this one.  [default: as --listen]")
@click.option(
    "--concurrency", type=click.IntRange(1, 1024), default=16, show_default=True, help="Rollouts that sample at once."
)
@click.option("--grace-s", type=float, help="How long a stop may take.  [default: 30]")
@click.option("--edge", "edge_url", metavar="URL", default="", help=EDGE_HELP)
def serve(
    out: Path | None,
    root: Path | None,
    url: str,
    worker_id: str,
    listen: str,
    http: str,
    http_token_file: Path | None,
    advertise: str,
    concurrency: int,
    grace_s: float | None,
    edge_url: str,
) -> None:
    """Serve rollouts over gRPC (rollout.pb.v1.RolloutService, health, reflection) until a signal comes.

    Unfinished rollouts of the directory's log are taken up at once.  With --root, any number of workers share a
    directory of logs: each runs what was submitted to it, passes on calls about what another one runs, and takes over
    the logs of one that died or was stopped.  A signal stops rollouts at a token boundary.

    The gRPC port has no authentication, that of --http has none without a token, and neither hides what passes:
    listen on a loopback or private address only.
    """
    if http_token_file is not None and not http:
        raise RequestError("--http-token-file is for --http: give that, too")
    if root is not None and out is not None:
        raise RequestError("--out serves one run directory alone, --root shares a directory of them: give one of them")
    if root is None and (url or worker_id):
        raise RequestError("--index and --worker-id are for workers that share a directory: give --root, too")
    if not _WORKER_ID.fullmatch(worker_id or "x"):
        raise RequestError(f"--worker-id {worker_id!r}: use 1 to 64 letters, digits, '.', '_' and '-'")
    given = {} if grace_s is None else {"grace_s": grace_s}
    config, bounds = WorkerConfig(**given), RolloutConfig(concurrency=concurrency)
    directory = root or out or Path("runs/server")
    index = Index(url or sqlite_url(directory))

    def make(address: str) -> Worker:
        def substrate(directory: Path, number: int) -> Substrate:
            return make_substrate(directory, bounds, edge_url, number)

        parts = Parts(EmbeddedEngine(), load_tokenizer(), bounds, substrate, has_served_edge=bool(edge_url))
        name = worker_id or (f"{socket.gethostname()}-{address.rpartition(':')[2]}" if root else _ALONE_ID)
        return Worker(directory, index, parts, config, name, is_alone=root is None)

    doors = Doors(listen, advertise, http, _token(http_token_file))
    if not asyncio.run(_serve(directory, doors, make, root is None)):
        click.echo(f"dsec: not stopped in order within {config.grace_s:g} s; the logs have what was done", err=True)
        os._exit(_NOT_IN_ORDER)


@dataclass(frozen=True)
class Doors:
    """Where a worker is reached."""

    listen: str
    advertise: str
    http: str
    http_token: str


def _token(file: Path | None) -> str:
    """RequestError rather than an open port."""
    if file is None:
        return ""
    try:
        token = file.read_text().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the token file {file}: {error}") from error
    if not token:
        raise RequestError(f"the token file {file} has no token in its first line")
    return token


async def _serve(directory: Path, doors: Doors, make: Callable[[str], Worker], is_alone: bool) -> bool:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    router = Router(handlers_of, REQUEST_BYTES_MAX)
    listening = listen_http(doors.http) if doors.http else None
    server = await start_server(None, doors.listen, [router])
    where = f"{doors.listen.rpartition(':')[0]}:{server.port}"
    worker = make(doors.advertise or where)
    try:
        await worker.open(doors.advertise or where)
    except BaseException:
        await server.stop()
        raise
    router.worker = worker
    http = start_http_server(worker.locate, listening, doors.http_token) if listening is not None else None
    await server.serve()
    if http is not None:
        where += f" and http://{doors.http.rpartition(':')[0]}:{http.port}"
    what = f"log {directory}/wal" if is_alone else f"worker {worker.worker_id} of {directory}"
    click.echo(f"dsec: serving {where}, {what}, {worker.running_count} rollouts taken up")
    stopped, broken = asyncio.create_task(stop.wait()), asyncio.create_task(worker.failed())
    await asyncio.wait([stopped, broken], return_when=asyncio.FIRST_COMPLETED)
    if http is not None:
        await http.stop()
    await server.stop()
    is_in_order = await worker.close()
    await router.close()
    stopped.cancel()
    if broken.done():
        broken.result()
    broken.cancel()
    return is_in_order


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
    console = make_console()
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("worker", "address", "lease", "running", "partitions"):
        table.add_column(column)
    for each in snapshot.workers:
        lease = f"{each.lease_s:.0f} s" if each.lease_s > 0 else f"lapsed {-each.lease_s:.0f} s ago"
        mine = sum(partition.owner == each.owner for partition in snapshot.partitions)
        table.add_row(visible(each.worker_id), visible(each.address), lease, str(each.running), str(mine))
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("partition", "epoch", "owner"):
        table.add_column(column)
    for partition in snapshot.partitions:
        table.add_row(
            visible(partition.name), str(partition.epoch), visible(names.get(partition.owner or "", "nobody"))
        )
    console.print(table)


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
def rebuild(root: Path, url: str) -> None:
    """Copy what the logs of ROOT say into the index.

    Beside running workers it mends what is there; with none, it forgets first what no log says.
    """
    if not root.is_dir():
        raise RequestError(f"there is no directory {root}")
    logs, rollouts = asyncio.run(_rebuild(root, Index(url or sqlite_url(root))))
    click.echo(f"dsec: {logs} logs, {rollouts} rollouts")


async def _rebuild(root: Path, index: Index) -> tuple[int, int]:
    tokenizer = load_tokenizer()
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
