"""One reader for the ranks of a node: each mini-batch is read once, and every rank maps the same copy.

Ranks ask over a socket in Linux's abstract namespace and are handed a descriptor of the block; neither
has a name in a file system, so nothing is left behind by whoever is killed.  A rank that is killed lets
go of what it held when the kernel closes its connection, and may come back at any step.

Invariants:
1. At most `window` mini-batches are in memory that the node holds.
2. A rank holds the one that it took last.  A mini-batch stays until every rank that is not gone is past it, so
   it is read once, and a fast rank waits for the slowest once it is `window` steps ahead.
3. Nobody waits for ever: for a rank that came back from behind, what is ahead of it makes room (whoever has
   mapped that keeps it, and whoever still needs it has it read again).

See: docs/formats/shards.md, "A mini-batch in memory".
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import msgspec

from rollout.errors import RequestError, RolloutError, ShardError
from rollout.loader.batch import Batch, make_block
from rollout.loader.dataset import Dataset
from rollout.loader.plan import Plan

_MESSAGE_BYTES_MAX = 1 << 16
_CREDENTIALS = struct.Struct("3i")


class _Ask(msgspec.Struct):
    """A process's message: its local rank and first step (once, first), then each step that it wants."""

    step: int
    rank: int = 0


class _Answer(msgspec.Struct):
    """The node's: steps and rank of the plan (once, first), or an error; else a descriptor comes along."""

    steps: int = 0
    rank: int = 0
    error: str = ""
    is_damage: bool = False


class _Block:
    """A mini-batch that the node holds; `fd` is None while it is read."""

    def __init__(self) -> None:
        self.fd: int | None = None
        self.size = 0
        self.holders: set[int] = set()


class Node:
    """Reads for the ranks of this host.  A context manager: it serves from threads until it is left."""

    def __init__(self, dataset: Dataset, plan: Plan, ranks: Sequence[int], name: str, window: int = 2) -> None:
        """`ranks[i]` is the rank of the plan that process i of this host computes; a tensor-parallel group shares one.

        `name` is what they attach by; `window` mini-batches are held.
        """
        if window < 1 or not ranks:
            raise RequestError(f"a node needs ranks and a window, not {list(ranks)} and {window}")
        self.dataset, self.plan, self.ranks, self.name, self.window = dataset, plan, tuple(ranks), name, window
        self._blocks: dict[int, _Block] = {}
        self._wanted = dict.fromkeys(range(len(self.ranks)), 0)
        """The step that each local rank needs now: none before it.  Without those that are gone."""
        self._changed = threading.Condition()
        self._attached: dict[int, socket.socket] = {}
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._is_closing = False
        self.reads_count = 0
        """Mini-batches read so far."""

    @property
    def resident_bytes(self) -> int:
        """Shared memory that the node holds now."""
        with self._changed:
            return sum(block.size for block in self._blocks.values())

    @property
    def resident_steps(self) -> list[int]:
        """The mini-batches in it."""
        with self._changed:
            return sorted(self._blocks)

    def __enter__(self) -> Self:
        """Listen; RequestError if the name is taken."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(_address(self.name))
        except OSError as error:
            self._listener.close()
            raise RequestError(f"a node named {self.name!r} cannot be served here: {error.strerror}") from error
        self._listener.listen(len(self.ranks))
        self._threads.append(threading.Thread(target=self._accept, daemon=True))
        self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hang up on all ranks; what they map stays theirs."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            for connection in (self._listener, *self._connections):
                with suppress(OSError):  # it hung up first
                    connection.shutdown(socket.SHUT_RDWR)
        while self._threads:
            self._threads.pop().join()
        self._listener.close()
        for step in list(self._blocks):
            self._drop(step)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                if self._is_closing or len(self._connections) >= 2 * len(self.ranks) or not _is_ours(connection):
                    connection.close()
                    continue
                self._connections.add(connection)
                self._threads = [thread for thread in self._threads if thread.is_alive()]
                self._threads.append(threading.Thread(target=self._serve, args=[connection], daemon=True))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        rank: int | None = None
        try:
            while message := connection.recv(_MESSAGE_BYTES_MAX):
                ask = msgspec.msgpack.decode(message, type=_Ask)
                if rank is None:
                    rank = self._greet(connection, ask)
                else:
                    self._answer(connection, rank, ask.step)
        except (OSError, msgspec.MsgspecError):
            pass  # it is killed, or no rank at all
        finally:
            self._leave(connection, rank)

    def _greet(self, connection: socket.socket, ask: _Ask) -> int | None:
        """The rank, if it may attach; it takes the place of a process that is dead."""
        answer = _Answer(error=f"node {self.name!r} has {len(self.ranks)} local ranks, counted from 0: not {ask.rank}")
        with self._changed:
            if (other := self._attached.get(ask.rank)) is not None and not _is_hung_up(other):
                answer = _Answer(error=f"local rank {ask.rank} is attached to node {self.name!r} already")
            elif 0 <= ask.rank < len(self.ranks):
                answer = _Answer(steps=len(self.plan), rank=self.ranks[ask.rank])
                self._attached[ask.rank] = connection
                self._want(ask.rank, ask.step)
        connection.send(msgspec.msgpack.encode(answer))
        return None if answer.error else ask.rank

    def _answer(self, connection: socket.socket, rank: int, step: int) -> None:
        try:
            fd = self._take(connection, rank, step)
        except RolloutError as error:
            answer = _Answer(error=str(error), is_damage=isinstance(error, ShardError))
            connection.send(msgspec.msgpack.encode(answer))
            return
        try:
            socket.send_fds(connection, [msgspec.msgpack.encode(_Answer())], [fd])
        finally:
            os.close(fd)
        self._read_ahead(step + 1)

    def _take(self, connection: socket.socket, rank: int, step: int) -> int:
        """A descriptor of the caller's own: the node's may be closed, and its number used again, at any moment."""
        with self._changed:
            if not 0 <= step < len(self.plan):
                raise RequestError(f"the plan has {len(self.plan)} steps, not one numbered {step}")
            self._want(rank, step)
            while (block := self._blocks.get(step)) is None or block.fd is None:
                if self._is_closing or _is_hung_up(connection):
                    raise RequestError(f"node {self.name!r} is closing, or its rank {rank} is gone")
                if block is None and self._has_room(step):
                    block = self._blocks[step] = _Block()
                    block.holders.add(rank)
                    break
                self._changed.wait()
            else:
                block.holders.add(rank)
                return os.dup(block.fd)
        return self._read(step, block, duplicates=True)

    def _read(self, step: int, block: _Block, *, duplicates: bool = False) -> int:
        """Fill the place that was taken for a step; a descriptor for the caller, if it wants one."""
        try:
            fd, size = make_block(self.dataset.metadata, self.plan, step, sorted(set(self.ranks)), self.name)
        except BaseException:
            with self._changed:
                del self._blocks[step]
                self._changed.notify_all()
            raise
        with self._changed:
            block.fd, block.size = fd, size
            self.reads_count += 1
            own = os.dup(fd) if duplicates else -1
            self._settle()
        return own

    def _read_ahead(self, step: int) -> None:
        with self._changed:
            if step >= len(self.plan) or step in self._blocks or len(self._blocks) >= self.window:
                return
            block = self._blocks[step] = _Block()
        with suppress(RolloutError):  # the rank that takes it is told
            self._read(step, block)

    def _has_room(self, step: int) -> bool:
        """Whether one more fits; makes room by what is ahead of it: what nobody holds, or for a rank that came back."""
        if len(self._blocks) < self.window:
            return True
        ahead = [at for at, block in self._blocks.items() if at > step and block.fd is not None]
        spare = [at for at in ahead if not self._blocks[at].holders]
        if not spare and step < min(self._blocks):
            spare = ahead  # who has mapped it keeps it
        if spare:
            self._drop(max(spare))
        return bool(spare)

    def _want(self, rank: int, step: int | None) -> None:
        """A rank holds nothing from here on, and needs nothing before `step` (None: it is gone)."""
        if step is None:
            self._wanted.pop(rank, None)
        else:
            self._wanted[rank] = step
        for block in self._blocks.values():
            block.holders.discard(rank)
        self._settle()

    def _settle(self) -> None:
        """Let go of what nobody needs, and tell who waits."""
        for at, block in list(self._blocks.items()):
            if block.fd is not None and not block.holders and all(at < wanted for wanted in self._wanted.values()):
                self._drop(at)
        self._changed.notify_all()

    def _leave(self, connection: socket.socket, rank: int | None) -> None:
        """A rank has hung up, or was killed: it holds nothing, and nobody waits for it."""
        with self._changed:
            self._connections.discard(connection)
            connection.close()
            if rank is not None and self._attached.get(rank) is connection:
                del self._attached[rank]
                self._want(rank, None)

    def _drop(self, step: int) -> None:
        block = self._blocks.pop(step)
        if block.fd is not None:
            os.close(block.fd)


class Attached:
    """One rank's end of a Node; iterate over it for its mini-batches, close it or use it as a context manager.

    The node may let go of a mini-batch when the next is asked for; a second loop goes on behind the first.
    Iterating raises ShardError for a damaged shard, or if the node is gone.
    """

    def __init__(self, connection: socket.socket, name: str, local_rank: int, first_step: int) -> None:
        """Use `attach`."""
        self.name, self._step = name, first_step
        self._socket = connection
        answer, _ = self._ask(_Ask(step=first_step, rank=local_rank))
        self.rank, self.steps_count = answer.rank, answer.steps

    def __iter__(self) -> Iterator[Batch]:
        while self._step < self.steps_count:
            _, fd = self._ask(_Ask(step=self._step))
            self._step += 1
            try:
                batch = Batch(fd, self.rank)
            finally:
                os.close(fd)
            yield batch
            del batch

    def close(self) -> None:
        """Let go of everything; closing twice is fine."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, ask: _Ask) -> tuple[_Answer, int]:
        try:
            self._socket.send(msgspec.msgpack.encode(ask))
            message, fds, _, _ = socket.recv_fds(self._socket, _MESSAGE_BYTES_MAX, 1)
        except OSError as error:
            raise ShardError(f"node {self.name!r} is gone: {error.strerror}") from error
        if not message:
            raise ShardError(f"node {self.name!r} is gone")
        answer = msgspec.msgpack.decode(message, type=_Answer)
        if answer.error:
            raise ShardError(answer.error) if answer.is_damage else RequestError(answer.error)
        return answer, fds[0] if fds else -1


def attach(name: str, local_rank: int, first_step: int = 0) -> Attached:
    """The mini-batches of one process from `first_step` on, by the Node of this host and user that has the name.

    RequestError if there is none, or it has no such rank.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(_address(name))
        if not _is_ours(connection):
            raise RequestError(f"node {name!r} is another user's")
        return Attached(connection, name, local_rank, first_step)
    except OSError as error:
        connection.close()
        raise RequestError(f"no node named {name!r} serves this host: {error.strerror}") from error
    except BaseException:
        connection.close()
        raise


def _is_ours(connection: socket.socket) -> bool:
    """Whether the process at the other end is this user's."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(credentials)[1] == os.geteuid())


def _is_hung_up(connection: socket.socket) -> bool:
    """Whether the process at the other end is gone."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


def _address(name: str) -> str:
    return f"\0dsec/loader/{os.geteuid()}/{name}"
