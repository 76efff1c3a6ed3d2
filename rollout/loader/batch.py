"""A mini-batch in memory that several processes of a node share: one copy, views without copies.

The memory is an anonymous file (memfd): it has no name that could outlive its users, so whoever is
killed, and however, the kernel frees it with the last process that maps it.

    block  = head fields
    head   = size of the rest (u64), msgpack of BlockHead, zeros up to a page
    fields = each of FIELDS for all tokens of the block, on 64-byte borders

See: docs/formats/shards.md, "A mini-batch in memory".
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Self

import msgspec
import numpy as np

from rollout.errors import RequestError
from rollout.loader.columns import read_tokens
from rollout.loader.metadata import NO_VERSION, Column, Metadata
from rollout.loader.plan import Plan

FIELDS = {
    "token_ids": np.dtype("u4"),
    "logprobs": np.dtype("f4"),
    "advantages": np.dtype("f4"),
    "position_ids": np.dtype("i4"),
    "segment_ids": np.dtype("i4"),
    "versions": np.dtype("i4"),
    "loss_mask": np.dtype("?"),
}
BYTES_PER_TOKEN = sum(kind.itemsize for kind in FIELDS.values())
_ALIGNMENT = 64


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout in a sequence: tokens `start` to `start + length` of it.  `reward` None is unset, which is not 0."""

    row: int
    rollout_id: str
    group: str
    group_index: int
    start: int
    length: int
    reward: float | None
    finish_reason: str
    version_min: int | None
    version_max: int | None


class SequenceHead(msgspec.Struct, frozen=True):
    """Where a sequence lies among the tokens of its block."""

    start: int
    length: int
    members: tuple[Member, ...]


class BlockHead(msgspec.Struct, frozen=True, kw_only=True):
    """What a block holds: the sequences of some ranks in one step of a plan."""

    plan: str
    step: int
    tokens_count: int
    ranks: dict[int, tuple[SequenceHead, ...]]


class PackedSequence:
    """Rollouts end to end, as views of shared memory.  All arrays have one entry a token.

    `token_ids` u32; `logprobs` f32, 0 where not sampled; `loss_mask` bool, from the spans; `position_ids` i32, from 0
    in each rollout; `segment_ids` i32, which rollout of the sequence; `versions` i32, NO_VERSION where not sampled;
    `advantages` f32, zeros that a trainer may write over, for every process of the node to see (the rest is
    read-only).  `cu_seqlens` i32: where each rollout starts, and the end.
    """

    def __init__(self, block: _Block, head: SequenceHead) -> None:
        end = head.start + head.length
        self.members = head.members
        self.cu_seqlens = np.array([*(member.start for member in head.members), head.length], "i4")
        self.token_ids, self.logprobs = (block.fields[name][head.start : end] for name in ("token_ids", "logprobs"))
        self.loss_mask, self.versions = (block.fields[name][head.start : end] for name in ("loss_mask", "versions"))
        self.position_ids, self.segment_ids, self.advantages = (
            block.fields[name][head.start : end] for name in ("position_ids", "segment_ids", "advantages")
        )

    def __len__(self) -> int:
        return len(self.token_ids)


class Batch:
    """The sequences of one rank in one step; some may be empty, so that all ranks have as many.

    Its memory stays for as long as one of its arrays is kept.
    """

    def __init__(self, fd: int, rank: int) -> None:
        """Map a block; the descriptor is no longer needed then."""
        block = _Block.of(fd)
        self.step, self.rank, self.plan = block.head.step, rank, block.head.plan
        self.sequences = tuple(PackedSequence(block, head) for head in block.head.ranks[rank])

    @property
    def tokens_count(self) -> int:
        """Of all sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    def __iter__(self) -> Iterator[PackedSequence]:
        return iter(self.sequences)

    def release(self) -> None:
        """Let go of the arrays now, for a caller whose variables live longer."""
        self.sequences = ()


def make_block(metadata: Metadata, plan: Plan, step: int, ranks: Sequence[int], name: str) -> tuple[int, int]:
    """Read what `ranks` need in a step into new shared memory: its descriptor, and its size in bytes.

    ShardError for what cannot be read, RequestError if there is no memory for it.
    """
    head, rows = _describe(metadata, plan, step, ranks)
    data = msgspec.msgpack.encode(head)
    begin = -(-(8 + len(data)) // mmap.PAGESIZE) * mmap.PAGESIZE
    size = begin + _size(head.tokens_count)
    fd = os.memfd_create(f"dsec-loader-{name}", os.MFD_CLOEXEC)
    try:
        _allocate(fd, size, step)
        os.pwrite(fd, len(data).to_bytes(8, "little") + data, 0)
        fields = _views(mmap.mmap(fd, size), begin, head.tokens_count)
        for sequence in (each for mine in head.ranks.values() for each in mine):
            for segment, member in enumerate(sequence.members):
                at = slice(sequence.start + member.start, sequence.start + member.start + member.length)
                fields["position_ids"][at] = np.arange(member.length, dtype="i4")
                fields["segment_ids"][at] = segment
        for tokens in read_tokens(metadata, list(rows)):
            at = slice(rows[tokens.row], rows[tokens.row] + len(tokens.token_ids))
            fields["token_ids"][at] = tokens.token_ids
            fields["logprobs"][at] = tokens.logprobs
            fields["loss_mask"][at] = tokens.loss_mask
            fields["versions"][at] = tokens.versions
    except BaseException:
        os.close(fd)
        raise
    return fd, size


def _allocate(fd: int, size: int, step: int) -> None:
    """What does not fit is an error here, not a signal later."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        raise RequestError(
            f"no memory for the {size} bytes of step {step}: {error.strerror}; plan fewer units a step"
        ) from error


def _describe(metadata: Metadata, plan: Plan, step: int, ranks: Sequence[int]) -> tuple[BlockHead, dict[int, int]]:
    """The head of a block, and where among its tokens each row begins."""
    at, places = 0, {}
    heads: dict[int, tuple[SequenceHead, ...]] = {}
    for rank in ranks:
        mine = []
        for sequence in plan.sequences(step, rank):
            members: list[Member] = []
            length = 0
            for row in sequence.tolist():
                places[row] = at + length
                members.append(_member(metadata, row, length))
                length += members[-1].length
            mine.append(SequenceHead(at, length, tuple(members)))
            at += length
        heads[rank] = tuple(mine)
    return BlockHead(plan=plan.digest, step=step, tokens_count=at, ranks=heads), places


def _member(metadata: Metadata, row: int, start: int) -> Member:
    reward, oldest = float(metadata.reward[row]), int(metadata.version_min[row])
    return Member(
        row=row,
        rollout_id=metadata.rollout_ids[row],
        group=metadata.groups.texts[metadata.group[row]],
        group_index=int(metadata.group_index[row]),
        start=start,
        length=int(metadata.tokens_count[row]),
        reward=None if np.isnan(reward) else reward,
        finish_reason=metadata.finish_reasons.texts[metadata.finish_reason[row]],
        version_min=None if oldest == NO_VERSION else oldest,
        version_max=None if oldest == NO_VERSION else int(metadata.version_max[row]),
    )


class _Block:
    """Shared memory as a reader maps it."""

    def __init__(self, head: BlockHead, fields: dict[str, Column]) -> None:
        self.head, self.fields = head, fields

    @classmethod
    def of(cls, fd: int) -> Self:
        """The views keep the mapping alive, and with it the memory."""
        mapped = mmap.mmap(fd, os.fstat(fd).st_size)
        size = int.from_bytes(mapped[:8], "little")
        head = msgspec.msgpack.decode(mapped[8 : 8 + size], type=BlockHead)
        fields = _views(mapped, -(-(8 + size) // mmap.PAGESIZE) * mmap.PAGESIZE, head.tokens_count)
        for name, field in fields.items():
            field.flags.writeable = name == "advantages"
        return cls(head, fields)


def _views(mapped: mmap.mmap, begin: int, tokens_count: int) -> dict[str, Column]:
    fields: dict[str, Column] = {}
    for name, kind in FIELDS.items():
        fields[name] = np.frombuffer(mapped, kind, tokens_count, begin)
        begin += _aligned(kind.itemsize * tokens_count)
    return fields


def _size(tokens_count: int) -> int:
    return sum(_aligned(kind.itemsize * tokens_count) for kind in FIELDS.values())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
