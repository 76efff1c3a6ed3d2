"""The command line `dsec`: which commands there are, where each lives, and what a failure looks like.

A command's module is imported when it is called, so that `dsec exec` does not wait for what `dsec run` needs.

Exit codes: 0 done; 1 done with infrastructure failures, or a corrupt log; 2 bad usage or input;
3 this host or this storage cannot do it; 130 and 143 stopped by SIGINT and SIGTERM.  `dsec exec` passes its
command's code through, and says 125 where it failed itself.
"""

from __future__ import annotations

import gc
import importlib
import io
import logging
import os
import signal
import sys
from typing import Any, NoReturn

import click

from dsec.terminal import visible

COMMANDS = {
    **dict.fromkeys(("run", "show", "log"), "rollout.commands.run"),
    "export": "rollout.commands.export",
    **dict.fromkeys(("serve", "workers", "index"), "rollout.commands.serve"),
    **dict.fromkeys(("create", "pause", "resume", "snapshot", "fork", "rm", "network", "ps"), "dsec.cli_sandbox"),
    **dict.fromkeys(("exec", "logs", "trajectory"), "dsec.cli_exec"),
    "cp": "dsec.cli_cp",
    "engine": "rollout.commands.engine",
    "edge": "dsec.cli_edge",
    "image": "dsec.cli_image",
    **dict.fromkeys(("doctor", "gc"), "dsec.cli"),
}
"""Command -> module; its name there is the command's, with `_` after it where Python has it already."""
GRPC_EXPERIMENTS = "-event_engine_client,-event_engine_listener"
"""gRPC's older poller: a call changes threads less often, which takes a fifth to a half off an empty one."""
SETTING_PREFIXES = {
    "RolloutConfig": "DSEC_",
    "WorkerConfig": "DSEC_WORKER_",
    "SubstrateConfig": "DSEC_EDGE_",
    "EdgeConfig": "DSEC_EDGE_",
    "NetworkConfig": "DSEC_NETWORK_",
    "DockerConfig": "DSEC_DOCKER_",
    "ImagesConfig": "DSEC_IMAGES_",
}
"""Of the environment variables, by the name of the settings class."""


class DsecGroup(click.Group):
    """A command group that imports late, and turns the project's own errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        os.environ.setdefault("GRPC_EXPERIMENTS", GRPC_EXPERIMENTS)  # read when grpc is imported
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it says of a failure we say, and by name
        module = importlib.import_module(COMMANDS[cmd_name])
        gc.freeze()  # modules stay to the end: no collection need look at them, the last one least of all
        command: click.Command = getattr(module, f"{cmd_name}_", None) or getattr(module, cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; see the module docstring for the exit codes."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader had enough (`| head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except click.exceptions.Exit:
            raise
        except KeyboardInterrupt:  # of a command with nothing to say about it
            click.echo("dsec: interrupted", err=True)
            sys.exit(128 + signal.SIGINT)
        except Exception as error:
            if hasattr(error, "code") and hasattr(error, "fault"):  # ours, of whichever package
                fail(error)
            if type(error).__module__.startswith("pydantic") and hasattr(error, "errors"):
                fail_setting(error)
            raise


def fail(error: Any) -> NoReturn:
    """Print what was wrong and exit with the code that says whose fault it was."""
    notes = getattr(error, "__notes__", ())
    if error.code == "WAL_POISONED":
        error = error.cause  # the first failure is the one to mend, whoever met it
    for line in (error, *notes):
        click.echo(f"dsec: {visible(str(line))}", err=True)
    if error.code == "WAL_CORRUPT":
        sys.exit(1)
    sys.exit(2 if error.fault == "caller" else 3)


def fail_setting(error: Any) -> NoReturn:
    """Name the environment variables whose values are no good, and exit with 2."""
    for why in error.errors():
        if why["type"] == "default_factory_not_called":
            continue  # another value is no good
        name = str(why["loc"][0]).upper()
        prefix, told = SETTING_PREFIXES.get(error.title, ""), why["msg"].removeprefix("Value error, ")
        click.echo(f"dsec: environment variable {prefix}{name} is {why['input']!r}: {told}", err=True)
    sys.exit(2)


@click.group(
    cls=DsecGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExample:\n  dsec run --out runs/first\n  id=$(dsec create) && dsec exec $id uname -a",
)
@click.version_option(package_name="dsec")
def main() -> None:
    """Agentic sandbox rollouts for DeepSeek-V4: durable, preemptible, exact."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a narrow locale shows text escaped, never a traceback
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
