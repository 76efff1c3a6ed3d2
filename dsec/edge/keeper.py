"""The client of the keeper: a process that holds copies of our descriptors while we are dead.

What is kept has a key, which says what it is (docs/architecture.md, "Surviving the Edge").  A keeper that was killed
is replaced, and gets everything again: nothing is lost as long as one of the two lives.

See: dsec/native/protocol.h, dsec/native/keeper.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import struct
from collections.abc import Collection, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsec.edge.native_process import NativeProcess
from dsec.edge.native_wire import (
    KEPT_COUNT_MAX,
    KEY_BYTES_MAX,
    PROTOCOL_VERSION,
    MalformedMessageError,
    MessageReader,
    MessageType,
    encode_string,
    encode_u32,
)
from dsec.edge.packets import PacketSocket, close_all
from dsec.errors import DsecError, HostUnfitError, ResourceExhaustedError

ATTACH_TIMEOUT_S = 10.0
_OTHER_FILES_COUNT = 64
_STARTS_COUNT_MAX = 5
log = logging.getLogger(__name__)


class Keeper:
    """A connection to the keeper that listens on `path`; make it with `open`.

    `kept` is what an earlier process left: the descriptors are the taker's, who calls `drop` before closing one.
    """

    def __init__(self, binary: Path, path: Path, keep_s: int) -> None:
        self._binary = binary
        self._path = path
        self._keep_s = keep_s
        self._packets: PacketSocket | None = None
        self._process: NativeProcess | None = None
        self._held: dict[str, tuple[int, int]] = {}  # key -> (token, fd)
        self._count_max = KEPT_COUNT_MAX
        self._reserved_count = 0
        self._free_tokens = list(range(KEPT_COUNT_MAX - 1, -1, -1))
        self._listed: asyncio.Future[int] | None = None
        self._healing = asyncio.Lock()
        self._is_closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.kept: dict[str, int] = {}

    @classmethod
    async def open(cls, binary: Path, path: Path, keep_s: int) -> Keeper:
        """Connect to the keeper of `path`, or start one that ends `keep_s` seconds after its last user.

        HostUnfitError, also where another living process uses it, or another build of dsec started it.
        """
        keeper = cls(binary, path, keep_s)
        try:
            if not await keeper._attach():
                await keeper._heal()
        except BaseException:
            if keeper._packets is not None:
                keeper._packets.close()
            if keeper._process is not None:
                keeper._process.forget()
            keeper._release_kept()
            raise
        return keeper

    @property
    def pid(self) -> int:
        """Process id of the keeper; -1 while there is none."""
        return -1 if self._process is None else self._process.pid

    async def put(self, key: str, fd: int) -> None:
        """Keep a copy of `fd`; ours must stay open until it is dropped.  ResourceExhaustedError, HostUnfitError."""
        await self.put_all({key: fd})

    async def put_all(self, files: Mapping[str, int]) -> None:
        """As `put`, of up to PACKET_FDS_MAX in one message.

        What was sent lies in the keeper's queue, which outlives us: nobody need wait until it was read.
        """
        for key in files:
            if len(os.fsencode(key)) > KEY_BYTES_MAX:
                raise ValueError(f"the key {key[:80]!r}… is too long")
        self._require_room(sum(key not in self._held for key in files))
        for key, fd in files.items():
            token = self._held[key][0] if key in self._held else self._free_tokens.pop()
            self._held[key] = token, fd
        if not await self._send_put(files):
            await self._heal()

    def has(self, prefix: str) -> bool:
        """Whether anything is kept under a key that begins like this."""
        return any(key.startswith(prefix) for key in self._held)

    def reserve(self) -> None:
        """Hold one place free until `give_back`.  ResourceExhaustedError."""
        self._require_room(1)
        self._reserved_count += 1

    def give_back(self) -> None:
        """The place is free to all again: first to who asks before anything else is awaited."""
        self._reserved_count -= 1

    def _require_room(self, count: int) -> None:
        if len(self._held) + self._reserved_count + count > self._count_max:
            raise ResourceExhaustedError(
                f"the keeper can hold {self._count_max} descriptors and does: raise the hard limit of open files"
            )

    async def drop(self, *keys: str) -> None:
        """Keep these no more; nothing for one that is not kept."""
        await self._send_drop(self._forget(keys))

    def release(self, files: Mapping[str, int]) -> None:
        """Keep these no more, then close ours; nobody need wait for it."""
        tokens = self._forget(files)
        if not tokens or self._packets is None or self._packets.send_now(_encode_drop(tokens)):
            self._free_tokens += tokens
            close_all(files.values())
        else:
            self._spawn(self._release(tokens, files), "release descriptors")

    async def _release(self, tokens: list[int], files: Mapping[str, int]) -> None:
        try:
            await self._send_drop(tokens)
        finally:
            close_all(files.values())

    def _forget(self, keys: Iterable[str]) -> list[int]:
        """The tokens of what was held: free once the keeper has been told."""
        return [self._held.pop(key)[0] for key in keys if key in self._held]

    async def close(self) -> None:
        """Leave the keeper to the next process; with nothing kept it ends, and this waits.  Safe to call twice."""
        if self._is_closed:
            return
        if self._held:
            await self._heal_alone()  # what is left must be there
        else:
            await asyncio.gather(*self._tasks, return_exceptions=True)  # it ends when it was told of all of it
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        packets, self._packets = self._packets, None
        process, self._process = self._process, None
        if packets is not None:
            packets.close()
        if process is not None:
            if self._held:
                process.forget()
            else:
                await process.ended()

    # -- the connection ------------------------------------------------------------------------

    async def _attach(self) -> bool:
        """Whether a keeper listens; then `kept` has what it holds."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        try:
            with short_name(self._path) as name:
                connection.connect(name)
            (pid,) = struct.unpack_from("i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            self._watch(NativeProcess(pid))
        except (FileNotFoundError, ConnectionRefusedError, ProcessLookupError):
            connection.close()
            return False
        except OSError as error:
            connection.close()
            raise HostUnfitError(f"{self._path} cannot be used: {error}") from error
        self._packets = PacketSocket(connection, self._on_packet, self._on_close)
        try:
            async with asyncio.timeout(ATTACH_TIMEOUT_S):
                version = await self._list()
        except ConnectionError:
            self._release_kept()
            await self._require_ended(pid)
            return False
        except TimeoutError as error:
            raise HostUnfitError(f"the keeper of {self._path} serves another process") from error
        if version != PROTOCOL_VERSION:
            raise self._stranger(pid, f"its protocol is {version}, ours {PROTOCOL_VERSION}")
        used = {token for token, _ in self._held.values()}
        self._free_tokens = [token for token in self._free_tokens if token not in used]
        return True

    async def _require_ended(self, pid: int) -> None:
        """HostUnfitError if a keeper that hung up lives on: it does not understand us, and may hold sandboxes."""
        try:
            async with asyncio.timeout(ATTACH_TIMEOUT_S):
                if self._process is not None:
                    await self._process.ended()
        except TimeoutError as error:
            raise self._stranger(pid, "we do not understand each other") from error
        self._process = None

    def _stranger(self, pid: int, why: str) -> HostUnfitError:
        return HostUnfitError(
            f"the keeper of {self._path} was started by another build of dsec ({why}): serve this directory with that "
            f"build until its sandboxes have ended, or end all of them: kill {pid}"
        )

    async def _list(self) -> int:
        """Ask what is kept, and wait for all of it; the keeper's version.  ConnectionError."""
        if self._packets is None:
            raise ConnectionError("there is no keeper")
        self._listed = asyncio.get_running_loop().create_future()
        try:
            await self._packets.send(encode_u32(MessageType.LIST))
            return await self._listed
        finally:
            self._listed = None

    def _watch(self, process: NativeProcess) -> None:
        self._process = process
        _, files_max = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        self._count_max = min(KEPT_COUNT_MAX, files_max - _OTHER_FILES_COUNT)

    def _release_kept(self) -> None:
        close_all(self.kept.values())
        self.kept.clear()
        self._held.clear()

    async def _start(self) -> None:
        """Start a keeper, and wait until it listens: a process that finds nobody starts one too.  ConnectionError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            try:
                self._path.unlink(missing_ok=True)
                with short_name(self._path) as name:
                    listener.bind(name)
                self._path.chmod(0o600)
                fds = listener.fileno(), theirs.fileno()
                self._watch(NativeProcess.start(self._binary, "keeper", fds, str(self._keep_s)))
            except OSError as error:
                ours.close()
                raise HostUnfitError(f"no keeper can listen on {self._path}: {error}") from error
            except HostUnfitError:
                ours.close()
                raise
        self._packets = PacketSocket(ours, self._on_packet, self._on_close)
        if (version := await self._list()) != PROTOCOL_VERSION:
            raise HostUnfitError(
                f"{self._binary} is of another build: its protocol is {version}, not {PROTOCOL_VERSION}"
            )

    async def _send_put(self, keys: Collection[str]) -> bool:
        """False if there is no keeper, or it ended before it took them."""
        packets = self._packets  # another keeper's, after we had to wait
        if packets is None:
            return False
        message = encode_u32(MessageType.PUT, len(keys))
        fds = []
        for key in keys:
            token, fd = self._held[key]
            message += encode_u32(token) + encode_string(key)
            fds.append(fd)
        try:
            await packets.send(message, fds)
        except ConnectionError:
            packets.close()
            return False
        return True

    async def _send_drop(self, tokens: list[int]) -> None:
        try:
            if tokens and self._packets is not None:
                with contextlib.suppress(ConnectionError):  # a new keeper is not told of it
                    await self._packets.send(_encode_drop(tokens))
        finally:
            self._free_tokens += tokens

    async def _heal(self) -> None:
        """Start another keeper, if there is none, and give it everything.  HostUnfitError if it does not last."""
        async with self._healing:
            for _ in range(_STARTS_COUNT_MAX):
                if self._is_closed or (self._packets is not None and self._packets.is_open):
                    return
                await self._bury()
                with contextlib.suppress(ConnectionError):
                    await self._start()
                    for key in list(self._held):
                        if key in self._held and not await self._send_put([key]):
                            break
                    if self._held:
                        log.warning("the keeper had ended: another one holds %d descriptors", len(self._held))
            if self._packets is None or not self._packets.is_open:
                raise HostUnfitError(f"the keeper of {self._path} ends again and again")

    async def _bury(self) -> None:
        packets, self._packets = self._packets, None
        process, self._process = self._process, None
        if packets is not None:
            packets.close()
        if process is not None:
            process.kill()  # it may have hung up only
            await process.ended()

    async def _heal_alone(self) -> None:
        try:
            await self._heal()
        except DsecError:
            log.exception("sandboxes will not survive a restart: there is no keeper")

    def _on_close(self) -> None:
        if self._listed is not None:
            if not self._listed.done():
                self._listed.set_exception(ConnectionResetError("the keeper ended"))
            return
        self._spawn(self._heal_alone(), "heal the keeper")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_packet(self, data: bytes, fds: list[int]) -> None:
        reader = MessageReader(data)
        kind = reader.u32()
        if kind == MessageType.KEPT and fds and self._listed is not None:
            token, key = reader.u32(), reader.string()
            self.kept[key] = fd = fds.pop(0)
            self._held[key] = token, fd
        elif kind == MessageType.SYNCED and self._listed is not None and not self._listed.done():
            self._listed.set_result(0 if reader.is_at_end else reader.u32())
        else:
            raise MalformedMessageError(f"the keeper sent a message of type {kind}")


def _encode_drop(tokens: list[int]) -> bytes:
    return encode_u32(MessageType.DROP, len(tokens), *tokens)


@contextlib.contextmanager
def short_name(path: Path) -> Iterator[str]:
    """A name of at most 108 bytes for a socket, however deep it lies."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
