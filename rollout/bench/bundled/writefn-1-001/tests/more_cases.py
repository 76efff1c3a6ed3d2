"""Calls indented_upper with more arguments than the visible test; prints PASS if every result is right."""
import sys

sys.path.insert(0, sys.argv[1])
from urlsplit import indented_upper

for arguments, want in (
    (('weakrefs',), 'WEAKREFS'),
    (('trans',), 'TRANS'),
    (('iff',), 'IFF'),
    (('noop',), 'NOOP'),
    (('interval',), 'INTERVAL'),
    (('temp',), 'TEMP'),
):
    got = indented_upper(*arguments)
    if got != want or type(got) is not type(want):
        sys.exit(f"FAIL: indented_upper{arguments} gave {got!r}, want {want!r}")
print("PASS")
