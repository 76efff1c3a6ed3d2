"""Every command, groups and their own commands too, says with an example and in words what it takes."""

from __future__ import annotations

from collections.abc import Iterator

import click
from click.testing import CliRunner

from rollout.cli import main


def commands(path: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from commands((*path, name), below)


def test_help_has_an_example_and_a_word_for_every_option() -> None:
    for path, command in commands((), main):
        shown = CliRunner().invoke(main, [*path, "--help"])
        assert shown.exit_code == 0, path
        assert "dsec " in shown.output.partition("\n  Example")[2] + shown.output.partition("\nExample")[2], path
        assert [one.name for one in command.params if isinstance(one, click.Option) and not one.help] == [], path
