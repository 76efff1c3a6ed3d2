"""One reader for the ranks of a node: each mini-batch is read once, and every rank maps the same copy.

Ranks ask over a socket in Linux's abstract namespace and are handed a descriptor of the block; neither
has a name in a file system, so nothing is left behind by whoever is killed.  A rank that is killed lets
go of what it held when the kernel closes its connection.

Invariants:
1. At most `window` mini-batches are in memory that the node holds; a rank holds at most so many.
2. A mini-batch is let go when every rank that lives had it and let go of it; when room is needed, also
   one that nobody holds (it is read again for a rank that comes late).

See: docs/formats/shards.md, "A mini-batch in memory".
"""

from __future__ import annotations

import os
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
    """A process's message: its local rank (once, first), or the steps that it wants and lets go of."""

    rank: int = 0
    take: int | None = None
    release: int | None = None


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
        self.had: set[int] = set()

    def hold(self, rank: int) -> None:
        """A rank has it from here on."""
        self.holders.add(rank)
        self.had.add(rank)


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
        self._gone: set[int] = set()
        self._changed = threading.Condition()
        self._attached: set[int] = set()
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
                    rank = self._greet(connection, ask.rank)
                else:
                    self._answer(connection, rank, ask)
        except (OSError, msgspec.MsgspecError):
            pass  # it is killed, or no rank at all
        finally:
            self._leave(connection, rank)

    def _greet(self, connection: socket.socket, rank: int) -> int | None:
        """The rank, if it may attach."""
        error = ""
        with self._changed:
            if not 0 <= rank < len(self.ranks):
                error = f"node {self.name!r} has {len(self.ranks)} local ranks, counted from 0, and none is {rank}"
            elif rank in self._attached:
                error = f"local rank {rank} is attached to node {self.name!r} already"
            else:
                self._attached.add(rank)
                self._gone.discard(rank)
        answer = _Answer(error=error) if error else _Answer(steps=len(self.plan), rank=self.ranks[rank])
        with suppress(OSError):  # it is gone, and the next recv says so
            connection.send(msgspec.msgpack.encode(answer))
        return None if error else rank

    def _answer(self, connection: socket.socket, rank: int, ask: _Ask) -> None:
        if ask.release is not None:
            self._release(rank, ask.release)
        if ask.take is None:
            return
        try:
            fd = self._take(rank, ask.take)
        except RolloutError as error:
            answer = _Answer(error=str(error), is_damage=isinstance(error, ShardError))
            connection.send(msgspec.msgpack.encode(answer))
            return
        socket.send_fds(connection, [msgspec.msgpack.encode(_Answer())], [fd])
        self._read_ahead(ask.take + 1)

    def _take(self, rank: int, step: int) -> int:
        with self._changed:
            if not 0 <= step < len(self.plan):
                raise RequestError(f"the plan has {len(self.plan)} steps, not one numbered {step}")
            if sum(rank in block.holders for block in self._blocks.values()) >= self.window:
                raise RequestError(f"rank {rank} holds {self.window} mini-batches: release one before the next")
            while (block := self._blocks.get(step)) is None or block.fd is None:
                if self._is_closing:
                    raise RequestError(f"node {self.name!r} is closing")
                if block is None and self._has_room(evicts=True):
                    block = self._blocks[step] = _Block()
                    block.hold(rank)
                    break
                self._changed.wait()
            else:
                block.hold(rank)
                return block.fd
        return self._read(step, block)

    def _read(self, step: int, block: _Block) -> int:
        """Fill the place that was taken for a step."""
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
            self._changed.notify_all()
        return fd

    def _read_ahead(self, step: int) -> None:
        with self._changed:
            if step >= len(self.plan) or step in self._blocks or not self._has_room(evicts=False):
                return
            block = self._blocks[step] = _Block()
        with suppress(RolloutError):  # the rank that takes it is told
            self._read(step, block)

    def _has_room(self, *, evicts: bool) -> bool:
        """Whether one more fits; makes room by what nobody holds if it may."""
        if len(self._blocks) < self.window:
            return True
        idle = [step for step, block in self._blocks.items() if block.fd is not None and not block.holders]
        if not evicts or not idle:
            return False
        self._drop(min(idle))
        return True

    def _release(self, rank: int, step: int) -> None:
        with self._changed:
            if (block := self._blocks.get(step)) is not None:
                block.holders.discard(rank)
            self._settle()

    def _leave(self, connection: socket.socket, rank: int | None) -> None:
        """A rank has hung up, or was killed: it holds nothing, and nobody waits for it."""
        with self._changed:
            self._connections.discard(connection)
            connection.close()
            if rank is None:
                return
            self._attached.discard(rank)
            self._gone.add(rank)
            for block in self._blocks.values():
                block.holders.discard(rank)
            self._settle()

    def _settle(self) -> None:
        """Let go of what every living rank had and let go of."""
        for step, block in list(self._blocks.items()):
            if (
                block.fd is not None
                and not block.holders
                and block.had
                and block.had | self._gone >= set(range(len(self.ranks)))
            ):
                self._drop(step)
        self._changed.notify_all()

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
        self._held: int | None = None
        answer, _ = self._ask(_Ask(rank=local_rank))
        self.rank, self.steps_count = answer.rank, answer.steps

    def __iter__(self) -> Iterator[Batch]:
        while self._step < self.steps_count:
            _, fd = self._ask(_Ask(take=self._step, release=self._held))
            self._held, self._step = self._step, self._step + 1
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


def _address(name: str) -> str:
    return f"\0dsec/loader/{os.geteuid()}/{name}"
