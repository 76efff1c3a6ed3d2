"""The loader under kills, damage and refusals: no leak, no hang, and errors that name what and where."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

import wal
from rollout.errors import RequestError, ShardError
from rollout.export.manifest import KIND, Appended, Manifest, encode, shard_path
from rollout.export.shards import ShardWriter
from rollout.export.testing import made_up_record
from rollout.loader import Dataset, Node, Verdict, attach
from wal.format import crc32

RANK = """
import sys
from rollout.loader import attach

with attach(sys.argv[1], int(sys.argv[2])) as batches:
    for batch in batches:
        print(batch.step, *(int(s.token_ids.sum()) for s in batch), flush=True)
        if sys.stdin.readline() != "next\\n":
            break
"""
OWNER = """
import sys
from pathlib import Path
from rollout.loader import Dataset, Node

dataset = Dataset.open(Path(sys.argv[1]))
plan = dataset.plan(seed=0, epoch=0, token_budget=100, world_size=2, step_units_count=2)
with Node(dataset, plan, [0, 1], sys.argv[2]) as node:
    print("ready", plan.digest, flush=True)
    sys.stdin.readline()
"""
RECORDS = [made_up_record(f"g{i // 2}", i % 2, size=2, turns=((5, 7), (3, 9 + i))) for i in range(16)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    with ShardWriter.open(tmp_path / "shards", rows_max=5) as writer:
        for start in range(0, len(RECORDS), 2):
            writer.append(RECORDS[start : start + 2])
    return tmp_path / "shards"


@pytest.fixture
def name(tmp_path: Path) -> str:
    return str(tmp_path)


@contextmanager
def process(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def said(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


def ask_next(running: subprocess.Popen[str]) -> str:
    assert running.stdin is not None
    running.stdin.write("next\n")
    running.stdin.flush()
    return said(running)


def memory_of(name: str) -> list[str]:
    """Who holds or maps memory of a node of that name."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            maps = Path(f"/proc/{pid}/maps").read_text()
            found += [pid for text in (*links, maps) if f"memfd:dsec-loader-{name}" in text]
    return found


def wait_until(node: Node, is_so: Callable[[], bool]) -> None:
    with node._changed:
        assert node._changed.wait_for(is_so, timeout=30)


def lines_of(dataset: Dataset, plan: Any, rank: int) -> list[str]:
    """What RANK says of each step."""
    batches = dataset.batches(plan, rank)
    return [" ".join([str(batch.step), *(str(int(s.token_ids.sum())) for s in batch)]) for batch in batches]


def plan_of(dataset: Dataset) -> Any:
    return dataset.plan(seed=0, epoch=0, token_budget=100, world_size=2, step_units_count=2)


def test_ranks_share_one_copy_that_is_read_once_and_what_it_says_is_what_one_alone_reads(
    shards: Path, name: str
) -> None:
    dataset = Dataset.open(shards)
    plan = plan_of(dataset)
    alone = [lines_of(dataset, plan, rank) for rank in range(2)]
    with Node(dataset, plan, [0, 1], name) as node, process(RANK, name, 0) as a, process(RANK, name, 1) as b:
        assert [[said(a)], [said(b)]] == [lines[:1] for lines in alone]
        for step in range(1, len(plan)):
            assert [ask_next(a), ask_next(b)] == [lines[step] for lines in alone]
            assert len(node.resident_steps) <= 2
        assert ask_next(a) == ask_next(b) == ""
        a.wait()
        b.wait()
        wait_until(node, lambda: not node._blocks)
        assert node.reads_count == len(plan) == 4
    assert memory_of(name) == []


def test_a_trainer_writes_into_its_slot_only_and_what_it_keeps_stays_readable(shards: Path, name: str) -> None:
    dataset = Dataset.open(shards)
    with Node(dataset, plan_of(dataset), [0], name), attach(name, 0) as batches:
        for batch in batches:
            sequence = batch.sequences[0]
            sequence.advantages[:] = 2.5
            with pytest.raises(ValueError, match="read-only"):
                sequence.token_ids[0] = 1
            break
        assert next(iter(batches)).step == 1  # the loop goes on behind the first
    batch.release()
    assert batch.sequences == ()
    assert sequence.advantages.tolist() == [2.5] * len(sequence)


def test_a_rank_attaches_once_and_those_of_one_group_see_the_same_memory(shards: Path, name: str) -> None:
    dataset = Dataset.open(shards)
    with (
        Node(dataset, plan_of(dataset), [1, 1], name) as node,
        attach(name, 1) as other,
        attach(name, 0) as mine,
    ):
        with pytest.raises(RequestError, match="rank 0 is attached"):
            attach(name, 0)
        batch, same = next(iter(mine)), next(iter(other))
        assert batch.rank == same.rank == 1
        batch.sequences[0].advantages[:] = 1.0
        assert same.sequences[0].advantages.tolist() == [1.0] * len(batch.sequences[0])
        mine.close()
        wait_until(node, lambda: node._attached.keys() == {1})
        with attach(name, 0) as again:
            assert next(iter(again)).sequences[0].advantages.tolist() == [1.0] * len(batch.sequences[0])


def test_a_rank_that_is_killed_lets_go_and_one_that_comes_back_goes_on(shards: Path, name: str) -> None:
    dataset = Dataset.open(shards)
    with Node(dataset, plan_of(dataset), [0, 1], name) as node, process(RANK, name, 0) as a:
        first = said(a)
        with process(RANK, name, 1) as b:
            assert said(b).startswith("0 ")
            b.kill()
            b.wait()
        wait_until(node, lambda: node._attached.keys() == {0})
        assert ask_next(a).startswith("1 ")
        assert ask_next(a).startswith("2 ")
        wait_until(node, lambda: all(block.holders <= {0} for block in node._blocks.values()))
        a.kill()
        a.wait()
        wait_until(node, lambda: not node._attached and all(not block.holders for block in node._blocks.values()))
        with process(RANK, name, 0) as again:
            assert said(again) == first
    assert memory_of(name) == []


def test_an_owner_that_is_killed_leaves_nothing_and_its_ranks_are_told(shards: Path, name: str) -> None:
    with process(OWNER, shards, name) as owner:
        assert said(owner).startswith("ready ")
        with attach(name, 0) as batches:
            stream = iter(batches)
            batch = next(stream)
            before = [s.token_ids.tolist() for s in batch]
            owner.kill()
            owner.wait()
            assert [s.token_ids.tolist() for s in batch] == before
            with pytest.raises(ShardError, match="is gone"):
                next(stream)
        assert memory_of(name) == []
        with pytest.raises(RequestError, match="no node named"):
            attach(name, 0)


def test_plans_are_equal_across_processes(shards: Path, name: str) -> None:
    digest = plan_of(Dataset.open(shards)).digest
    for hash_seed in ("1", "2"):
        with (
            pytest.MonkeyPatch.context() as patch,
            process(OWNER, shards, f"{name}{hash_seed}") as owner,
        ):
            patch.setenv("PYTHONHASHSEED", hash_seed)
            assert said(owner) == f"ready {digest}"


def test_a_rank_that_is_ahead_waits_for_the_slowest_and_memory_stays_within_the_window(shards: Path, name: str) -> None:
    dataset = Dataset.open(shards)
    with Node(dataset, plan_of(dataset), [0, 1], name, window=1) as node, process(RANK, name, 1) as slow:
        slow_first = said(slow)
        with process(RANK, name, 0) as fast:
            said(fast)
            fast.stdin.write("next\n")
            fast.stdin.flush()
            assert node.resident_steps == [0]
            assert slow_first.startswith("0 ")
            slow.stdin.write("next\n")
            slow.stdin.flush()
            assert said(fast).startswith("1 ")
            assert said(slow).startswith("1 ")


def test_who_asks_for_what_cannot_be_is_told(shards: Path, name: str) -> None:
    dataset = Dataset.open(shards)
    plan = plan_of(dataset)
    with Node(dataset, plan, [0], name):
        with pytest.raises(RequestError, match="has 1 local ranks, counted from 0: not 7"):
            attach(name, 7)
        with pytest.raises(RequestError, match="cannot be served here"):
            Node(dataset, plan, [0], name).__enter__()
    with pytest.raises(RequestError, match="ranks and a window"):
        Node(dataset, plan, [0], name, window=0)
    with pytest.raises(RequestError, match="token_budget is 0"):
        dataset.plan(seed=0, epoch=0, token_budget=0)
    with pytest.raises(RequestError, match="or a copy of it"):
        Dataset.open([shards, shards])
    with pytest.raises(ShardError, match="16 rollouts, 17 were asked for"):
        Dataset.open(shards, [17])
    with pytest.raises(IndexError, match="has 4 steps and 2 ranks"):
        plan.sequences(4, 0)


@pytest.mark.parametrize("by", ["node", "alone"])
def test_a_damaged_batch_is_told_by_file_and_row(shards: Path, name: str, by: str) -> None:
    path = shard_path(shards, "00000000-00000001")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    dataset = Dataset.open(shards)
    plan = dataset.plan(seed=0, epoch=0, token_budget=100, step_units_count=100)
    with Node(dataset, plan, [0], name), attach(name, 0) as attached:
        batches = dataset.batches(plan) if by == "alone" else attached
        with pytest.raises(ShardError, match=r"00000000-00000001.arrows at byte \d+: its \d+ bytes are not those"):
            list(batches)
    path.unlink()
    with pytest.raises(ShardError, match=r"cannot read .*00000000-00000001.arrows at byte"):
        list(dataset.batches(plan))


def lying(directory: Path, **lies: Any) -> Dataset:
    """Two rollouts whose manifest says something else than their shard, or names other bytes, with a good checksum."""
    with ShardWriter.open(directory / "honest") as writer:
        writer.append(RECORDS[:2])
    (batch,) = Manifest(directory / "honest")
    data = bytearray(shard_path(directory / "honest", "00000000-00000000").read_bytes())
    data[batch.offset :] = lies.pop("message", data[batch.offset :])
    rows = tuple(msgspec.structs.replace(row, **lies) for row in batch.rows)
    with wal.Log.open(directory / "manifest") as log:
        sizes = {"offset": batch.offset, "size": len(data) - batch.offset, "crc": crc32(bytes(data[batch.offset :]))}
        log.append(KIND, encode(Appended(shard="00000000-00000000", rows=rows, **sizes)))
    shard_path(directory, "00000000-00000000").write_bytes(data)
    return Dataset.open(directory)


@pytest.mark.parametrize(
    ("lies", "error"),
    [
        ({"rollout_id": "x.0"}, r"row 0 \(x.0\): another rollout stands there"),
        ({"tokens_count": 25}, r"row 0 \(g0.0\): 24 tokens and 24 logprobs, the manifest says 25"),
        ({"message": b""}, "it is no batch of rollouts"),
        ({"message": b"\xff" * 4096}, "it is no batch of rollouts"),
        ({"message": bytes(4096)}, "it is no batch of rollouts"),
    ],
)
def test_a_lie_with_a_good_checksum_is_told_by_file_and_row(tmp_path: Path, lies: Any, error: str) -> None:
    dataset = lying(tmp_path, **lies)
    plan = dataset.plan(seed=0, epoch=0, token_budget=100)
    with pytest.raises(ShardError, match=rf"00000000-00000000.arrows at byte \d+.*{error}"):
        list(dataset.batches(plan))


def test_more_rollouts_do_not_change_a_dataset_that_is_open_nor_one_of_its_counts(shards: Path) -> None:
    dataset = Dataset.open(shards)
    plan = plan_of(dataset)
    with ShardWriter.open(shards, rows_max=5) as writer:
        writer.append([made_up_record("late")])
    assert plan_of(dataset).digest == plan.digest
    assert plan_of(Dataset.open([shards], dataset.metadata.counts)).digest == plan.digest
    grown = Dataset.open(shards)
    assert len(grown) == len(dataset) + 1
    assert plan_of(grown).digest != plan.digest


def test_directories_of_many_workers_are_one_dataset_in_any_order(tmp_path: Path) -> None:
    for half in range(2):
        with ShardWriter.open(tmp_path / str(half)) as writer:
            writer.append(RECORDS[half::2] if half else RECORDS[:8:2])
    both = [tmp_path / "0", tmp_path / "1"]
    plans = [plan_of(Dataset.open(each)) for each in (both, both[::-1])]
    assert plans[0].digest == plans[1].digest
    assert plans[0].dropped == {}


def test_a_plan_of_nothing_has_no_steps_and_says_why(tmp_path: Path) -> None:
    with ShardWriter.open(tmp_path):
        pass
    assert len(plan_of(Dataset.open(tmp_path))) == 0
    with ShardWriter.open(tmp_path) as writer:
        writer.append([made_up_record("a", reward=None), made_up_record("b")])
    dataset = Dataset.open(tmp_path)
    plan = dataset.plan(seed=0, epoch=0, token_budget=10)
    assert (len(plan), plan.dropped) == (0, {Verdict.UNREWARDED: 1, Verdict.TOO_LONG: 1})
    tail = dataset.plan(seed=0, epoch=0, token_budget=100, step_units_count=2, drops_tail=True)
    assert (len(tail), tail.dropped) == (0, {Verdict.UNREWARDED: 1, Verdict.TAIL: 1})


def test_a_rank_that_is_killed_while_it_waits_is_replaced_at_once(shards: Path, name: str) -> None:
    dataset = Dataset.open(shards)
    with (
        Node(dataset, plan_of(dataset), [0, 1], name, window=1),
        process(RANK, name, 1) as slow,
        process(RANK, name, 0) as fast,
    ):
        assert said(slow).startswith("0 ")
        first = said(fast)
        assert fast.stdin is not None
        fast.stdin.write("next\n")
        fast.stdin.flush()
        fast.kill()
        fast.wait()
        with process(RANK, name, 0) as again:
            assert said(again) == first


@pytest.mark.parametrize("seed", [1, 2])
def test_ranks_that_are_killed_at_random_see_every_mini_batch_as_it_is(shards: Path, name: str, seed: int) -> None:
    dice, dataset, ranks = random.Random(seed), Dataset.open(shards), [0, 0, 1]
    plan = dataset.plan(seed=seed, epoch=0, token_budget=60, world_size=2, step_units_count=1)
    expected = [
        [
            f"{batch.step} {' '.join(str(int(s.token_ids.sum())) for s in batch)}"
            for batch in dataset.batches(plan, rank)
        ]
        for rank in range(2)
    ]
    with Node(dataset, plan, ranks, name) as node, ExitStack() as stack:
        running = [stack.enter_context(process(RANK, name, i)) for i in range(3)]
        at = [0] * 3
        assert [said(each) for each in running] == [expected[rank][0] for rank in ranks]
        while min(at) < len(plan) - 1:
            i = dice.choice([i for i in range(3) if at[i] <= min(at) and at[i] < len(plan) - 1])
            if dice.random() < 0.2:
                running[i].kill()
                running[i].wait()
                running[i] = stack.enter_context(process(RANK, name, i))
                at[i] = 0
                assert said(running[i]) == expected[ranks[i]][0]
            else:
                at[i] += 1
                assert ask_next(running[i]) == expected[ranks[i]][at[i]]
            assert len(node.resident_steps) <= 2
    for each in running:
        each.kill()
        each.wait()
    assert memory_of(name) == []
