"""A check that is written is a check that runs."""

from dsec.conformance import execution, isolation, output, port, resources
from dsec.conformance.check import Check
from dsec.testing import SANDBOX_CHECKS


def test_every_check_of_the_suite_is_in_its_list_once() -> None:
    written = [
        value
        for module in (port, execution, output, isolation, resources)
        for value in vars(module).values()
        if isinstance(value, Check)
    ]
    assert len(SANDBOX_CHECKS) == len({check.name for check in SANDBOX_CHECKS})
    assert {check.name for check in written} == {check.name for check in SANDBOX_CHECKS}
