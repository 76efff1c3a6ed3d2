"""One stream of calls at the Edge: what it runs, answers, bounds and refuses, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from dsec.edge.calls import CALLS_COUNT_MAX, MESSAGE_BYTES_MAX, CallContext, Calls, Method, read_message
from dsec.errors import InvalidArgumentError
from dsec.pb.v1 import edge_pb2 as pb
from dsec.wire import JOINED_COUNT_MAX, Status


class Peer:
    """The other end of a stream: what it sends, what it has got, and whether it takes anything."""

    def __init__(self, count_max: int = 1 << 20) -> None:
        self.sent: asyncio.Queue[pb.CallRequests | None] = asyncio.Queue()
        self.messages: list[pb.CallReplies] = []
        self.arrived: asyncio.Queue[pb.CallReply] = asyncio.Queue()
        self.begun: asyncio.Queue[str] = asyncio.Queue()
        self.may_end: dict[str, asyncio.Event] = {}
        self.takes = asyncio.Event()
        self.takes.set()
        self.tasks: set[asyncio.Task[None]] = set()
        methods: dict[str, Method] = {
            "Get": self.get,
            "Broken": self.broken,
        }
        self.calls = Calls(methods, self.write, self.tasks, count_max)
        self.serving = asyncio.create_task(self.calls.serve(self.read()))

    async def get(self, data: bytes, context: CallContext) -> bytes:
        """Answers `no` with an error, a name in `may_end` when it may, all else at once."""
        request = pb.SandboxRef.FromString(data)
        self.begun.put_nowait(request.sandbox_id)
        if request.sandbox_id == "no":
            await context.abort(Status.NOT_FOUND, "NOT_FOUND: no")
        if (event := self.may_end.get(request.sandbox_id)) is not None:
            await event.wait()
        reason = "x" * (1 << 20) if request.sandbox_id == "long" else ""
        return pb.Sandbox(id=request.sandbox_id, reason=reason).SerializeToString()

    async def broken(self, _data: bytes, _context: CallContext) -> bytes:
        """As a handler whose Edge lets go of it."""
        raise asyncio.CancelledError

    async def read(self) -> AsyncIterator[bytes]:
        while (message := await self.sent.get()) is not None:
            yield message.SerializeToString()

    async def write(self, message: pb.CallReplies) -> None:
        await self.takes.wait()
        self.messages.append(message)
        for reply in message.replies:
            self.arrived.put_nowait(reply)

    def send(self, *requests: pb.CallRequest) -> None:
        self.sent.put_nowait(pb.CallRequests(requests=requests))

    def block(self, name: str) -> asyncio.Event:
        return self.may_end.setdefault(name, asyncio.Event())


def get(number: int, name: str) -> pb.CallRequest:
    return pb.CallRequest(id=number, method="Get", request=pb.SandboxRef(sandbox_id=name).SerializeToString())


def name_of(reply: pb.CallReply) -> str:
    return pb.Sandbox.FromString(reply.reply).id


async def test_calls_are_answered_when_they_end_and_all_are_before_the_stream_ends() -> None:
    peer = Peer()
    end = peer.block("slow")
    peer.send(get(1, "slow"), get(2, "fast"))
    first = await peer.arrived.get()
    assert (first.id, name_of(first)) == (2, "fast")
    peer.sent.put_nowait(None)  # it has no more to ask
    end.set()
    await peer.serving
    assert peer.arrived.get_nowait().id == 1


async def test_what_ends_while_a_message_is_on_its_way_goes_out_together_and_nothing_behind_what_is_long() -> None:
    peer = Peer()
    peer.takes.clear()
    peer.send(get(1, "a"))
    await peer.begun.get()
    peer.send(*(get(number, "b") for number in range(2, 8)), get(8, "long"), get(9, "c"))
    for _ in range(8):
        await peer.begun.get()
    peer.takes.set()
    peer.sent.put_nowait(None)
    await peer.serving
    assert [[reply.id for reply in message.replies] for message in peer.messages] == [[1], [2, 3, 4, 5, 6, 7, 8], [9]]


async def test_errors_have_the_status_and_the_details_that_the_method_gave() -> None:
    peer = Peer()
    peer.send(get(1, "no"), pb.CallRequest(id=2, method="Attach"), pb.CallRequest(id=3, method="Broken"))
    replies = {reply.id: reply for reply in [await peer.arrived.get() for _ in range(3)]}
    said = {number: (reply.status, reply.details) for number, reply in replies.items()}
    assert said[1] == (Status.NOT_FOUND.value[0], "NOT_FOUND: no")
    assert said[2] == (Status.UNIMPLEMENTED.value[0], "there is no method 'Attach' for a shared stream")
    assert said[3] == (Status.CANCELLED.value[0], "")
    peer.sent.put_nowait(None)
    await peer.serving


async def test_an_abandoned_call_ends_unanswered_and_its_id_is_free_again() -> None:
    peer = Peer()
    peer.block("slow")
    peer.send(get(7, "slow"), pb.CallRequest(id=7), pb.CallRequest(id=99))  # abandoned before its first step
    peer.send(get(8, "slow"))
    assert await peer.begun.get() == "slow"
    peer.send(pb.CallRequest(id=8), get(1, "a"))
    assert (await peer.arrived.get()).id == 1
    peer.send(get(8, "b"))
    assert (await peer.arrived.get()).id == 8
    peer.sent.put_nowait(None)
    await peer.serving
    assert peer.arrived.empty()
    assert peer.tasks == set()


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        ([get(5, "slow"), get(5, "a")], "a call with the id 5 is under way already"),
        ([get(number, "a") for number in range(JOINED_COUNT_MAX + 1)], "65 requests in a message, more than 64"),
        ([get(1, "x" * MESSAGE_BYTES_MAX)], f"more than {MESSAGE_BYTES_MAX}"),
    ],
)
async def test_a_client_that_breaks_the_rules_loses_its_stream(requests: list[pb.CallRequest], said: str) -> None:
    peer = Peer()
    peer.block("slow")
    peer.send(*requests)
    with pytest.raises(InvalidArgumentError, match=said):
        await peer.serving
    assert peer.tasks == set()


def test_what_is_too_large_is_not_parsed() -> None:
    parsed: list[bytes] = []

    def parse(data: bytes) -> pb.CallRequests:
        parsed.append(data)
        return pb.CallRequests.FromString(data)

    assert read_message("it", parse, bytes((10, 0)) * 2, 4).requests
    with pytest.raises(InvalidArgumentError, match="it has 6 bytes, more than 4"):
        read_message("it", parse, bytes((10, 0)) * 3, 4)
    assert len(parsed) == 1
    with pytest.raises(InvalidArgumentError, match="it cannot be parsed"):
        read_message("it", parse, b"\xff", 4)


async def test_no_more_is_read_while_the_bound_is_under_way_or_not_taken() -> None:
    peer = Peer()
    end = peer.block("slow")
    peer.takes.clear()
    for number in range(CALLS_COUNT_MAX + 10):
        peer.send(get(number, "slow"))
    for _ in range(CALLS_COUNT_MAX):
        await peer.begun.get()
    assert len(peer.tasks) == CALLS_COUNT_MAX
    assert peer.begun.empty()
    end.set()
    while len(peer.tasks) > 1:  # who writes
        await asyncio.wait(peer.tasks, return_when=asyncio.FIRST_COMPLETED)
    assert peer.begun.empty()  # answers that wait to be taken count, too
    peer.takes.set()
    peer.sent.put_nowait(None)
    await peer.serving
    assert peer.arrived.qsize() == CALLS_COUNT_MAX + 10


class OneByOne(Peer):
    """Takes a message whenever it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.lets = asyncio.Semaphore(0)

    async def write(self, message: pb.CallReplies) -> None:
        await self.lets.acquire()
        await super().write(message)


async def test_answers_on_their_way_count_as_not_taken() -> None:
    peer = OneByOne()
    for number in range(CALLS_COUNT_MAX + 10):
        peer.send(get(number, "a"))
    for _ in range(CALLS_COUNT_MAX - 1):  # and who writes
        await peer.begun.get()
    peer.lets.release()
    assert (await peer.arrived.get()).id == 0
    await peer.begun.get()  # in its place
    for _ in range(100):  # all others are in one message by now
        await asyncio.sleep(0)
    assert peer.begun.empty()
    peer.sent.put_nowait(None)
    for _ in range(CALLS_COUNT_MAX):
        peer.lets.release()
    await peer.serving
    assert peer.arrived.qsize() == CALLS_COUNT_MAX + 9


async def test_beyond_the_bound_of_all_streams_calls_are_refused() -> None:
    peer = Peer(count_max=1)
    end = peer.block("slow")
    peer.send(get(1, "slow"), get(2, "a"))
    refused = await peer.arrived.get()
    assert (refused.id, refused.status) == (2, Status.RESOURCE_EXHAUSTED.value[0])
    end.set()
    assert (await peer.arrived.get()).id == 1
    peer.serving.cancel()
    await asyncio.wait([peer.serving])


async def test_no_call_outlives_its_stream_and_one_that_stops_ends_them_well() -> None:
    broken, stopped = Peer(), Peer()
    for peer in (broken, stopped):
        peer.block("slow")
        peer.send(get(1, "slow"))
        await peer.begun.get()
    broken.serving.cancel()
    await asyncio.wait([broken.serving])
    assert broken.tasks == set()
    stopped.calls.stop()
    stopped.send(get(2, "late"))
    stopped.may_end["slow"].set()
    await stopped.serving
    assert [reply.id for message in stopped.messages for reply in message.replies] == [1]
