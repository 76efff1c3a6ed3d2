"""The index of a root in SQL: who owns which partition, and which partition has which job.

The logs are the truth; this is what many workers have in common without reading each other's logs.  Two things
are decided here and nowhere else, each by one statement that only one can win: whose a partition is, and where a
new request id goes.  Time is the database's, so workers need no equal clocks.  What it says of rollouts is copied
from the logs, a moment late, and may be made again from them (`rollout.cli_worker`, `dsec index rebuild`).

SQLAlchemy's calls run in threads of their own, one a call: a database that hangs keeps neither the event loop nor
the end of the process waiting.

Invariants:
1. A partition has one owner; its epoch grows with each.
2. A request id belongs to one partition, until its job is acknowledged whole: then nobody may ask for it again.
3. An answer that does not come in time is an UnreachableError, and whether the statement took effect is not known:
   callers look at `snapshot` before they act on what they wanted.

See: docs/architecture.md, "Workers"; docs/adr/0019-many-workers.md.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sql
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from dsec.errors import UnreachableError
from rollout.errors import RequestError
from rollout.events import PolicyUpdated
from rollout.threads import in_thread

T = TypeVar("T")
VERSION = 1
CALL_S = 5.0
"""Longer than this no caller waits for the database."""
_THREADS_COUNT_MAX = 4
_FORGOTTEN_S = 3600.0
"""Workers that died are shown for so long."""
LIST_COUNT_MAX = 1000
_CREATION_LOCK = 0x64736563
_NOW = {
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "cast(extract(epoch from clock_timestamp()) as double precision)",
}
"""Seconds since 1970, by the database's clock."""

_tables = sql.MetaData()
_version = sql.Table("index_version", _tables, sql.Column("version", sql.Integer, primary_key=True))
_workers = sql.Table(
    "workers",
    _tables,
    sql.Column("owner", sql.String(200), primary_key=True),
    sql.Column("worker_id", sql.String(128), nullable=False),
    sql.Column("address", sql.String(300), nullable=False),
    sql.Column("lease_until", sql.Float(53), nullable=False),
    sql.Column("running", sql.Integer, nullable=False),
)
_partitions = sql.Table(
    "partitions",
    _tables,
    sql.Column("name", sql.String(200), primary_key=True),
    sql.Column("owner", sql.String(200)),
    sql.Column("epoch", sql.BigInteger, nullable=False),
)
_jobs = sql.Table(
    "jobs",
    _tables,
    sql.Column("request_id", sql.String(128), primary_key=True),
    sql.Column("partition", sql.String(200), nullable=False),
    sql.Column("submitted_at", sql.Float(53)),
)
_rollouts = sql.Table(
    "rollouts",
    _tables,
    sql.Column("rollout_id", sql.String(400), primary_key=True),
    sql.Column("request_id", sql.String(128), nullable=False, index=True),
    sql.Column("partition", sql.String(200), nullable=False),
    sql.Column("task", sql.String(200), nullable=False),
    sql.Column("state", sql.String(16), nullable=False),
    sql.Column("finish_reason", sql.String(32), nullable=False),
    sql.Column("reward", sql.Float(53)),
    sql.Column("updated_at", sql.Float(53)),
)
_policies = sql.Table(
    "policies",
    _tables,
    sql.Column("policy_version", sql.BigInteger, primary_key=True, autoincrement=False),
    sql.Column("checkpoint", sql.Text, nullable=False),
    sql.Column("weights_digest", sql.String(128), nullable=False),
)


class Worker(msgspec.Struct, frozen=True):
    """A worker process; `owner` is it alone, `worker_id` also its successor's.  A lease of 0 s or less has lapsed."""

    owner: str
    worker_id: str
    address: str
    lease_s: float
    running: int


class Partition(msgspec.Struct, frozen=True):
    """A log directory, and the process that may write it (None: nobody may)."""

    name: str
    epoch: int
    owner: str | None


class Snapshot(msgspec.Struct, frozen=True):
    """Everything that leases are decided by, as of one moment."""

    workers: tuple[Worker, ...]
    partitions: tuple[Partition, ...]

    def without(self, names: Collection[str]) -> Snapshot:
        """As if these partitions were not there."""
        return Snapshot(self.workers, tuple(each for each in self.partitions if each.name not in names))

    def living(self) -> dict[str, Worker]:
        """Workers whose lease is valid, by owner."""
        return {worker.owner: worker for worker in self.workers if worker.lease_s > 0}


class RolloutRow(msgspec.Struct, frozen=True):
    """What a list shows of a rollout: `state` is RUNNING, PREEMPTED, FAILED (infrastructure) or DONE."""

    rollout_id: str
    request_id: str
    partition: str
    task: str
    state: str
    finish_reason: str = ""
    reward: float | None = None


class Index:
    """One database; every method may raise UnreachableError."""

    def __init__(self, url: str) -> None:
        """`sqlite:///FILE` or `postgresql://...`.  RequestError for any other, or if its driver is not installed."""
        self._engine = _engine(url)
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        seconds = (
            "(julianday('now') - 2440587.5) * 86400.0" if self._is_sqlite else "extract(epoch from clock_timestamp())"
        )
        self._now: sql.ColumnElement[float] = sql.literal_column(seconds, sql.Float(53))
        self._threads = asyncio.Semaphore(_THREADS_COUNT_MAX)
        self.url = self._engine.url.render_as_string(hide_password=True)

    async def open(self) -> None:
        """Make what is missing of the tables.  RequestError if they are those of another version."""
        await self._call(self._create)

    async def close(self) -> None:
        """Let go of the connections, unless the database keeps that waiting."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CALL_S):
                await in_thread(self._engine.dispose, "index")

    async def join(self, owner: str, worker_id: str, address: str, ttl_s: float) -> None:
        """Begin a lease, and inherit the partitions of earlier processes of this worker, who must be dead."""
        earlier = sql.select(_workers.c.owner).where(_workers.c.worker_id == worker_id)
        until, forgotten = self._now + ttl_s, _workers.c.lease_until < self._now - _FORGOTTEN_S
        row = {"owner": owner, "worker_id": worker_id, "address": address, "lease_until": until, "running": 0}
        await self._write(
            _partitions.update().where(_partitions.c.owner.in_(earlier)).values(owner=owner),
            _workers.delete().where((_workers.c.worker_id == worker_id) | forgotten),
            _workers.insert().values(row),
        )

    async def renew(self, owner: str, ttl_s: float, running: int) -> bool:
        """Lengthen a lease; False if this worker has none (any more)."""
        values = {"lease_until": self._now + ttl_s, "running": running}
        return await self._write(_workers.update().where(_workers.c.owner == owner).values(values)) == 1

    async def leave(self, owner: str) -> None:
        """End a lease in order: its partitions are anybody's at once."""
        await self._write(
            _partitions.update().where(_partitions.c.owner == owner).values(owner=None),
            _workers.delete().where(_workers.c.owner == owner),
        )

    async def snapshot(self) -> Snapshot:
        """Who is there, and who has what."""
        lease = (_workers.c.lease_until - self._now).label("lease_s")
        columns = (_workers.c.owner, _workers.c.worker_id, _workers.c.address, lease, _workers.c.running)
        workers = await self._read(sql.select(*columns).order_by(_workers.c.worker_id))
        partitions = await self._read(
            sql.select(_partitions.c.name, _partitions.c.epoch, _partitions.c.owner).order_by(_partitions.c.name)
        )
        return Snapshot(tuple(Worker(*row) for row in workers), tuple(Partition(*row) for row in partitions))

    async def add_partition(self, name: str, epoch: int) -> None:
        """Make a partition known, as nobody's, or that its log is at `epoch` at least."""
        at_least = _partitions.update().where(_partitions.c.name == name, _partitions.c.epoch < epoch)
        await self._write(self._insert(_partitions, {"name": name, "epoch": epoch}), at_least.values(epoch=epoch))

    async def claim(self, owner: str, partition: Partition) -> bool:
        """Take a partition that nobody alive owns, as it was seen, with the next epoch; whether this caller got it."""
        living = sql.select(_workers.c.owner).where(_workers.c.lease_until > self._now)
        has_no_owner = _partitions.c.owner.is_(None) | _partitions.c.owner.not_in(living)
        is_as_seen = (_partitions.c.name == partition.name) & (_partitions.c.epoch == partition.epoch)
        taken = _partitions.update().where(is_as_seen, has_no_owner, sql.literal(owner).in_(living))
        return await self._write(taken.values(owner=owner, epoch=partition.epoch + 1)) == 1

    async def release(self, owner: str, name: str) -> None:
        """Give a partition back; without effect if it is another's by now."""
        is_ours = (_partitions.c.name == name) & (_partitions.c.owner == owner)
        await self._write(_partitions.update().where(is_ours).values(owner=None))

    async def place(self, request_id: str, partition: str) -> str:
        """The partition of a request id: `partition`, unless it has another already."""
        row = {"request_id": request_id, "partition": partition, "submitted_at": self._now}
        await self._write(self._insert(_jobs, row))
        placed = await self.partition_of(request_id)
        if placed is None:
            raise UnreachableError(f"the index {self.url} lost request {request_id!r}: try again")
        return placed

    async def partition_of(self, request_id: str) -> str | None:
        """Where a job is; None if no log has it."""
        rows = await self._read(sql.select(_jobs.c.partition).where(_jobs.c.request_id == request_id))
        return rows[0][0] if rows else None

    async def publish(self, partition: str, request_ids: Iterable[str], rows: Sequence[RolloutRow]) -> None:
        """Copy what a log says: jobs that it holds, and rollouts as they stand."""
        jobs = [{"request_id": request_id, "partition": partition} for request_id in request_ids]
        rollouts = [{**msgspec.structs.asdict(row), "updated_at": self._now} for row in rows]
        await self._write(
            *(self._insert(_jobs, job, "partition") for job in jobs),
            *(self._insert(_rollouts, row, *(name for name in row if name != "rollout_id")) for row in rollouts),
        )

    async def requests_of(self, partition: str) -> set[str]:
        """The jobs that are said to be in a partition."""
        rows = await self._read(sql.select(_jobs.c.request_id).where(_jobs.c.partition == partition))
        return {row[0] for row in rows}

    async def forget(self, partition: str, request_ids: Collection[str]) -> None:
        """Drop jobs that a log holds no longer, and their rollouts; at most `LIST_COUNT_MAX` at once."""
        await self._write(
            *(
                table.delete().where(table.c.partition == partition, table.c.request_id.in_(request_ids))
                for table in (_jobs, _rollouts)
            )
        )

    async def set_policy(self, policy: PolicyUpdated) -> None:
        """The weights that a log names, for workers that come later; older ones are nothing new."""
        engine = policy.engine
        row = {"policy_version": engine.policy_version, "checkpoint": policy.checkpoint}
        row["weights_digest"] = engine.weights_digest
        newest = sql.select(sql.func.max(_policies.c.policy_version)).scalar_subquery()
        await self._write(self._insert(_policies, row), _policies.delete().where(_policies.c.policy_version < newest))

    async def policy(self) -> tuple[int, str, str] | None:
        """The newest weights that a log of the root names: their version, where they are, and their digest."""
        rows = await self._read(sql.select(_policies).order_by(_policies.c.policy_version.desc()).limit(1))
        return (rows[0][0], rows[0][1], rows[0][2]) if rows else None

    async def rollouts(
        self, request_id: str = "", after: str = "", count_max: int = LIST_COUNT_MAX
    ) -> list[RolloutRow]:
        """Rollouts in the order of their ids, of one job or of all; `after` is the last one of the page before."""
        columns = [_rollouts.c[name] for name in RolloutRow.__struct_fields__]
        wanted = sql.select(*columns).where(_rollouts.c.rollout_id > after)
        if request_id:
            wanted = wanted.where(_rollouts.c.request_id == request_id)
        rows = await self._read(wanted.order_by(_rollouts.c.rollout_id).limit(min(count_max, LIST_COUNT_MAX)))
        return [RolloutRow(*row) for row in rows]

    async def forget_jobs(self) -> None:
        """Before they are all copied from the logs again."""
        await self._write(_jobs.delete(), _rollouts.delete(), _policies.delete())

    def _insert(self, table: sql.Table, row: dict[str, Any], *updated: str) -> Any:
        """An insert that changes only `updated` of a row that is there."""
        insert = (sqlite.insert if self._is_sqlite else postgresql.insert)(table).values(row)
        key = list(table.primary_key)
        if not updated:
            return insert.on_conflict_do_nothing(index_elements=key)
        return insert.on_conflict_do_update(index_elements=key, set_={name: row[name] for name in updated})

    def _create(self, connection: Connection) -> None:
        if not self._is_sqlite:  # two that create at once would both find nothing
            connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_CREATION_LOCK)))
        _tables.create_all(connection)
        version = connection.execute(sql.select(_version.c.version)).scalar()
        if version is None:
            connection.execute(_version.insert().values(version=VERSION))
        elif version != VERSION:
            raise RequestError(
                f"the index {self.url} is of version {version}, this program's is {VERSION}: name another one "
                "with --index, and fill it with `dsec index rebuild`"
            )

    async def _read(self, statement: Any) -> Sequence[Sequence[Any]]:
        return await self._call(lambda connection: [tuple(row) for row in connection.execute(statement)])

    async def _write(self, *statements: Any) -> int:
        """All or none of them; how many rows the last one changed."""

        def work(connection: Connection) -> int:
            changed = 0
            for statement in statements:
                changed = connection.execute(statement).rowcount
            return changed

        return await self._call(work)

    async def _call(self, work: Callable[[Connection], T]) -> T:
        """In a transaction, in a thread."""

        def transact() -> T:
            with self._engine.begin() as connection:
                return work(connection)

        async with self._threads:
            try:
                async with asyncio.timeout(CALL_S):  # wait_for would lose a cancel that meets the answer
                    return await in_thread(transact, "index")
            except TimeoutError:
                why = f"no answer in {CALL_S:g} s"
            except sql.exc.SQLAlchemyError as error:
                why = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        raise UnreachableError(f"the index {self.url} cannot be used now: {why}")


def _engine(url: str) -> Engine:
    try:
        parsed = sql.make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
            raise RequestError(f"an index is sqlite:///FILE or postgresql://..., not {parsed.drivername}:")
        pool: dict[str, Any] = {"pool_size": _THREADS_COUNT_MAX, "max_overflow": 0, "pool_timeout": CALL_S}
        if parsed.drivername == "sqlite":
            engine = sql.create_engine(parsed, connect_args={"timeout": CALL_S}, poolclass=sql.QueuePool, **pool)
            sql.event.listen(engine, "connect", _configure_sqlite)
            sql.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
            return engine
        limits = {
            "connect_timeout": int(CALL_S),
            "options": f"-c statement_timeout={int(CALL_S * 1000)}",
            "keepalives_idle": int(CALL_S),  # a host that vanished keeps no connection, nor its place in the pool
            "keepalives_interval": 1,
            "tcp_user_timeout": int(CALL_S * 1000),
        }
        return sql.create_engine(parsed, connect_args=limits, pool_pre_ping=True, **pool)
    except sql.exc.ArgumentError as error:
        raise RequestError(f"{url!r} is no index: give sqlite:///FILE or postgresql://USER@HOST/DATABASE") from error
    except ImportError as error:
        raise RequestError("an index in PostgreSQL needs psycopg: pip install 'dsec[postgres]'") from error


def _configure_sqlite(connection: Any, _record: object) -> None:
    """Readers beside a writer; transactions are begun by us, so that two writers wait instead of failing."""
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def sqlite_url(root: Path) -> str:
    """The index of a root that names none."""
    return f"sqlite:///{root.absolute() / 'index.db'}"
