"""Bytes a token by what a job asks back: in the log, over gRPC and in shards, beside the same values as JSON text.

Each field is asked for by a job of its own, of the embedded engine; a row of the table counts that field alone, over
the tokens that have it.  Of routes and hidden states the reference goes over gRPC, which is counted there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from plots import bars
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rollout_throughput import PROMPT, TOKENIZER

from dsec.testing import FakeSubstrate
from rollout import events, journal
from rollout.config import RolloutConfig
from rollout.engine import Sampling
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.export import arrow
from rollout.export.side_channels import read_side_channel
from rollout.jobs import make_job
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.record import TrajectoryRecord, trajectory_record
from rollout.request import Job, Limits, NoReward
from rollout.rpc.updates import trajectory_parts
from rollout.service import RolloutService
from wal.tokens import TokensAppended

EXAMPLE = "example: python benchmarks/record_bytes.py --rollouts 16 --tokens 256"
SAMPLING = Sampling(temperature=10.0, top_k=32, seed=1)
TOP_COUNT = 5


class Field(NamedTuple):
    """What a job asks for, the record kind that logs it, and the columns or side channels that have it."""

    mask: int
    event: type | None
    names: tuple[str, ...]
    asked: tuple[tuple[str, Any], ...] = ()
    of_context: bool = False


FIELDS = {
    "TOKENS": Field(pb.FIELD_TOKENS, None, ("token_ids", "spans"), of_context=True),
    "LOGPROBS": Field(pb.FIELD_LOGPROBS, TokensAppended, ("logprobs",)),
    "TOPK": Field(
        pb.FIELD_TOPK,
        events.TopLogprobsFound,
        ("topk_offsets", "topk_ids", "topk_logprobs"),
        (("top_logprobs_count", TOP_COUNT),),
    ),
    "SAMPLING_MASK": Field(
        pb.FIELD_SAMPLING_MASK,
        events.SideChannelsFound,
        ("mask_offsets", "mask_ids"),
        (("returns", ("sampling_mask",)),),
    ),
    "ROUTES": Field(
        pb.FIELD_ROUTES,
        events.SideChannelsFound,
        ("routes", "routes_valid", "routes_version"),
        (("returns", ("routes",)),),
        of_context=True,
    ),
    "HIDDEN": Field(pb.FIELD_HIDDEN, events.SideChannelsFound, ("hidden",), (("returns", ("hidden",)),)),
    "TEXT": Field(pb.FIELD_TEXT, None, ("turns",)),
}


def as_json(record: TrajectoryRecord, field: Field, channels: dict[str, Any]) -> bytes:
    """The same values in as few bytes as JSON has for them."""
    said: dict[str, Any] = {name: getattr(record, name) for name in field.names if name not in channels}
    for name in said.keys() & {"logprobs", "topk_logprobs"}:  # f32, which needs no more digits than this
        said[name] = [None if value is None else float(str(np.float32(value))) for value in said[name]]
    if field.names[0].endswith("_offsets"):
        borders = list(pairwise(said.pop(field.names[0])))
        said = {name: [column[start:end] for start, end in borders] for name, column in said.items()}
    for name, rows in channels.items():
        values = (rows.astype("u4") << 16).view("f4").tolist() if name == "hidden" else rows.tolist()
        said[name] = [[float(f"{value:.4g}") for value in row] for row in values] if name == "hidden" else values
    return msgspec.json.encode(said)


def logged(log: Path, event: type | None) -> int:
    """Bytes of the records that hold events of a kind; one may hold those of several rollouts."""
    held = {entry.lsn: len(entry.payload) for entry, each in journal.replay(log) if event and isinstance(each, event)}
    return sum(held.values())


def sizes(record: TrajectoryRecord, field: Field) -> tuple[int, int, int, int]:
    """Tokens of one rollout that have the field; its bytes over gRPC, in a shard, and as JSON."""
    channels = {each.name: read_side_channel(each) for each in record.side_channels}
    light, asked = (
        sum(part.ByteSize() for part in trajectory_parts(each, frozenset(mask)))
        for each, mask in ((msgspec.structs.replace(record, side_channels=()), ()), (record, (field.mask,)))
    )
    batch = arrow.to_batch([record])
    stored = sum(np.asarray(rows).nbytes for rows in channels.values())
    stored += sum(batch.column(name).nbytes for name in field.names if name not in channels)
    tokens = len(record.token_ids) if field.of_context else record.tokens_sampled
    return tokens, asked - light, stored, len(as_json(record, field, channels))


async def measure(name: str, rollouts_count: int, tokens_count: int) -> dict[str, Any]:
    """One job, of a service of its own."""
    field = FIELDS[name]
    limits = Limits(turns_count_max=1, turn_tokens_count_max=tokens_count)
    asked = Job(request_id="r", sampling=SAMPLING, limits=limits, reward=NoReward(), **dict(field.asked))
    job = make_job(asked, [PROMPT], group_size=rollouts_count)
    config = RolloutConfig(log_sync="os", exports_shards=True)
    with tempfile.TemporaryDirectory() as folder:
        async with RolloutService(Path(folder), EmbeddedEngine(), FakeSubstrate(), TOKENIZER, config) as service:
            await service.start()
            await service.submit(job, [PROMPT])
            await service.wait("r")
            exporter, found = service.exporter, []
            assert exporter is not None
            for rollout_id in service.ledger.rollouts:
                is_heavy = name in ("ROUTES", "HIDDEN")
                channels = await exporter.side_channels(rollout_id) if is_heavy else ()
                found.append(sizes(trajectory_record(service.ledger, rollout_id, channels), field))
        log = logged(Path(folder, "wal"), field.event)
    tokens, sent, stored, text = (sum(column) for column in zip(*found, strict=True))
    figures = {"log": log, "grpc": sent, "shard": stored, "json": text}
    return {"field": name} | {place: size / tokens for place, size in figures.items()} | {"ratio": text / stored}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EXAMPLE)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="sampled by each at most")
    parser.add_argument("--quick", action="store_true", help="two rollouts of 32 tokens")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--figure", type=Path, help="where to draw the picture")
    options = parser.parse_args()
    if options.quick:
        options.rollouts, options.tokens = 2, 32
    with Progress(console=Console(stderr=True), disable=options.json) as progress:
        rows = [
            asyncio.run(measure(name, options.rollouts, options.tokens))
            for name in progress.track(FIELDS, description="fields")
        ]
    if options.figure is not None:
        series = {place: [row[place] for row in rows] for place in ("log", "grpc", "shard", "json")}
        places = [row["field"] for row in rows]
        bars(options.figure, places, series, ylabel="bytes a token", title="what a field takes, where", is_log=True)
    if options.json:
        print(json.dumps({"rollouts": options.rollouts, "rows": rows}))
        return
    table = Table(*rows[0], title=f"bytes a token, {options.rollouts} rollouts")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.3g}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
