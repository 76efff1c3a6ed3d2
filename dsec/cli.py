"""Commands for the host: what it can do, and clearing up after a kill."""

from __future__ import annotations

import sys
from collections.abc import Callable

import click
import msgspec

from dsec.edge.config import SubstrateConfig
from dsec.edge.images.host import check_images
from dsec.edge.linux import cgroup
from dsec.edge.linux.host import Finding, check_host
from dsec.errors import DsecError


@click.command(
    short_help="What this host has for sandboxes, and what it lacks.", epilog="\b\nExample:\n  dsec doctor --json"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON list of findings.")
def doctor(as_json: bool) -> None:
    """Say what this host has for sandboxes, what is missing, and how to get it; exit 3 if it is unfit."""
    seen = [
        *_looked("host", check_host),
        *_looked("layers", check_images, optional=True),
        *_looked("docker", _check_docker, optional=True),
    ]
    findings = [msgspec.structs.replace(finding, remedy="") if finding.ok else finding for finding in seen]
    if as_json:
        click.echo(msgspec.json.encode(findings))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            _print_finding(finding, width)
    sys.exit(0 if all(finding.ok or finding.optional for finding in findings) else 3)


def _looked(name: str, check: Callable[[], list[Finding]], *, optional: bool = False) -> list[Finding]:
    """What a check finds; on a host so broken that it cannot look, that is what it found."""
    try:
        return check()
    except (OSError, DsecError) as error:
        return [Finding(name, False, f"cannot be checked: {error}", "mend this, then look again", optional=optional)]


def _print_finding(finding: Finding, width: int) -> None:
    """As long as it is: a path that is broken into lines cannot be copied."""
    word, colour = ("ok", "green") if finding.ok else ("optional", "yellow") if finding.optional else ("missing", "red")
    click.echo(f"{click.style(word.ljust(8), colour)}  {finding.name.ljust(width)}  {finding.detail}")
    if finding.remedy:
        click.echo(f"{' ' * (8 + 2 + width + 2)}-> {finding.remedy}")


def _check_docker() -> list[Finding]:
    try:
        from dsec.edge.substrates.docker_engine import check_docker
    except ImportError:  # without the extra dsec[docker] there are no such sandboxes
        return []
    return check_docker()


@click.command(
    short_help="Remove what killed runs left on this host.", epilog="\b\nExample:\n  dsec gc\n  dsec gc --json"
)
@click.option("--json", "as_json", is_flag=True, help="How many as JSON.")
def gc(as_json: bool) -> None:
    """Remove what killed runs left on this host (cgroups, and processes in them); living runs are left alone."""
    removed = cgroup.sweep(SubstrateConfig().cgroup_parent)
    click.echo(msgspec.json.encode({"cgroups_removed": removed}) if as_json else f"removed {removed} leftover cgroups")
