"""Commands of an Edge by the numbers that their callers gave them, and the output that an answer left out."""

import pytest

from dsec.errors import OutcomeUnknownError
from dsec.keyed import complete, find_command, fresh_name, key_of
from dsec.testing import FakeSubstrate
from dsec.types import Command, ExecResult, Output, SandboxSpec
from dsec.views import CommandView

LS = Command(argv=("ls",))


def view(key: str, number: int, **options: object) -> CommandView:
    return CommandView(key=key, number=number, command=LS, **{"state": "finished", **options})  # type: ignore[arg-type]


def test_a_command_is_found_by_the_number_that_its_caller_gave() -> None:
    views = [view(key_of(3), 1), view(key_of(7), 2), view(fresh_name(), 3)]
    assert [find_command(views, number) for number in (3, 7)] == views[:2]


def test_the_edges_own_number_of_a_command_names_no_other_command() -> None:
    views = [view(key_of(1), 1), view(key_of(4), 2)]
    assert find_command(views, 2) is None


def test_a_command_whose_caller_gave_no_number_is_found_by_the_edges() -> None:
    views = [view(fresh_name(), 1), view("build", 2)]
    assert [find_command(views, number) for number in (1, 2, 3)] == [*views, None]


def test_one_whose_end_nobody_knows_is_no_result() -> None:
    with pytest.raises(OutcomeUnknownError):
        find_command([view(key_of(1), 1, state="unknown")], 1)


@pytest.mark.parametrize("kept", [0, 1, 5, 9, 10, 99])
async def test_a_result_is_completed_to_what_the_command_asked_to_keep(kept: int) -> None:
    whole = b"0123456789"
    substrate = FakeSubstrate(lambda _sandbox, _command: ExecResult(exit_code=0, stdout=Output(whole)))
    await substrate.open()
    process = await (await substrate.create(SandboxSpec())).start(LS)
    answer = ExecResult(exit_code=0, stdout=Output(b"0", b"9", 8))
    output = (await complete(answer, process, Command(argv=("ls",), output_bytes_max=kept))).stdout
    assert output.total_bytes == 10
    assert len(output.data) == min(max(kept, 2), 10)
    assert whole.startswith(output.head)
    assert whole.endswith(output.tail)
