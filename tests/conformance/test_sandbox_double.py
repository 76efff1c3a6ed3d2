"""The double keeps the promises of the port, so that a test that passes with it means something."""

import asyncio

import pytest

from dsec.conformance.check import Check
from dsec.errors import SandboxLostError, SpawnError
from dsec.testing import SANDBOX_CHECKS, FakeSandbox, FakeSubstrate
from dsec.types import Command, ExecResult, Output, SandboxSpec


@pytest.mark.parametrize("check", [check for check in SANDBOX_CHECKS if check.kind == "port"], ids=lambda c: c.name)
async def test_the_double_conforms(check: Check) -> None:
    substrate = FakeSubstrate()
    await substrate.open()
    await check.run(substrate)


async def test_the_double_answers_by_its_script_within_the_output_bound() -> None:
    substrate = FakeSubstrate(lambda _, command: ExecResult(exit_code=3, stdout=Output(head=command.argv[0].encode())))
    await substrate.open()
    sandbox = await substrate.create(SandboxSpec())
    result = await sandbox.exec(Command(argv=("abcdef",), output_bytes_max=4))
    assert (result.exit_code, result.stdout) == (3, Output(head=b"ab", tail=b"ef", dropped_bytes=2))
    assert [command.argv for command in sandbox.commands] == [("abcdef",)]


async def test_a_double_destroyed_under_a_command_is_lost() -> None:
    async def wait_for_the_end(sandbox: FakeSandbox, command: Command) -> ExecResult:
        await sandbox.destroy()
        return ExecResult(exit_code=0)

    substrate = FakeSubstrate(wait_for_the_end)
    with pytest.raises(SpawnError):
        await substrate.create(SandboxSpec())
    await substrate.open()
    sandbox = await substrate.create(SandboxSpec())
    with pytest.raises(SandboxLostError):
        await asyncio.wait_for(sandbox.exec(Command(argv=("x",))), 60)
