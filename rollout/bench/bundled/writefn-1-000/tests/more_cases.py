"""Calls reverse_text with more arguments than the visible test; prints PASS if every result is right."""
import sys

sys.path.insert(0, sys.argv[1])
from anymore import reverse_text

for arguments, want in (
    (('sections',), 'snoitces'),
    (('identity',), 'ytitnedi'),
    (('wishes',), 'sehsiw'),
    (('customize',), 'ezimotsuc'),
    (('possibly',), 'ylbissop'),
    (('pages',), 'segap'),
):
    got = reverse_text(*arguments)
    if got != want or type(got) is not type(want):
        sys.exit(f"FAIL: reverse_text{arguments} gave {got!r}, want {want!r}")
print("PASS")
