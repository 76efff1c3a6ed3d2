"""A check that is written is a check that runs."""

import asyncio
import importlib
import pkgutil

from dsec import conformance
from dsec.conformance.check import Check, outcome_of, require
from dsec.conformance.suite import checks_for
from dsec.testing import SANDBOX_CHECKS, FakeSandbox, FakeSubstrate, check_sandbox
from dsec.types import SandboxId, SandboxSpec


def test_every_check_of_the_suite_is_in_its_list_once() -> None:
    modules = [
        importlib.import_module(f"dsec.conformance.{found.name}")
        for found in pkgutil.iter_modules(conformance.__path__)
    ]
    written = [value for module in modules for value in vars(module).values() if isinstance(value, Check)]
    assert len(SANDBOX_CHECKS) == len({check.name for check in SANDBOX_CHECKS})
    assert {check.name for check in written} == {check.name for check in SANDBOX_CHECKS}


def test_what_a_substrate_lacks_leaves_out_the_checks_that_need_it_and_no_other() -> None:
    left_out = set(SANDBOX_CHECKS) - set(checks_for({"snapshot", "disk_quota"}))
    assert left_out == {check for check in SANDBOX_CHECKS if check.needs & {"snapshot", "disk_quota"}}
    assert left_out
    assert checks_for() == SANDBOX_CHECKS


class BrokenSubstrate(FakeSubstrate):
    async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> FakeSandbox:
        raise IndexError("list index out of range")


class SilentSubstrate(FakeSubstrate):
    async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> FakeSandbox:
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_substrate_that_raises_what_it_likes_has_an_outcome_of_every_check() -> None:
    substrate = BrokenSubstrate()
    await substrate.open()
    outcomes = {outcome.name: outcome.problem for outcome in await check_sandbox(substrate)}
    assert list(outcomes) == [check.name for check in SANDBOX_CHECKS]
    assert outcomes["a_command_that_kills_others_starts_alone"] == "IndexError: list index out of range"


async def test_a_substrate_that_hangs_has_an_outcome_of_every_check() -> None:
    substrate = SilentSubstrate()
    await substrate.open()
    outcomes = {outcome.name: outcome.problem for outcome in await check_sandbox(substrate, patience_s=0.01)}
    assert list(outcomes) == [check.name for check in SANDBOX_CHECKS]
    assert outcomes["a_command_that_kills_others_starts_alone"].startswith("TimeoutError: it still waits after 0.01 s")


async def test_what_a_check_requires_without_a_message_is_told_by_its_line() -> None:
    async def check() -> None:
        substrate = FakeSubstrate()
        require(substrate is None)

    said = (await outcome_of("a_check", check(), 60.0)).problem
    assert said.startswith("NotConformingError: not so: require(substrate is None) (test_conformance_list.py, line ")
