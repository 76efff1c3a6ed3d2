"""`dsec export`: the finished rollouts of a log, as shards that trainers and data tools read."""

from __future__ import annotations

from pathlib import Path

import click

from rollout.commands.run import log_of, tokenizer_option
from rollout.export import exporter
from rollout.ledger import Ledger
from rollout.main import load_tokenizer


@click.command(
    short_help="Write finished rollouts of a run as Arrow and Parquet shards.",
    epilog="\b\nExample:\n  dsec run --group-size 4 --temperature 1 --out runs/groups\n  dsec export runs/groups\n"
    "  python examples/pack_for_training.py runs/groups/shards",
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where the shards go.  [default: DIR/shards]")
@tokenizer_option
def export(directory: Path, out: Path | None, tokenizer: Path | None) -> None:
    """Write the rollouts of a run that have ended to shards (docs/formats/shards.md); what is there stays as it is.

    It may be called again at any time, also while the run goes on: it adds what has ended since.
    """
    log = log_of(directory)
    target = out or log.parent / exporter.SHARDS
    count = exporter.export(log, Ledger.read(log, load_tokenizer(tokenizer)), target)
    click.echo(f"{count} rollouts written to {target}")
