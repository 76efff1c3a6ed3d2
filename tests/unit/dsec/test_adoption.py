"""What a dead Edge left with the keeper is found again, whatever it looks like."""

import os

from dsec.edge.commands import check_spec
from dsec.edge.substrates.adoption import facts_key, guest_key, make_facts, sort_kept
from dsec.types import Defaults, SandboxId, SandboxSpec

BOX = SandboxId("sb-1")


def test_a_sandbox_is_whole_however_long_its_facts_are() -> None:
    spec = SandboxSpec(defaults=Defaults(env=dict.fromkeys("ABC", "\x01" * 110_000)))
    check_spec(spec)
    facts = make_facts(spec)
    assert os.fstat(facts).st_size > 1 << 20
    found = sort_kept({guest_key(BOX, 7, 42): 3, facts_key(BOX): facts})
    assert [(one.id, one.slot, one.host_pid, one.spec) for one in found.sandboxes] == [(BOX, 7, 42, spec)]
    assert not found.strays
    os.close(facts)


def test_facts_that_make_no_sense_leave_strays() -> None:
    facts = os.memfd_create("facts")
    kept = {guest_key(BOX, 7, 42): 3, facts_key(BOX): facts}
    found = sort_kept(kept)
    assert (found.sandboxes, found.strays) == ([], kept)
    os.close(facts)
