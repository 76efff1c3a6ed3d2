"""What finished rollouts cost to write, to plan and to read into packed mini-batches, beside JSON lines.

- `plan`: metadata of many rollouts (lognormal lengths, groups of 8) loaded whole, then an epoch chosen,
  shuffled and packed for 8 ranks; processor seconds, and memory that the process gained.
- `write`, `read`: rollouts of real tokens to shards, and back into packed mini-batches in shared memory;
  the baseline writes each record as a JSON line and decodes it into the same arrays.
- `memory`: four rank processes that each look at whole mini-batches (as the ranks of one tensor-parallel
  group do), by one Node and each by itself; shared memory and private memory as the kernel counts them.
- `bytes`: bytes a token on disk by field, against JSON of the same values.

See: docs/formats/shards.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

import wal
from rollout.export import arrow
from rollout.export.manifest import KIND, Appended, Row, encode
from rollout.export.shards import ShardWriter
from rollout.export.testing import made_up_record
from rollout.loader import Dataset, Node
from rollout.record import TrajectoryRecord

GROUP = 8
BUDGET = 32_768
RANKS = 4
RANK = """
import sys
from pathlib import Path
from rollout.loader import Dataset, attach

def told(what):
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    fields = {line.split()[0]: int(line.split()[1]) for line in lines}
    print(what, fields["Pss_Shmem:"], fields["Pss_Anon:"], flush=True)
    sys.stdin.readline()

way, where, budget, rank = sys.argv[1:]
if way == "node":
    batches = iter(attach(where, int(rank)))
else:
    dataset = Dataset.open(Path(where))
    batches = dataset.batches(dataset.plan(seed=0, epoch=0, token_budget=int(budget), step_units_count=8))
told("ready")
batch = next(batches)
fields = ("token_ids", "logprobs", "loss_mask", "versions", "position_ids", "segment_ids", "advantages")
told(sum(int(getattr(sequence, field).sum()) for sequence in batch for field in fields))
"""


def lengths(count: int, mean: int, dice: random.Random) -> list[int]:
    """Token counts with the long tail that rollouts have."""
    return [min(BUDGET, max(16, int(dice.lognormvariate(0, 0.8) * mean / 1.377))) for _ in range(count)]


def measure_plan(directory: Path, count: int) -> dict[str, Any]:
    """Metadata alone: no shard is there at all."""
    dice = random.Random(0)  # noqa: S311 - it makes data
    with wal.Log.open(directory / "manifest") as log:
        sizes = lengths(count, 6_000, dice)
        for start in range(0, count, GROUP):
            rows = tuple(row(start // GROUP, index, sizes[start + index], dice) for index in range(GROUP))
            log.append(KIND, encode(Appended(shard=str(start // 4096), offset=start, size=1, crc=0, rows=rows)))
    gc.collect()
    before, began = private_kib(), time.process_time()
    dataset = Dataset.open(directory)
    loaded, gained = time.process_time(), private_kib() - before
    plan = dataset.plan(seed=0, epoch=0, token_budget=BUDGET, world_size=8, step_units_count=64)
    planned = time.process_time()
    one = dataset.plan(seed=0, epoch=0, token_budget=BUDGET, world_size=8, step_units_count=count)
    tokens = int(dataset.metadata.tokens_count[plan.rows].sum())
    ranks = [[sum(map(int, steps_tokens(dataset, plan, s, r))) for r in range(8)] for s in range(len(plan))]
    return {
        "rollouts": count,
        "load_s": round(loaded - began, 2),
        "plan_s": round(planned - loaded, 2),
        "one_step_plan_s": round(time.process_time() - planned, 2),
        "metadata_bytes_a_rollout": round(gained * 1024 / count),
        "manifest_bytes_a_rollout": round(disk_bytes(directory) / count),
        "sequences_filled": round(tokens / (plan.sequences_count * BUDGET), 4),
        "one_step_sequences_filled": round(tokens / (one.sequences_count * BUDGET), 4),
        "slowest_rank_over_mean": round(statistics.mean(max(each) * 8 / sum(each) for each in ranks), 4),
    }


def steps_tokens(dataset: Dataset, plan: Any, step: int, rank: int) -> Iterator[int]:
    """Tokens of each sequence of a rank."""
    return (dataset.metadata.tokens_count[rows].sum() for rows in plan.sequences(step, rank))


def row(group: int, index: int, tokens_count: int, dice: random.Random) -> Row:
    """A finished rollout, as its manifest has it."""
    return Row(
        rollout_id=f"group-{group:06d}.{index}",
        request_id="job-1",
        task=f"task-{group % 1000}",
        group_id=f"group-{group:06d}",
        group_index=index,
        group_size=GROUP,
        tokens_count=tokens_count,
        trainable_count=tokens_count // 2,
        turns_count=4,
        finish_reason="STOP",
        reward=float(dice.random() < 0.5),
        version_min=3,
        version_max=4,
    )


def private_kib() -> int:
    """Memory of this process alone."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))


def disk_bytes(directory: Path, pattern: str = "*") -> int:
    """Bytes of files; the log reserves ahead, so blocks are not counted but what was written."""
    if pattern == "*":
        return sum(len(record.payload) + 24 for record in wal.read(directory / "manifest"))
    return sum(path.stat().st_size for path in directory.glob(pattern))


def records_of(tokens_count: int, mean: int) -> list[TrajectoryRecord]:
    """Rollouts of about so many tokens together, three turns each."""
    dice, made, total = random.Random(1), [], 0  # noqa: S311 - it makes data
    while total < tokens_count:
        for index, length in enumerate(lengths(GROUP, mean, dice)):
            turn = max(4, length // 6)
            record = made_up_record(f"g{len(made) // GROUP}", index, size=GROUP, turns=((turn, turn),) * 3)
            made.append(record)
            total += len(record.token_ids)
    return made


def measure_tokens(directory: Path, records: list[TrajectoryRecord]) -> dict[str, Any]:
    """Writing, and reading into packed mini-batches."""
    tokens = sum(len(record.token_ids) for record in records)
    began = time.process_time()
    with ShardWriter.open(directory) as writer:
        for start in range(0, len(records), GROUP):
            writer.append(records[start : start + GROUP])
        written = time.process_time()
    closed = time.process_time()
    lines = directory.parent / "records.jsonl"
    with lines.open("wb") as file:
        for record in records:
            file.write(msgspec.json.encode(record) + b"\n")
    json_written = time.process_time()
    dataset = Dataset.open(directory)
    plan = dataset.plan(seed=0, epoch=0, token_budget=BUDGET, step_units_count=8)
    start = time.process_time()
    packed = sum(batch.tokens_count for batch in dataset.batches(plan))
    read = time.process_time()
    unpacked = sum(read_json(line) for line in lines.open("rb"))
    json_read = time.process_time()
    assert packed == unpacked == tokens
    return {
        "rollouts": len(records),
        "tokens": tokens,
        "write_tokens_s": rate(tokens, written - began),
        "parquet_tokens_s": rate(tokens, closed - written),
        "read_tokens_s": rate(tokens, read - start),
        "json_write_tokens_s": rate(tokens, json_written - closed),
        "json_read_tokens_s": rate(tokens, json_read - read),
        "arrow_bytes_a_token": round(disk_bytes(directory, "*.arrows") / tokens, 2),
        "parquet_bytes_a_token": round(disk_bytes(directory, "*.parquet") / tokens, 2),
        "json_bytes_a_token": round(lines.stat().st_size / tokens, 2),
    }


def read_json(line: bytes) -> int:
    """The baseline: the arrays that a mini-batch has, out of a JSON line."""
    record = msgspec.json.decode(line, type=TrajectoryRecord)
    ids = np.array(record.token_ids, "u4")
    np.array([value or 0.0 for value in record.logprobs], "f4")
    np.repeat([span.trainable for span in record.spans], [span.length for span in record.spans])
    return len(ids)


def rate(tokens: int, seconds: float) -> int:
    """Tokens a second of processor time."""
    return round(tokens / max(seconds, 1e-3))


def measure_memory(directory: Path) -> dict[str, Any]:
    """Four processes that look at the same mini-batch: KiB a process, beyond what it had before."""
    dataset = Dataset.open(directory)
    plan = dataset.plan(seed=0, epoch=0, token_budget=BUDGET, step_units_count=8)
    name, figures = f"benchmark-{time.time_ns()}", {}
    with Node(dataset, plan, [0] * RANKS, name) as node:
        figures["node"] = watch_ranks("node", name, lambda: node.resident_bytes)
    figures["alone"] = watch_ranks("alone", str(directory), lambda: 0)
    figures["tokens"] = sum(int(dataset.metadata.tokens_count[rows].sum()) for rows in plan.sequences(0, 0))
    return figures


def watch_ranks(way: str, where: str, held_bytes: Callable[[], int]) -> dict[str, int]:
    """Shared and private KiB that the first mini-batch adds to all ranks together; what the node holds then."""
    commands = [[sys.executable, "-c", RANK, way, where, str(BUDGET), str(rank)] for rank in range(RANKS)]
    ranks = [subprocess.Popen(each, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for each in commands]
    told: list[list[list[int]]] = []
    for _ in range(3):  # before; each has it; and once more, now that all of them have it
        said = [line_of(rank).split() for rank in ranks]
        told.append([[int(each[1]), int(each[2])] for each in said])
        if len(told) == 2:
            break
        for rank in ranks:
            go_on(rank)
    # Shared pages are counted by how many map them, so look while everybody does.
    shared = [proportional_kib(rank.pid, "Pss_Shmem:") for rank in ranks]
    private = [proportional_kib(rank.pid, "Pss_Anon:") for rank in ranks]
    held = held_bytes()
    for rank in ranks:
        rank.kill()
        rank.communicate()
    return {
        "held_kib": held // 1024,
        "shared_kib": sum(shared) - sum(each[0] for each in told[0]),
        "private_kib": sum(private) - sum(each[1] for each in told[0]),
    }


def line_of(rank: subprocess.Popen[str]) -> str:
    """What a rank says next."""
    assert rank.stdout is not None
    return rank.stdout.readline()


def go_on(rank: subprocess.Popen[str]) -> None:
    """Let it."""
    assert rank.stdin is not None
    rank.stdin.write("\n")
    rank.stdin.flush()


def proportional_kib(pid: int, field: str) -> int:
    """Of a process; what n processes map counts 1/n for each."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure_fields(records: list[TrajectoryRecord]) -> dict[str, list[float]]:
    """Bytes a token: as columns of a shard, and as JSON.  Side channels are those of DeepSeek-V4-Flash."""
    tokens = sum(len(record.token_ids) for record in records)
    batch = arrow.to_batch(records)
    told = {
        "token_ids": column(batch, records, tokens, "token_ids"),
        "logprobs": column(batch, records, tokens, "logprobs"),
        "spans, versions, turns, calls": column(
            batch, records, tokens, "spans", "policy_versions", "turns", "tool_calls"
        ),
    }
    others = [name for name in batch.schema.names if not any(name in each for each in told)]
    told["everything else"] = column(batch, records, tokens, *others)
    random_ids = np.random.default_rng(0)
    rows = 256
    arrays: dict[str, tuple[np.ndarray[Any, Any], ...]] = {
        "routes (43 layers, 6 of 256, u8)": (random_ids.integers(0, 256, (rows, 43, 6), "u1"),),
        "sampling mask (30 ids, CSR u32 + u64)": (
            random_ids.integers(0, 1 << 17, (rows, 30), "u4"),
            np.arange(rows, dtype="u8"),
        ),
        "top-20 logprobs (u32 + f32)": (
            random_ids.integers(0, 1 << 17, (rows, 20), "u4"),
            -random_ids.exponential(3.0, (rows, 20)).astype("f4"),
        ),
        "hidden state (4,096 bf16)": (random_ids.normal(0, 1, (rows, 4096)).astype("f4"),),
    }
    for name, each in arrays.items():
        binary = sum(array.nbytes for array in each) / rows / (2 if "bf16" in name else 1)
        text = sum(len(json.dumps(round_all(array), separators=(",", ":"))) for array in each) / rows
        told[name] = [round(binary, 1), round(text, 1)]
    return told


def round_all(array: np.ndarray[Any, Any]) -> list[Any]:
    """As short as JSON may say it: the fewest digits that give the same f32, or five for a bf16."""
    if array.dtype.kind != "f":
        return array.tolist()
    digits = 5 if array.shape[-1] == 4096 else 9
    return [[float(f"{value:.{digits}g}") for value in line] for line in array.tolist()]


def column(batch: pa.RecordBatch, records: list[TrajectoryRecord], tokens: int, *names: str) -> list[float]:
    """Bytes a token of some fields."""
    text = sum(len(msgspec.json.encode({name: getattr(record, name) for name in names})) for record in records)
    return [round(sum(batch.column(name).nbytes for name in names) / tokens, 2), round(text / tokens, 2)]


def tables(told: dict[str, Any]) -> Iterator[Table]:
    """For people."""
    for name in ("plan", "tokens", "memory"):
        shown = Table(title=name, show_header=False)
        for key, value in told[name].items():
            shown.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
        yield shown
    shown = Table("bytes a token", "binary", "JSON", "ratio")
    for key, (binary, text) in told["bytes"].items():
        shown.add_row(key, f"{binary:,}", f"{text:,}", f"{text / binary:.1f}")
    yield shown


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description="What finished rollouts cost to write, plan and read, beside JSON lines.",
        epilog="example: python benchmarks/loader.py --quick --json > loader.json",
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens (under a minute)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rollouts", type=int, default=100_000, help="in the metadata that is planned")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loader.") as place:
        records = records_of(1_000_000 if options.quick else 4_000_000, 6_000)
        told = {
            "plan": measure_plan(Path(place) / "metadata", options.rollouts // GROUP * GROUP),
            "tokens": measure_tokens(Path(place) / "shards", records),
            "memory": measure_memory(Path(place) / "shards"),
            "bytes": measure_fields(records),
        }
    if options.json:
        print(json.dumps(told))
        return
    for shown in tables(told):
        Console(width=110).print(shown)


if __name__ == "__main__":
    main()
