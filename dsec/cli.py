"""Commands for the host: what it can do, and clearing up after a kill."""

from __future__ import annotations

import sys

import click
import msgspec
from rich.console import Console
from rich.table import Column, Table

from dsec.edge.config import SubstrateConfig
from dsec.edge.images.host import check_images
from dsec.edge.linux import cgroup
from dsec.edge.linux.host import Finding, check_host


@click.command(
    short_help="What this host has for sandboxes, and what it lacks.", epilog="\b\nExample:\n  dsec doctor --json"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON list of findings.")
def doctor(as_json: bool) -> None:
    """Say what this host has for sandboxes, what is missing, and how to get it; exit 3 if it is unfit."""
    findings = [*check_host(), *check_images(), *_check_docker()]
    if as_json:
        click.echo(msgspec.json.encode(findings))
    else:
        table = Table("check", "", Column("seen", overflow="fold"), Column("way out", overflow="fold"))
        for finding in findings:
            missing = "[yellow]optional[/]" if finding.optional else "[red]missing[/]"
            mark = "[green]ok[/]" if finding.ok else missing
            table.add_row(finding.name, mark, finding.detail, "" if finding.ok else finding.remedy)
        Console().print(table)
    sys.exit(0 if all(finding.ok or finding.optional for finding in findings) else 3)


def _check_docker() -> list[Finding]:
    try:
        from dsec.edge.substrates.docker_engine import check_docker
    except ImportError:  # without the extra dsec[docker] there are no such sandboxes
        return []
    return check_docker()


@click.command(short_help="Remove what killed runs left on this host.", epilog="\b\nExample:\n  dsec gc")
def gc() -> None:
    """Remove what killed runs left on this host (cgroups, and processes in them); living runs are left alone."""
    removed = cgroup.sweep(SubstrateConfig().cgroup_parent)
    click.echo(f"removed {removed} leftover cgroups")
