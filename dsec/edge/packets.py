"""A SOCK_SEQPACKET socket on the event loop: packets with file descriptors, both ways.

asyncio has no transport for packets that carry descriptors, hence this one; it keeps the order of
what is sent and hands each packet to one callback.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
from collections.abc import Callable, Iterable, Sequence

from dsec.edge.native_wire import PACKET_BYTES_MAX, PACKET_FDS_MAX, MalformedMessageError

log = logging.getLogger(__name__)


def make_memory_file(name: str, data: bytes) -> int:
    """A file in memory that holds `data`, for what is too long for a packet; the caller closes it."""
    file = os.memfd_create(name, os.MFD_CLOEXEC)
    with open(file, "wb", closefd=False) as stream:
        stream.write(data)
    return file


def is_hung_up(fd: int) -> bool:
    """Whether nobody has the other end of an open socket any more."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def close_all(fds: Iterable[int]) -> None:
    """Close each of them."""
    for fd in fds:
        os.close(fd)


class PacketSocket:
    """Owns `connection`.  `on_close()` is called once, at EOF or after a packet that made no sense.

    `on_packet(data, fds)` owns the fds that it removes from the list; the others are closed after it.
    It raises MalformedMessageError for a packet that it cannot read: then the connection is closed.
    """

    def __init__(
        self,
        connection: socket.socket,
        on_packet: Callable[[bytes, list[int]], None],
        on_close: Callable[[], None],
    ) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._on_packet = on_packet
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._send_order = asyncio.Lock()
        self._room = asyncio.Event()  # for the next packet, or it is too late for one
        self._behind_count = 0  # of those who wait to send
        self._is_open = True
        self._loop.add_reader(connection.fileno(), self._receive)

    @property
    def is_open(self) -> bool:
        """False after EOF, an error, or `close`."""
        return self._is_open

    def fileno(self) -> int:
        """Of the connection; -1 once it is closed."""
        return self._socket.fileno()

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one packet; waits while the other end is behind.  ConnectionError if it is gone."""
        if not self._behind_count and self._send_at_once(data, fds):
            return
        self._behind_count += 1
        try:
            async with self._send_order:
                while not self._send_at_once(data, fds):
                    await self._writable()
        finally:
            self._behind_count -= 1

    def _send_at_once(self, data: bytes, fds: Sequence[int]) -> bool:
        """False if there is no room now.  ConnectionError."""
        if not self._is_open:
            raise ConnectionError("the other end of the socket is gone")
        try:
            if fds:
                socket.send_fds(self._socket, [data], fds)
            else:
                self._socket.send(data)
        except BlockingIOError:
            return False
        return True

    def send_now(self, data: bytes) -> bool:
        """Send one packet, if the other end still lives; False if this would have to wait."""
        try:
            return not self._behind_count and self._send_at_once(data, ())
        except ConnectionError:
            return True  # nobody need be told

    async def _writable(self) -> None:
        self._room.clear()
        self._loop.add_writer(self._socket.fileno(), self._room.set)
        try:
            await self._room.wait()
        finally:
            if self._is_open:
                self._loop.remove_writer(self._socket.fileno())

    def _receive(self) -> None:
        """Take one packet; the loop comes back for the next."""
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, PACKET_BYTES_MAX, PACKET_FDS_MAX, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        is_well = bool(data) and self._deliver(data, fds)
        close_all(fds)
        if not is_well and self._is_open:
            self.close()
            self._on_close()

    def _deliver(self, data: bytes, fds: list[int]) -> bool:
        """Whether the packet could be read."""
        try:
            self._on_packet(data, fds)
        except MalformedMessageError:
            log.exception("a sandbox connection is closed")
            return False
        return True

    def close(self) -> None:
        """Close our end; safe to call twice.  Who waits to send learns of it.  `on_close` is not called."""
        if self._is_open:
            self._is_open = False
            self._room.set()
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
